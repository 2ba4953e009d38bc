"""Ports, the balloon, pauses and snapshots of a Linux guest that works meanwhile. One boot, and one that goes on."""

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ported
import pytest
from ported import AGENT, MEMORY, MIB, SNAPSHOT, Ported, receive_until

PROGRAM = Path(ported.__file__)
DISK = 4 * MIB
FUNCTIONS = "sum() { dd if=$1 bs=16k iflag=direct 2>/dev/null | sha256sum | cut -d' ' -f1; }"
COMPLAINTS = "error|nobody cared|warning:|bug:|blocked for more|invalid|lockup|stall"


@pytest.fixture(scope="module")
def linux(kvm_that_runs_linux: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ported]:
    directory = tmp_path_factory.mktemp("ported")
    for name in ("read.img", "written.img"):
        (directory / name).write_bytes(os.urandom(DISK))
    with Ported(directory) as machine:
        machine.boot()
        machine.run(FUNCTIONS)
        machine.run("mkdir -p /dev/virtio-ports; cd /sys/class/virtio-ports; for p in *; do "
                    "[ -s $p/name ] && ln -s /dev/$p /dev/virtio-ports/$(cat $p/name); done; cd /")  # fmt: skip
        yield machine


def sha256(linux: Ported, name: str) -> str:
    return hashlib.sha256((linux.directory / name).read_bytes()).hexdigest()


def test_the_console_is_a_terminal_that_answers(linux: Ported) -> None:
    linux.run('(stty -echo; read name; echo "hello, $name") </dev/hvc0 >/dev/hvc0 2>&1 & echo started')
    linux.console.send(b"somebody\n")
    receive_until(linux.console, b"hello, somebody")


def test_the_ports_have_their_names(linux: Ported) -> None:
    assert linux.run("cat /sys/class/virtio-ports/*/name") == AGENT


def test_a_port_carries_what_each_side_sends(linux: Ported) -> None:
    data = os.urandom(256 * 1024)
    linux.type(f"head -c {len(data)} </dev/virtio-ports/{AGENT} | sha256sum; cat /dev/vda >/dev/virtio-ports/{AGENT}")
    linux.agent.sendall(data)
    received = b""
    while len(received) < DISK:
        received += linux.agent.recv(65536)
    assert received == (linux.directory / "read.img").read_bytes()
    assert linux._finish("port", None, 60).split()[0] == hashlib.sha256(data).hexdigest()


def test_the_balloon_takes_memory_and_gives_it_back(linux: Ported) -> None:
    held = linux.held
    linux.run("dd if=/dev/zero of=/tmp/filled bs=1M count=32 2>/dev/null; rm /tmp/filled")
    total = "awk '/MemTotal/{print $2}' /proc/meminfo"
    before = int(linux.run(total))
    linux.balloon.target = 64 * MIB // 4096
    linux.run(f"until [ $({total}) -le {before - 65536} ]; do sleep 0.1; done", timeout=60)
    assert linux.balloon.actual == linux.balloon.target
    stats = linux.balloon.ask_stats(10)
    assert stats["total-memory"] <= MEMORY - 64 * MIB
    assert linux.held <= min(held + 32 * MIB, MEMORY - 64 * MIB)
    linux.balloon.target = 0
    linux.run(f"until [ $({total}) -ge {before} ]; do sleep 0.1; done", timeout=60)
    assert linux.balloon.actual == 0


def test_pauses_lose_no_kick_and_no_interrupt(linux: Ported) -> None:
    linux.type("for n in 1 2 3; do sum /dev/vda; done; sum /dev/vdb")
    for _ in range(20):
        time.sleep(0.02)
        linux.machine.pause()
        linux.machine.resume()
    assert linux._finish("sums", None, 120).split() == [sha256(linux, "read.img")] * 3 + [sha256(linux, "written.img")]


def test_it_goes_on_from_a_snapshot_in_another_process(linux: Ported) -> None:
    """While it reads one disk and writes another. The first process is gone before the second one starts."""
    linux.mark("snapshot")
    linux.run("dd if=/dev/urandom of=/tmp/data bs=64k count=64 2>/dev/null")
    expected = linux.run("sha256sum </tmp/data").split()[0]
    rounds = 6
    linux.type(f"for n in $(seq {rounds}); do dd if=/tmp/data of=/dev/vdb bs=16k oflag=direct 2>/dev/null & "
               "echo round $n; sum /dev/vda; wait; done")  # fmt: skip
    linux.wait_for_line("round 3")
    time.sleep(0.1)
    linux.machine.pause()
    linux.machine.snapshot(linux.directory / SNAPSHOT)
    linux.close()

    run = subprocess.run([sys.executable, PROGRAM, linux.directory], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    read = sha256(linux, "read.img")
    assert [line for line in found["line"].splitlines() if "round" not in line] == [read] * (rounds - 2)
    assert found["again"].split() == [read, expected]
    assert found["port"] == "still there"
    bad = [
        line for line in found["complaints"].splitlines() if any(word in line.lower() for word in COMPLAINTS.split("|"))
    ]
    assert bad == []
