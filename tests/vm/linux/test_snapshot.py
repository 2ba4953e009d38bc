"""Ports, the balloon, pauses and snapshots of a Linux guest that works meanwhile. One boot, and one that goes on."""

import ctypes
import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ported
import pytest
from own_network import CLONE_NEWNET, ip
from ported import AGENT, MEMORY, MIB, SNAPSHOT, TAPS, Ported, receive_until

PROGRAM = Path(ported.__file__)
DISK = 4 * MIB
FUNCTIONS = "sum() { dd if=$1 bs=16k iflag=direct 2>/dev/null | sha256sum | cut -d' ' -f1; }"
COMPLAINTS = "error|nobody cared|warning:|bug:|blocked for more|invalid|lockup|stall"


@pytest.fixture(scope="module")
def network(kvm_that_runs_linux: None) -> Iterator[None]:
    """Taps that stay when a machine ends, in a network of their own; none for a user who may not make them."""
    if not TAPS:
        yield
        return
    libc, before = ctypes.CDLL(None, use_errno=True), os.open("/proc/self/ns/net", os.O_RDONLY)
    assert libc.unshare(CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
    for name, (host, _) in TAPS.items():
        ip(f"tuntap add {name} mode tap vnet_hdr")
        ip(f"link set {name} up")
        ip(f"addr add {host}/28 dev {name}")
    yield
    assert libc.setns(before, CLONE_NEWNET) == 0
    os.close(before)


@pytest.fixture(scope="module")
def linux(network: None, kvm_that_runs_linux: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ported]:
    directory = tmp_path_factory.mktemp("ported")
    for name in ("read.img", "written.img"):
        (directory / name).write_bytes(os.urandom(DISK))
    with Ported(directory) as machine:
        machine.boot()
        machine.run(FUNCTIONS)
        machine.run("mkdir -p /dev/virtio-ports; cd /sys/class/virtio-ports; for p in *; do "
                    "[ -s $p/name ] && ln -s /dev/$p /dev/virtio-ports/$(cat $p/name); done; cd /")  # fmt: skip
        for number, (_, address) in enumerate(TAPS.values()):
            name = machine.run(f"grep -l 52:54:00:00:00:0{number} /sys/class/net/*/address").split("/")[4]
            machine.run(f"ip link set {name} up && ip addr add {address}/28 dev {name}")
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
    assert linux.finish("port", 60).split()[0] == hashlib.sha256(data).hexdigest()


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


def test_disks_and_cables_change_while_it_runs(linux: Ported) -> None:
    def eventually(command: str, answer: str) -> None:
        linux.run(f"until [ $({command}) = {answer} ]; do sleep 0.05; done", timeout=60)

    for size in (6 * MIB, DISK):
        linux.written.resize(size)
        eventually("blockdev --getsize64 /dev/vdb", str(size))
    for number, card in enumerate(linux.cards):
        name = linux.run(f"grep -l 52:54:00:00:00:0{number} /sys/class/net/*/address").split("/")[4]
        for up in (False, True):
            card.set_link(up)
            eventually(f"cat /sys/class/net/{name}/carrier", str(int(up)))


def test_pauses_lose_no_kick_and_no_interrupt(linux: Ported) -> None:
    linux.type("for n in 1 2 3; do sum /dev/vda; done; sum /dev/vdb")
    for _ in range(20):
        time.sleep(0.02)
        linux.machine.pause()
        linux.machine.resume()
    assert linux.finish("sums", 120).split() == [sha256(linux, "read.img")] * 3 + [sha256(linux, "written.img")]


class Sender:
    """Sends random bytes to whoever connects, a little at a time, until it is told that the guest has moved."""

    BLOCK, LAST, SECONDS = 16 * 1024, 16, 0.05

    def __init__(self, host: str) -> None:
        self.host = host
        self.sent = b""
        self.begun, self.moved = threading.Event(), threading.Event()
        self._listener = socket.create_server((host, 0))
        self._listener.settimeout(60)
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._send)
        self._thread.start()

    def _send(self) -> None:
        with self._listener, self._listener.accept()[0] as peer:
            peer.settimeout(60)
            while not self.moved.wait(self.SECONDS):
                self._send_block(peer)
            for _ in range(self.LAST):
                self._send_block(peer)

    def _send_block(self, peer: socket.socket) -> None:
        block = os.urandom(self.BLOCK)
        peer.sendall(block)
        self.sent += block
        self.begun.set()

    def finish(self) -> bytes:
        self._thread.join()
        return self.sent


def test_it_goes_on_from_a_snapshot_in_another_process(linux: Ported) -> None:
    """While it reads one disk, writes another and receives over two networks. The first process is gone by then."""
    linux.mark("snapshot")
    linux.run("dd if=/dev/urandom of=/tmp/data bs=64k count=64 2>/dev/null")
    expected = linux.run("sha256sum </tmp/data").split()[0]
    rounds = 6
    senders = [Sender(host) for host, _ in TAPS.values()]
    for number, sender in enumerate(senders):
        linux.run(f"nc {sender.host} {sender.port} </dev/null 2>&1 | sha256sum >/tmp/received{number} &")
    linux.type(f"for n in $(seq {rounds}); do dd if=/tmp/data of=/dev/vdb bs=16k oflag=direct 2>/dev/null & "
               "echo round $n; sum /dev/vda; wait $!; done")  # fmt: skip
    linux.wait_for_line("round 3")
    for sender in senders:
        assert sender.begun.wait(60)
    time.sleep(0.1)
    linux.machine.pause()
    linux.machine.snapshot(linux.directory / SNAPSHOT)
    linux.close()

    for sender in senders:
        sender.moved.set()
    run = subprocess.run([sys.executable, PROGRAM, linux.directory], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    read = sha256(linux, "read.img")
    assert [line for line in found["line"].splitlines() if "round" not in line] == [read] * (rounds - 2)
    assert found["again"].split() == [read, expected]
    assert found["port"] == "still there"
    assert found["received"].split() == [hashlib.sha256(sender.finish()).hexdigest() for sender in senders]
    bad = [
        line for line in found["complaints"].splitlines() if any(word in line.lower() for word in COMPLAINTS.split("|"))
    ]
    assert bad == []
