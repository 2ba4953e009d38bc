"""`pyvirtio run` as a process, with a guest of a few instructions: the console, the monitor, signals, exit status."""

import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from code16 import (
    HLT,
    IN_AL_DX,
    OUT_DX_AL,
    Item,
    any_of_al,
    firmware_image,
    jmp,
    jz,
    label,
    mov_dx,
    out,
    out_word,
    text,
)

from pyvirtio.vmm import layout

pytestmark = pytest.mark.skipif(not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="no usable /dev/kvm")

HANG_GUARD = 60
CTRL_A = b"\x01"
COM1, LINE_STATUS = layout.COM1_PORT, layout.COM1_PORT + 5

ECHO: tuple[Item, ...] = (
    text(COM1, "ready\n"),
    label("wait"),
    *(mov_dx(LINE_STATUS), IN_AL_DX, any_of_al(1), jz("wait")),  # until there is data
    *(mov_dx(COM1), IN_AL_DX, OUT_DX_AL, jmp("wait")),
)
"""A guest that says "ready" and then repeats what is typed."""
POWER_OFF: tuple[Item, ...] = (
    text(COM1, "bye\n"),
    *(out_word(layout.PM_CONTROL_PORT, 1 << 13 | 5 << 10), label("off"), HLT, jmp("off")),
)
RESET: tuple[Item, ...] = (out(layout.RESET_PORT, layout.RESET_VALUE), label("wait"), jmp("wait"))


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return tmp_path / "firmware.bin"


def command(image: Path, code: tuple[Item, ...], *options: str) -> list[str]:
    image.write_bytes(firmware_image(*code))
    return [sys.executable, "-m", "pyvirtio", "run", "--firmware", str(image), "-m", "16M", *options]


def run_piped(image: Path, code: tuple[Item, ...], *options: str) -> "subprocess.CompletedProcess[bytes]":
    arguments = command(image, code, *options)
    return subprocess.run(arguments, stdin=subprocess.DEVNULL, capture_output=True, timeout=HANG_GUARD, check=False)


def test_poweroff_is_status_0_and_the_console_is_standard_output(image: Path) -> None:
    done = run_piped(image, POWER_OFF)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"bye\n", b"")


def test_no_reboot_ends_at_a_reset(image: Path) -> None:
    assert run_piped(image, RESET, "--no-reboot").returncode == 0


def test_serial_into_a_file(image: Path, tmp_path: Path) -> None:
    log = tmp_path / "serial.log"
    done = run_piped(image, POWER_OFF, "--serial", f"file:{log}")
    assert (done.returncode, done.stdout, log.read_bytes()) == (0, b"", b"bye\n")


def test_debug_port_into_a_file(image: Path, tmp_path: Path) -> None:
    log = tmp_path / "firmware.log"
    done = run_piped(image, (text(0x402, "log"), *POWER_OFF), "--debugcon", str(log))
    assert (done.returncode, log.read_bytes()) == (0, b"log")


def test_a_pipe_is_the_keyboard_and_has_no_escapes(image: Path) -> None:
    with subprocess.Popen(command(image, ECHO), stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.stdin.write(b"hello" + CTRL_A + b"x\n")
        process.stdin.close()
        assert process.stdout.readline() == b"hello" + CTRL_A + b"x\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(HANG_GUARD) == 128 + signal.SIGTERM


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_end_the_machine_in_order(image: Path, number: signal.Signals) -> None:
    with subprocess.Popen(command(image, ECHO), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(number)
        assert process.wait(HANG_GUARD) == 128 + number


class Terminal:
    """A pseudo terminal with a guest on it. `read_until` returns what was shown up to and including a text."""

    def __init__(self, arguments: list[str]) -> None:
        self.fd, self.theirs = pty.openpty()
        self.before = termios.tcgetattr(self.theirs)
        self.process = subprocess.Popen(
            arguments, stdin=self.theirs, stdout=self.theirs, stderr=self.theirs, start_new_session=True
        )
        self._seen = b""

    def read_until(self, end: bytes) -> bytes:
        deadline = time.monotonic() + HANG_GUARD
        while end not in self._seen:
            ready, _, _ = select.select([self.fd], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"no {end!r} in {self._seen!r}"
            self._seen += os.read(self.fd, 4096)
        shown, _, self._seen = self._seen.partition(end)
        return shown + end

    def type(self, keys: bytes) -> None:
        os.write(self.fd, keys)

    def wait(self) -> int:
        return self.process.wait(HANG_GUARD)

    @property
    def is_raw(self) -> bool:
        flags: int = termios.tcgetattr(self.theirs)[3]
        return not flags & (termios.ECHO | termios.ICANON | termios.ISIG)

    @property
    def is_restored(self) -> bool:
        return termios.tcgetattr(self.theirs) == self.before

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.fd)
        os.close(self.theirs)


@pytest.fixture
def terminal(image: Path) -> Iterator[Terminal]:
    """A guest that repeats what is typed, with a random number generator; it is ready."""
    terminal = Terminal(command(image, ECHO, "--device", "virtio-rng-pci"))
    try:
        terminal.read_until(b"ready")
        yield terminal
    finally:
        terminal.close()


def test_the_terminal_is_raw_and_ctrl_c_goes_to_the_guest(terminal: Terminal) -> None:
    assert terminal.is_raw
    terminal.type(b"a\x03b")
    terminal.read_until(b"a\x03b")


def test_ctrl_a_x_quits_with_status_0_and_restores_the_terminal(terminal: Terminal) -> None:
    terminal.type(CTRL_A + b"x")
    assert terminal.wait() == 0
    assert terminal.is_restored


def test_sigterm_restores_the_terminal(terminal: Terminal) -> None:
    terminal.process.terminate()
    assert terminal.wait() == 128 + signal.SIGTERM
    assert terminal.is_restored


def test_the_monitor_shows_and_switches(terminal: Terminal) -> None:
    terminal.type(CTRL_A + b"c" + b"info devices\r")
    assert re.search(rb"rng0 +1 +rng +- +intx +off", terminal.read_until(b"off"))
    terminal.type(b"set rng0.ioeventfd on\rinfo devices\r")
    assert re.search(rb"rng0 +1 +rng +- +intx +on", terminal.read_until(b"intx        on"))
    terminal.type(CTRL_A + b"c" + b"to the guest")
    terminal.read_until(b"to the guest")
    terminal.type(CTRL_A + b"c" + b"quit\r")
    assert terminal.wait() == 0
    assert terminal.is_restored


def test_a_mistake_leaves_the_terminal_alone(image: Path) -> None:
    terminal = Terminal(command(image, ECHO, "--device", "virtio-rng-pci,colour=red"))
    try:
        assert b"unknown property" in terminal.read_until(b"\n")
        assert terminal.wait() == 2
        assert terminal.is_restored
    finally:
        terminal.close()


def test_a_crash_of_ours_restores_the_terminal(image: Path, tmp_path: Path) -> None:
    """A device that raises while the machine is closed, after the guest ran."""
    device = tmp_path / "broken.py"
    device.write_text(
        "from pyvirtio import Device, queue\n"
        "class Broken(Device, id=60):\n"
        "    @queue()\n"
        "    def q(self, vq): pass\n"
        "    def close(self): raise RuntimeError('broken device')\n"
    )
    terminal = Terminal(command(image, ECHO, "--device", f"{device}:Broken"))
    try:
        terminal.read_until(b"ready")
        terminal.type(CTRL_A + b"x")
        terminal.read_until(b"broken device")
        assert terminal.wait() == 1
        assert terminal.is_restored
    finally:
        terminal.close()
