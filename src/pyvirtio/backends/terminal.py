"""The terminal of a user, for as long as a guest has it, and what else standard input and output may be."""

import os
import stat
import termios
from contextlib import suppress
from typing import Self


class RawTerminal:
    """Passes every key on, unechoed, while entered; does nothing if `fd` is no terminal.

    Output keeps its translation of "\\n", which the monitor relies on. With `signals` the keys that send signals, such
    as Ctrl-C, go on doing so.
    """

    def __init__(self, fd: int, *, signals: bool = False) -> None:
        self.fd = fd
        self.signals = signals

    def __enter__(self) -> Self:
        self._saved = termios.tcgetattr(self.fd) if os.isatty(self.fd) else None
        if self._saved is not None:
            raw = termios.tcgetattr(self.fd)
            raw[0] &= ~(termios.BRKINT | termios.ICRNL | termios.INLCR | termios.ISTRIP | termios.IXON)
            raw[3] &= ~(termios.ECHO | termios.ICANON | termios.IEXTEN | (0 if self.signals else termios.ISIG))
            raw[6][termios.VMIN], raw[6][termios.VTIME] = 1, 0
            termios.tcsetattr(self.fd, termios.TCSANOW, raw)
        return self

    def __exit__(self, *_: object) -> None:
        if self._saved is not None:
            with suppress(termios.error):  # a terminal that was hung up needs nothing
                termios.tcsetattr(self.fd, termios.TCSADRAIN, self._saved)


def private(fd: int, how: int) -> int:
    """`fd` without blocking: opened anew, because other programs share what a duplicate refers to."""
    kind = os.fstat(fd).st_mode
    if stat.S_ISCHR(kind) or stat.S_ISFIFO(kind):
        with suppress(OSError):
            return os.open(f"/proc/self/fd/{fd}", how | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    duplicate = os.dup(fd)
    if stat.S_ISSOCK(kind):
        os.set_blocking(duplicate, False)
    return duplicate


def terminal_size(fd: int) -> tuple[int, int] | None:
    """Columns and rows, if `fd` is a terminal that knows them."""
    try:
        rows, columns = termios.tcgetwinsize(fd)
    except (OSError, termios.error):
        return None
    return (columns, rows) if columns and rows else None
