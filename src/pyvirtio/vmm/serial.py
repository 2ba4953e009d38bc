"""The terminal of a machine: its keys go to the guest's serial port, or to the monitor.

The output of the serial port does not pass here; the core writes it to the file descriptor itself.
"""

import logging
import os
import select
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Self

from pyvirtio.backends.terminal import RawTerminal
from pyvirtio.vmm.monitor import PROMPT, LineEditor

ESCAPE = 0x01  # Ctrl-A
HELP = """
C-a x    end the machine
C-a c    switch between the console and the monitor
C-a C-a  send C-a to the guest
C-a h    this help
"""
RETRY_SECONDS = 0.01

log = logging.getLogger("pyvirtio")


class Keyboard:
    """Sorts what is typed: bytes for the guest, lines for the monitor, and the Ctrl-A commands.

    `escapes=False` passes everything to the guest, as for input from a file or a pipe.
    """

    def __init__(
        self,
        guest: Callable[[bytes], object],
        monitor: Callable[[str], str],
        show: Callable[[str], object],
        quit: Callable[[], object],
        *,
        escapes: bool = True,
    ) -> None:
        self.guest = guest
        self.show = show
        self.quit = quit
        self.escapes = escapes
        self.in_monitor = False
        self._escaped = False
        self._editor = LineEditor(monitor, show)

    def feed(self, data: bytes) -> None:
        if not self.escapes:
            self.guest(data)
            return
        for byte in data:
            if self._escaped:
                self._escaped = False
                self._command(byte)
            elif byte == ESCAPE:
                self._escaped = True
            else:
                self._pass_on(byte)

    def _pass_on(self, byte: int) -> None:
        if self.in_monitor:
            self._editor.feed(byte)
        else:
            self.guest(bytes([byte]))

    def _command(self, byte: int) -> None:
        if byte == ESCAPE:
            self._pass_on(byte)
        elif chr(byte) == "x":
            self.quit()
        elif chr(byte) == "h":
            self.show(HELP)
        elif chr(byte) == "c":
            self.in_monitor = not self.in_monitor
            self.show(f"\nmonitor (help: commands, C-a c: back)\n{PROMPT}" if self.in_monitor else "\nconsole\n")


class Console:
    """The thread that reads the terminal. `receive` takes bytes for the serial port and says how many fit.

    A file or pipe as input is passed to the guest as it is; its end changes nothing. A terminal that is hung up ends
    the machine.
    """

    def __init__(
        self,
        receive: Callable[[bytes], int],
        monitor: Callable[[str], str],
        quit: Callable[[], object],
        in_fd: int = 0,
        out_fd: int = 1,
    ) -> None:
        self.receive = receive
        self.quit = quit
        self.in_fd = in_fd
        self.out_fd = out_fd
        self._terminal = RawTerminal(in_fd)
        self._keyboard = Keyboard(self._type, monitor, self._show, quit, escapes=os.isatty(in_fd))
        self._typed = bytearray()
        self._thread = threading.Thread(target=self._run, name="pyvirtio console", daemon=True)

    def __enter__(self) -> Self:
        self._closing, self._close = os.pipe2(os.O_CLOEXEC)
        self._terminal.__enter__()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._close)
        self._thread.join()
        os.close(self._closing)
        self._terminal.__exit__()

    def _run(self) -> None:
        reading = True
        while True:
            # The serial port's FIFO has 64 bytes: stop reading while the guest has not taken them.
            inputs = [self.in_fd] if reading and not self._typed else []
            readable, _, _ = select.select([self._closing, *inputs], [], [], RETRY_SECONDS if self._typed else None)
            if self._closing in readable:
                return
            if readable:
                reading = self._read()
            self._deliver()

    def _read(self) -> bool:
        """Whether there may be more to read."""
        try:
            data = os.read(self.in_fd, 4096)
        except OSError:  # EIO: the terminal is gone
            data = b""
        try:
            self._keyboard.feed(data)
        except Exception:  # of the monitor; the keys that end the machine must go on working
            log.exception("monitor")
        if not data and self._keyboard.escapes:
            self.quit()
        return bool(data)

    def _type(self, data: bytes) -> None:
        self._typed += data

    def _deliver(self) -> None:
        if self._typed:
            del self._typed[: self.receive(bytes(self._typed))]

    def _show(self, text: str) -> None:
        with suppress(OSError):  # as above
            os.write(self.out_fd, text.encode())
