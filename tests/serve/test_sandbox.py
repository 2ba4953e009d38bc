"""What a server can no longer do once it is in its sandbox, and what is said where the kernel has none."""

import errno
import json
import os
import struct
from pathlib import Path

import pytest
from serving import programs

from pyvirtio.serve import sandbox
from pyvirtio.testing.vhost_user import FrontEnd

PROBE = """
import json, os, socket, subprocess, threading
from pathlib import Path
from pyvirtio import Device, queue

ATTEMPTS = {
    "read a file": lambda: Path("secret").read_text(),
    "write a file": lambda: Path("new").write_text("x"),
    "list a directory": lambda: os.listdir("/"),
    "run a program": lambda: subprocess.run(["true"]),
    "connect": lambda: socket.socket(),
    "trace": lambda: Path("/proc/self/mem").open("rb"),
    "import": lambda: __import__("decimal"),
    "start a thread": lambda: threading.Thread(target=int).start(),
    "draw random bytes": lambda: os.urandom(8),
    "make memory": lambda: os.close(os.memfd_create("x")),
}

class Probe(Device, id=63):
    @queue(size=8)
    def requestq(self, vq) -> None:
        for chain in vq:
            done = {what: self.attempt(attempt) for what, attempt in ATTEMPTS.items()}
            chain.write(json.dumps(done).encode())
            chain.complete()

    def attempt(self, attempt) -> bool:
        try:
            attempt()
        except OSError:
            return False
        return True
"""
HARMLESS = {"import", "start a thread", "draw random bytes", "make memory"}


def is_confined(pid: int) -> bool:
    return "NoNewPrivs:\t1" in Path(f"/proc/{pid}/status").read_text()


@pytest.mark.parametrize("options", [["--sandbox", "on"], ["--sandbox", "off"], []], ids=["on", "off", "default"])
def test_only_what_serving_needs_is_left(tmp_path: Path, options: list[str]) -> None:
    """A class of the user's own is left alone unless the user says otherwise."""
    (tmp_path / "probe.py").write_text(PROBE)
    (tmp_path / "secret").write_text("x")
    with programs(tmp_path) as start:
        process = start("probe.py:Probe", "--socket-path", "s", *options)
        with FrontEnd(tmp_path / "s") as vm:
            buffer = vm.start(size=8).requestq.add(writable=2000)
            vm.requestq.kick()
            done = json.loads(buffer.wait())
        confined = options == ["--sandbox", "on"]
        assert {what for what, succeeded in done.items() if succeeded} == (HARMLESS if confined else set(done))
        assert is_confined(process.pid) == confined
        process.terminate()
        assert process.wait(30) == 0
    assert not (tmp_path / "s").exists()


def test_a_disk_is_served_from_a_sandbox_unless_told_otherwise(tmp_path: Path) -> None:
    (tmp_path / "disk.img").write_bytes(bytes(512))
    with programs(tmp_path) as start:
        process = start("blk", "--blk-file", "disk.img", "--socket-path", "s")
        assert is_confined(process.pid)


@pytest.mark.parametrize(
    ("options", "confined"),
    [
        ("blk,drive=d --drive driver=memory,capacity=1M,id=d", True),
        ("blk,drive=d --drive driver=probe.py:Disk,id=d", False),
        ("rng --chardev null,id=c", False),
    ],
)
def test_what_may_open_something_later_is_not_confined_by_default(tmp_path: Path, options: str, confined: bool) -> None:
    disk = "from pyvirtio import BlockBackend\nclass Disk(BlockBackend):\n    capacity = 512\n    pread = None\n"
    (tmp_path / "probe.py").write_text(disk)
    with programs(tmp_path) as start:
        process = start(*options.split(), "--socket-path", "s")
        assert is_confined(process.pid) == confined


def test_what_the_kernel_does_not_have_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(sandbox, "_call", fail)
    assert sandbox.enter([tmp_path / "s"]) == [
        "without no_new_privs: Function not implemented",
        "without Landlock: Function not implemented",
        "without seccomp: Function not implemented",
    ]


def verdict(number: int, architecture: int = sandbox.AUDIT_ARCH_X86_64) -> int:
    """What the filter says of a call, by the rules of classic BPF."""
    data = struct.pack("<II", number, architecture)
    program = list(struct.iter_unpack("<HBBI", sandbox.filter_program()))
    at = accumulator = 0
    while True:
        code, yes, no, operand = program[at]
        at += 1
        if code == sandbox.RETURN:
            return int(operand)
        if code == sandbox.LOAD:
            (accumulator,) = struct.unpack_from("<I", data, operand)
        else:
            holds = accumulator == operand if code == sandbox.JUMP_IF_EQUAL else accumulator >= operand
            at += yes if holds else no


def test_the_filter_lets_through_what_is_listed_and_nothing_else() -> None:
    calls = range(600)
    assert [number for number in calls if verdict(number) == sandbox.ALLOW] == sandbox.ALLOWED
    assert {verdict(number) for number in calls} == {sandbox.ALLOW, sandbox.FAIL | errno.ENOSYS}
    assert verdict(sandbox.X32) == verdict(sandbox.X32 | 1) == verdict(0xFFFFFFFF) == sandbox.FAIL | errno.ENOSYS
    assert verdict(0, architecture=0x40000003) == sandbox.KILL
