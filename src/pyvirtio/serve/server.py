"""Serves one device on one socket: front-ends come and go, one at a time."""

import errno
import logging
import os
import select
import socket
import stat
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

from pyvirtio.dataplane import IoThread, declared_queues, owed
from pyvirtio.device import Device
from pyvirtio.errors import ConfigError
from pyvirtio.serve.backend import MAX_VRINGS
from pyvirtio.serve.vhost_user import SPLIT_RINGS, Rings, Session

log = logging.getLogger("pyvirtio")


def listen(path: Path) -> socket.socket:
    """A socket that listens at `path`; one that nobody listens at any more is replaced."""
    listener = socket.socket(socket.AF_UNIX)
    try:
        _remove_stale(path)
        listener.bind(str(path))
        listener.listen()
    except OSError as error:
        listener.close()
        raise ConfigError(f"{path}: {error.strerror or error}") from error
    except ConfigError:
        listener.close()
        raise
    return listener


def _remove_stale(path: Path) -> None:
    with suppress(FileNotFoundError):
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise ConfigError(f"{path}: there is a file that is no socket")
        with socket.socket(socket.AF_UNIX) as probe:
            probe.setblocking(False)
            if probe.connect_ex(str(path)) != errno.ECONNREFUSED:
                raise ConfigError(f"{path}: in use: somebody listens there")
        path.unlink()


def inherited(fd: int) -> socket.socket:
    """A socket that was open when the process started, listening or connected; the fd is ours from here on."""
    try:
        return socket.socket(fileno=fd)
    except (OSError, ValueError) as error:
        raise ConfigError(f"fd={fd}: {getattr(error, 'strerror', None) or error}") from error


class Server:
    """Serves `device` to whoever connects to `sock`, which it owns; on a connected one, to that front-end only.

    A further front-end is turned away while one is connected. `start` returns at once; `on_end` is called, on a thread
    of the server, when the front-end of a connected socket has gone.
    """

    def __init__(
        self,
        device: Device,
        name: str,
        sock: socket.socket,
        iothreads: Sequence[IoThread],
        on_end: Callable[[], object] = lambda: None,
        *,
        rings: Rings = SPLIT_RINGS,
    ) -> None:
        device.name = name
        declared_queues(device, MAX_VRINGS)
        self.device = device
        self.iothreads = iothreads
        self.rings = rings
        self.sock = sock
        self.listens = bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
        self.on_end = on_end
        self._wake = os.eventfd(0)
        self._session: Session | None = None
        self._serving: threading.Thread | None = None
        self._thread = threading.Thread(target=self._run, name=f"pyvirtio {name}", daemon=True)

    def start(self) -> Self:
        self._thread.start()
        return self

    @property
    def broken(self) -> str | None:
        """Why the device serves its front-end no more, if it does not."""
        session = self._session
        return session.backend.state.broken if session else None

    def owed(self, index: int) -> str:
        """What the device owes its front-end of a queue, in words; "" for nothing."""
        session = self._session
        return owed(session.backend.vrings[index].vq) if session else ""

    def close(self) -> None:
        """Hang up and stop. The device stays open."""
        os.eventfd_write(self._wake, 1)
        if self._thread.ident is not None:
            self._thread.join()
        if session := self._session:
            session.hang_up()
        self._join()
        self.sock.close()
        os.close(self._wake)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self) -> None:
        if not self.listens:
            self._begin(self.sock.dup())
            return
        self.sock.setblocking(False)
        while not self._woken(self.sock.fileno()):
            with suppress(BlockingIOError):
                self._accept()

    def _woken(self, *fds: int, timeout: float | None = None) -> bool:
        """Wait for one of the fds, for `timeout` seconds; whether `close` was called."""
        poll = select.poll()
        for fd in (self._wake, *fds):
            poll.register(fd, select.POLLIN)
        return self._wake in dict(poll.poll(None if timeout is None else timeout * 1000))

    def _accept(self) -> None:
        try:
            connection, _ = self.sock.accept()
        except BlockingIOError:
            raise
        except OSError as error:
            log.error("%s: %s", self.device.name, error.strerror)
            self._woken(timeout=0.1)
            return
        if self._busy():
            log.warning("%s: a second front-end was turned away", self.device.name)
            connection.close()
        else:
            self._begin(connection)

    def _busy(self) -> bool:
        """Whether a front-end is connected. One that has hung up is seen off first."""
        if session := self._session:
            poll = select.poll()
            with suppress(OSError, ValueError):  # closed meanwhile
                poll.register(session.connection, select.POLLRDHUP)
                if not poll.poll(0):
                    return True
            session.hang_up()  # it may still be there, and not read the reply that the session wants to send
        self._join()
        return False

    def _begin(self, connection: socket.socket) -> None:
        connection.setblocking(True)  # an inherited one may be either
        self._session = Session(self.device, connection, self.iothreads, self.rings)
        self._serving = threading.Thread(
            target=self._serve, args=(self._session,), name=f"{self._thread.name} session", daemon=True
        )
        self._serving.start()

    def _serve(self, session: Session) -> None:
        log.info("%s: front-end connected", self.device.name)
        try:
            session.run()
        finally:
            session.close()
            self._session = None  # what it keeps open goes with it
            log.info("%s: front-end gone", self.device.name)
            if not self.listens:
                self.on_end()

    def _join(self) -> None:
        if self._serving:
            self._serving.join()
            self._serving = None
