"""Character devices: where the bytes of a guest's port come from and go to, in QEMU's words. None ever blocks."""

import errno
import logging
import os
import signal
import socket
import sys
import tty
from contextlib import ExitStack, suppress
from pathlib import Path
from select import EPOLLET, EPOLLIN, EPOLLOUT, POLLHUP, epoll, poll
from threading import current_thread, main_thread
from types import FrameType
from typing import Annotated, Any, ClassVar

from pyvirtio._core import Timer
from pyvirtio.backends.terminal import RawTerminal, private, terminal_size
from pyvirtio.errors import ConfigError
from pyvirtio.properties import Range

STDIN, STDOUT = 0, 1
EVENTS = EPOLLIN | EPOLLOUT | EPOLLET
"""Edges: who does not want to read, or has nothing to write, is not called for it."""

log = logging.getLogger("pyvirtio")


class Chardev:
    """A stream of bytes in each direction. One port uses it, and serialises the calls.

    `fileno()` is readable when something changed: call `handle`, then read and write as far as that goes.
    """

    named_by: ClassVar[str] = "a --chardev"

    def __init__(self, name: str) -> None:
        self.name = name
        self.input: int | None = None
        self.output: int | None = None
        self._claimed = False
        self._epoll = epoll()
        self._closing = ExitStack()
        self._closing.callback(self._epoll.close)

    @property
    def connected(self) -> bool:
        """Whether anybody may be at the other end. What is written is discarded otherwise."""
        return True

    def claim(self) -> None:
        """A port takes it, and has it for itself."""
        if self._claimed:
            raise ConfigError(f"chardev {self.name} is in use by another port")
        self._claimed = True

    def fileno(self) -> int:
        return self._epoll.fileno()

    def handle(self) -> None:
        """Take note of what changed. Afterwards reading and writing are worth a try."""
        for fd, _ in self._epoll.poll(0):
            self.changed(fd)

    def changed(self, fd: int) -> None:
        """For those that have more file descriptors than `input` and `output`."""

    def read(self, most: int) -> bytes:
        """What has come, up to `most` bytes; nothing if nothing has."""
        if self.input is None:
            return b""
        try:
            data = os.read(self.input, most)
        except BlockingIOError:
            return b""
        except OSError:
            data = b""
        if not data:
            self.ended()
        return data

    def write(self, data: bytes) -> int:
        """How many bytes were taken; 0 until `handle` is due again."""
        if self.output is None:
            return len(data)
        try:
            return os.write(self.output, data)
        except BlockingIOError:
            return 0
        except OSError as error:
            self.failed(error)
            return len(data)

    def ended(self) -> None:
        """The input is at its end, or was hung up."""
        self.input = None

    def failed(self, error: OSError) -> None:
        """The output takes nothing more: from here on it is discarded."""
        log.warning("%s: %s", self.name, error.strerror)
        self.output = None

    @property
    def size(self) -> tuple[int, int] | None:
        """Columns and rows, if this is a terminal."""
        return None

    def close(self) -> None:
        """Give everything back; called once or more."""
        self.input = self.output = None
        self._closing.close()

    def watch(self, fd: int) -> int:
        with suppress(PermissionError):  # a regular file is always ready
            self._epoll.register(fd, EVENTS)
        return fd

    def own(self, fd: int) -> int:
        """Watch a file descriptor, and close it in the end."""
        self._closing.callback(os.close, fd)
        return self.watch(fd)


class Null(Chardev):
    """Nothing comes, and what goes is discarded."""

    def __init__(self, name: str = "null") -> None:
        super().__init__(name)


class Stdio(Chardev):
    """Standard input and output of this process; a terminal passes every key on until it is closed."""

    def __init__(
        self,
        name: str = "stdio",
        *,
        signal: Annotated[bool, "keys such as Ctrl-C send their signals, to end the machine"] = True,
    ) -> None:
        super().__init__(name)
        self.input = self.own(private(STDIN, os.O_RDONLY))
        self.output = self.own(private(STDOUT, os.O_WRONLY))
        self._closing.enter_context(RawTerminal(STDIN, signals=signal))
        self._resized = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.own(self._resized)
        if os.isatty(STDOUT) and current_thread() is main_thread():
            self._follow_size()

    def _follow_size(self) -> None:
        before = signal.signal(signal.SIGWINCH, self._on_resize)
        self._closing.callback(signal.signal, signal.SIGWINCH, before)

    def _on_resize(self, *_: int | FrameType | None) -> None:
        os.eventfd_write(self._resized, 1)

    @property
    def size(self) -> tuple[int, int] | None:
        return terminal_size(STDOUT)


class File(Chardev):
    """A file that gets what the guest sends, and perhaps another that it is sent."""

    def __init__(
        self,
        path: Annotated[Path, "the file that is written"],
        name: str = "file",
        *,
        append: Annotated[bool, "write behind what the file has, in place of replacing it"] = False,
        input_path: Annotated[Path | None, "a file that is read"] = None,
    ) -> None:
        super().__init__(name)
        with _closing_on_error(self):
            how = os.O_WRONLY | os.O_CREAT | (os.O_APPEND if append else os.O_TRUNC)
            self.output = self.own(_open(path, how))
            if input_path is not None:
                self.input = self.own(_open(input_path, os.O_RDONLY))


class Pty(Chardev):
    """A new pseudo-terminal, whose name is printed. Nobody is at the other end until somebody opens it."""

    LOOK_SECONDS = 1.0
    """How often it looks whether somebody has: the kernel tells only of the first byte."""

    def __init__(
        self,
        name: str = "pty",
        *,
        path: Annotated[Path | None, "a symbolic link to the terminal that is made, and removed in the end"] = None,
    ) -> None:
        super().__init__(name)
        with _closing_on_error(self):
            master, slave = os.openpty()
            tty.setraw(slave)
            self.terminal = os.ttyname(slave)
            os.close(slave)
            os.set_blocking(master, False)
            self.input = self.output = self.own(master)
            self._poll = poll()
            self._poll.register(master, 0)
            self._timer = Timer()
            self.watch(self._timer.fd)
            self._timer.start(self.LOOK_SECONDS)
            if path is not None:
                self._link(path)
        print(f"char device redirected to {self.terminal} (label {name})", file=sys.stderr, flush=True)

    def _link(self, path: Path) -> None:
        try:
            path.symlink_to(self.terminal)
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}") from error
        self._closing.callback(path.unlink, missing_ok=True)

    @property
    def connected(self) -> bool:
        return self.output is not None and not any(events & POLLHUP for _, events in self._poll.poll(0))

    def changed(self, fd: int) -> None:
        self._timer.take()
        if not self.connected:
            self._timer.start(self.LOOK_SECONDS)

    def write(self, data: bytes) -> int:
        return super().write(data) if self.connected else len(data)

    def ended(self) -> None:
        """Nobody has it open now. Somebody may again."""

    @property
    def size(self) -> tuple[int, int] | None:
        return terminal_size(self.output) if self.output is not None else None


class Socket(Chardev):
    """A connection over a Unix or TCP socket, with one peer at a time."""

    def __init__(
        self,
        name: str = "socket",
        *,
        path: Annotated[Path | None, "a Unix socket"] = None,
        host: Annotated[str, "of a TCP socket"] = "localhost",
        port: Annotated[int | None, "of a TCP socket", Range(1, 65535)] = None,
        server: Annotated[bool, "listen, one peer after the other, in place of connecting"] = False,
        wait: Annotated[bool, "with server: wait for the first peer before the machine starts"] = False,
        reconnect: Annotated[int, "seconds until a lost connection is tried anew; 0 = never", Range(0, 3600)] = 0,
    ) -> None:
        super().__init__(name)
        if (path is None) is (port is None):
            raise ConfigError("give where it is, either path=PATH or port=NUMBER")
        if wait and not server:
            raise ConfigError("wait=on is allowed with server=on only")
        if reconnect and server:
            raise ConfigError(f"reconnect={reconnect} is allowed with server=off only")
        self._address: Any = str(path) if path is not None else (host, port)
        self._family = socket.AF_UNIX if path is not None else socket.AF_INET
        self._peer: socket.socket | None = None
        self._connecting: socket.socket | None = None
        self._listener: socket.socket | None = None
        self._reconnect = reconnect
        self._timer = Timer()
        self.watch(self._timer.fd)
        with _closing_on_error(self):
            self._listen(wait) if server else self._connect()
        if not server and not self.connected and not reconnect:
            self.close()
            raise ConfigError(f"{self._where}: {self._why}")

    @property
    def connected(self) -> bool:
        return self._peer is not None

    @property
    def _where(self) -> str:
        return self._address if isinstance(self._address, str) else "{}:{}".format(*self._address)

    def _listen(self, wait: bool) -> None:
        listener = socket.socket(self._family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._closing.callback(listener.close)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(self._address)
            listener.listen(1)
        except OSError as error:
            raise ConfigError(f"{self._where}: {error.strerror or error}") from error
        if self._family is socket.AF_UNIX:
            self._closing.callback(Path(self._address).unlink, missing_ok=True)
        self._listener = listener
        if wait:
            print(f"waiting for connection on {self._where} ({self.name})", file=sys.stderr, flush=True)
            self._take(listener.accept()[0])
        listener.setblocking(False)
        self.watch(listener.fileno())
        self._accept()

    def _accept(self) -> None:
        """The next peer, if there is one and none now; those behind it wait."""
        if self._listener is not None and self._peer is None:
            with suppress(OSError):
                self._take(self._listener.accept()[0])

    _why = ""

    def _connect(self) -> None:
        peer = socket.socket(self._family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        peer.setblocking(not self._reconnect)  # which happens on an I/O thread
        try:
            peer.connect(self._address)
        except OSError as error:
            if error.errno == errno.EINPROGRESS:
                self._connecting = peer
                self.watch(peer.fileno())
                return
            peer.close()
            self._why = error.strerror or str(error)
            if self._reconnect:
                self._timer.start(self._reconnect)
        else:
            self._take(peer)

    def _answered(self, peer: socket.socket) -> None:
        """The other host has taken the connection, or not."""
        self._connecting = None
        self._epoll.unregister(peer.fileno())
        if peer.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            peer.close()
            self._timer.start(self._reconnect)
        else:
            self._take(peer)

    def _take(self, peer: socket.socket) -> None:
        peer.setblocking(False)
        self._peer = peer
        self.input = self.output = self.watch(peer.fileno())

    def changed(self, fd: int) -> None:
        if self._listener is not None and fd == self._listener.fileno():
            self._accept()
        elif self._connecting is not None and fd == self._connecting.fileno():
            self._answered(self._connecting)
        elif fd == self._timer.fd and self._timer.take() and self._peer is None:
            self._connect()

    def ended(self) -> None:
        """The peer is gone; what it did not read is lost."""
        self._drop()
        self._accept()
        if self._listener is None and self._reconnect:
            self._timer.start(self._reconnect)

    def failed(self, error: OSError) -> None:
        self.ended()

    def _drop(self) -> None:
        if self._peer is not None:
            self._peer.close()
        self._peer = None
        self.input = self.output = None

    def close(self) -> None:
        self._drop()
        if self._connecting is not None:
            self._connecting.close()
            self._connecting = None
        super().close()


CHARDEVS: dict[str, type[Chardev]] = {"file": File, "null": Null, "pty": Pty, "socket": Socket, "stdio": Stdio}
"""By the name that --chardev begins with."""


class _closing_on_error:
    """Closes a chardev that could not be made."""

    def __init__(self, chardev: Chardev) -> None:
        self.chardev = chardev

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.chardev.close()


def _open(path: Path, how: int) -> int:
    try:
        return os.open(path, how | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC, 0o666)
    except OSError as error:
        reason = "a pipe that nobody reads" if error.errno == errno.ENXIO else error.strerror
        raise ConfigError(f"{path}: {reason}") from error
