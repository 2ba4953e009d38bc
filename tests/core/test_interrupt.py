"""Interrupt lines and vectors from Python."""

import os
import subprocess
import sys

import pytest

from pyvirtio._core import DeviceState, IrqLine, Isr, MsixVector


def signals(fd: int) -> int:
    """How often an eventfd was signalled since the last call."""
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0


def test_the_isr_drives_its_line_while_intx_is_enabled() -> None:
    line = IrqLine()
    isr, state = Isr(line), DeviceState("dev0", str)
    state.set_config_interrupt(isr, None)
    state.notify_config()
    assert line.level
    assert signals(line.fd) == 1
    assert isr.peek() == 3
    assert isr.read() == 3
    assert not line.level
    isr.intx_enabled = False
    state.notify_config()
    assert not line.level


def test_a_shared_line_is_high_while_one_input_is() -> None:
    line = IrqLine()
    other = line.share()
    other.set(True)
    line.set(True)
    other.set(False)
    assert line.level
    line.set(False)
    assert not line.level


def test_a_masked_vector_stays_pending_until_it_is_unmasked() -> None:
    vector = MsixVector()
    vector.masked = True
    vector.signal()
    assert vector.pending
    assert signals(vector.fd) == 0
    vector.masked = False
    assert not vector.pending
    assert signals(vector.fd) == 1


def test_breaking_a_device_tells_its_owner_then_the_driver() -> None:
    told: list[tuple[str, int]] = []
    vector = MsixVector()
    state = DeviceState("dev0", lambda reason: told.append((reason, signals(vector.fd))))
    state.set_config_interrupt(Isr(IrqLine()), vector)
    state.driver_ok = True
    state.fail("first")
    state.fail("second")
    assert told == [("first", 0)]
    assert state.broken == "first"
    assert signals(vector.fd) == 1
    state.reset()
    assert state.broken is None


def test_a_driver_that_is_not_up_is_not_interrupted() -> None:
    vector = MsixVector()
    state = DeviceState("dev0", str)
    state.set_config_interrupt(Isr(IrqLine()), vector)
    state.fail("early")
    assert signals(vector.fd) == 0


def test_an_exception_of_the_owner_does_not_reach_who_broke_the_device(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[object] = []
    monkeypatch.setattr("sys.unraisablehook", lambda unraisable: seen.append(unraisable.exc_value))
    error = LookupError("gone")

    def on_broken(reason: str) -> None:
        raise error

    DeviceState("dev0", on_broken).fail("why")
    assert seen == [error]


BLOCKED = """
import fcntl, os, threading, time
from pyvirtio._core import CallFd

fd = os.eventfd(0, os.EFD_NONBLOCK)
call = CallFd(fd)
os.write(fd, (2**64 - 2).to_bytes(8, "little"))
fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_NONBLOCK)
signalling = threading.Thread(target=call.signal)
signalling.start()
time.sleep(0.2)
os.read(fd, 8)
signalling.join()
"""


def test_a_call_fd_that_was_made_to_block_again_does_not_block_the_interpreter() -> None:
    subprocess.run([sys.executable, "-c", BLOCKED], check=True, timeout=20)
