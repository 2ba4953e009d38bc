import os
import pty
import signal
import termios
import threading
from collections.abc import Callable, Iterator

import pytest

from pyvirtio.backends.terminal import RawTerminal
from pyvirtio.vmm.serial import HELP, Console, Keyboard

CTRL_A = b"\x01"
HANG = 10


class Typed:
    """Where the keys of a `Keyboard` end up."""

    def __init__(self) -> None:
        self.guest = b""
        self.commands: list[str] = []
        self.shown = ""
        self.quits = 0

    def keyboard(self, *, escapes: bool = True) -> Keyboard:
        return Keyboard(self.to_guest, self.execute, self.show, self.quit, escapes=escapes)

    def to_guest(self, data: bytes) -> None:
        self.guest += data

    def execute(self, line: str) -> str:
        self.commands.append(line)
        return f"<{line}>\n"

    def show(self, text: str) -> None:
        self.shown += text

    def quit(self) -> None:
        self.quits += 1


@pytest.fixture
def typed() -> Typed:
    return Typed()


def test_keys_reach_the_guest(typed: Typed) -> None:
    typed.keyboard().feed(b"ls -l\r\x03")
    assert typed.guest == b"ls -l\r\x03"


def test_ctrl_a_x_quits(typed: Typed) -> None:
    keyboard = typed.keyboard()
    keyboard.feed(CTRL_A)
    keyboard.feed(b"x")  # the two keys need not come together
    assert (typed.quits, typed.guest) == (1, b"")


def test_ctrl_a_twice_sends_one(typed: Typed) -> None:
    typed.keyboard().feed(CTRL_A + CTRL_A + b"x")
    assert (typed.guest, typed.quits) == (CTRL_A + b"x", 0)


def test_ctrl_a_h_helps(typed: Typed) -> None:
    typed.keyboard().feed(CTRL_A + b"h")
    assert typed.shown == HELP


def test_ctrl_a_c_switches_to_the_monitor_and_back(typed: Typed) -> None:
    typed.keyboard().feed(b"a" + CTRL_A + b"c" + b"info queues\r" + CTRL_A + b"c" + b"b")
    assert typed.commands == ["info queues"]
    assert "<info queues>" in typed.shown
    assert typed.guest == b"ab"


def test_monitor_lines_can_be_corrected(typed: Typed) -> None:
    typed.keyboard().feed(CTRL_A + b"c" + b"nonsense\x15quot\x7f\x7fit\r")
    assert typed.commands == ["quit"]


def test_piped_input_has_no_escapes(typed: Typed) -> None:
    typed.keyboard(escapes=False).feed(CTRL_A + b"x")
    assert (typed.guest, typed.quits) == (CTRL_A + b"x", 0)


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    """Both ends of a pseudo terminal: `(ours, the program's)`."""
    ours, theirs = pty.openpty()
    yield ours, theirs
    os.close(ours)
    os.close(theirs)


def local_flags(fd: int) -> int:
    flags: int = termios.tcgetattr(fd)[3]
    return flags


def test_terminal_is_raw_inside_and_restored_after_an_exception(terminal: tuple[int, int]) -> None:
    before = termios.tcgetattr(terminal[1])

    def fail() -> None:
        with RawTerminal(terminal[1]):
            assert not local_flags(terminal[1]) & (termios.ECHO | termios.ICANON | termios.ISIG)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert termios.tcgetattr(terminal[1]) == before


class SlowPort:
    """A serial port whose FIFO takes a few bytes at a time. `expected` is set once it has got them all."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.got = b""
        self.expected = threading.Event()

    def receive(self, data: bytes) -> int:
        taken = data[:3] if len(self.got) % 2 else data[:1]
        self.got += taken
        if len(self.got) == self.total:
            self.expected.set()
        return len(taken)


def console(port: SlowPort, quit: Callable[[], object], in_fd: int, out_fd: int) -> Console:
    return Console(port.receive, lambda line: "", quit, in_fd, out_fd)


def test_nothing_is_lost_when_the_guest_is_slow(terminal: tuple[int, int]) -> None:
    port = SlowPort(20)
    with console(port, lambda: None, terminal[1], terminal[1]):
        os.write(terminal[0], b"0123456789" * 2)
        assert port.expected.wait(HANG)
    assert port.got == b"0123456789" * 2


def test_end_of_piped_input_does_not_end_the_machine(typed: Typed) -> None:
    read, write = os.pipe()
    port = SlowPort(5)
    with console(port, typed.quit, read, 1):
        os.write(write, b"hello")
        os.close(write)
        assert port.expected.wait(HANG)
    os.close(read)
    assert (port.got, typed.quits) == (b"hello", 0)


def test_a_terminal_that_hangs_up_ends_the_machine() -> None:
    ours, theirs = pty.openpty()
    quit = threading.Event()
    with console(SlowPort(0), quit.set, theirs, theirs):
        os.close(ours)
        assert quit.wait(HANG)
    os.close(theirs)


@pytest.fixture(autouse=True)
def _ignore_hangup() -> Iterator[None]:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGHUP, before)
