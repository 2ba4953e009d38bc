"""The terminal of a user, for as long as a guest has it."""

import os
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
