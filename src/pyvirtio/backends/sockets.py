"""Networks over sockets, framed as QEMU's `-netdev stream` and `-netdev dgram` do."""

import logging
import os
import socket
import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Annotated, Any, Literal

from pyvirtio.backends.net import NetBackend
from pyvirtio.errors import ConfigError
from pyvirtio.properties import Range

Kind = Literal["unix", "inet"]
Port = Annotated[int | None, "for inet: port", Range(1, 65535)]
RETRY_SECONDS = 0.5
MAX_PATH = 107
"""Bytes of a Unix socket's path (unix(7))."""

log = logging.getLogger("pyvirtio")


class Stream(NetBackend):
    """A connection: a 4-byte length, big-endian, before each frame. Also to passt or another machine's stream.

    As server it waits for its one peer before the machine starts.
    """

    framing = "stream"

    def __init__(
        self,
        *,
        addr__type: Annotated[Kind, "what kind of socket"],
        addr__path: Annotated[Path | None, "for unix: its path"] = None,
        addr__host: Annotated[str, "for inet: host"] = "",
        addr__port: Port = None,
        server: Annotated[bool, "wait for the connection instead of making it"] = False,
    ) -> None:
        family, address = _address("addr", addr__type, addr__path, addr__host, addr__port, socket.SOCK_STREAM)
        self._shown = f"stream {_shown(address)}"
        connection = _accepted(family, address) if server else _connected(family, address)
        connection.setblocking(False)
        self.fds = [connection.detach()]

    def __str__(self) -> str:
        return self._shown

    def close(self) -> None:
        fds, self.fds = self.fds, []
        for fd in fds:
            os.close(fd)


class Dgram(NetBackend):
    """A frame in each datagram, between two addresses. The peer may come later, and go and come back."""

    framing = "datagram"

    def __init__(
        self,
        *,
        local__type: Annotated[Kind, "what kind of socket"],
        local__path: Annotated[Path | None, "for unix: our path, which must not exist"] = None,
        local__host: Annotated[str, "for inet: our host"] = "",
        local__port: Port = None,
        remote__type: Annotated[Kind, "the same kind"],
        remote__path: Annotated[Path | None, "for unix: the path of the peer"] = None,
        remote__host: Annotated[str, "for inet: the host of the peer"] = "",
        remote__port: Port = None,
    ) -> None:
        if local__type != remote__type:
            raise ConfigError(f"remote.type={remote__type}: not the same as local.type={local__type}")
        local = _address("local", local__type, local__path, local__host, local__port, socket.SOCK_DGRAM)
        remote = _address("remote", remote__type, remote__path, remote__host, remote__port, socket.SOCK_DGRAM)
        if remote[0] != local[0]:
            raise ConfigError(f"remote.host={remote__host}: not of the same address family as local.host={local__host}")
        self._path = local__path if local__type == "unix" else None
        self._remote = remote[1]
        self._socket = _bound(*local, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        self.fds = [self._socket.fileno()]
        self._closing = threading.Event()
        self._connecting = threading.Thread(target=self._keep_connected, name="pyvirtio dgram", daemon=True)
        self._connecting.start()

    def __str__(self) -> str:
        return f"dgram {_shown(self._remote)}"

    def close(self) -> None:
        if self.fds:
            self._closing.set()
            self._connecting.join()
            self.fds = []
            self._socket.close()
            if self._path is not None:
                self._path.unlink(missing_ok=True)

    def _keep_connected(self) -> None:
        """A unix socket has a peer only while that has its path, and loses it with the first frame sent in vain."""
        while True:
            try:
                self._socket.getpeername()
            except OSError:
                with suppress(OSError):
                    self._socket.connect(self._remote)
            if self._closing.wait(RETRY_SECONDS):
                return


def _address(
    prefix: str, kind: Kind, path: Path | None, host: str, port: int | None, socktype: socket.SocketKind
) -> tuple[socket.AddressFamily, Any]:
    """The family and the address of a socket that `PREFIX.type=`, `.path=`, `.host=` and `.port=` describe."""
    if kind == "unix":
        if host or port is not None:
            raise ConfigError(f"{prefix}.host and {prefix}.port are not allowed with {prefix}.type=unix")
        if path is None:
            raise ConfigError(f"{prefix}.path is required with {prefix}.type=unix")
        if len(os.fsencode(path)) > MAX_PATH:
            raise ConfigError(f"{prefix}.path={path}: {len(os.fsencode(path))} bytes, at most {MAX_PATH} are allowed")
        return socket.AF_UNIX, str(path)
    if path is not None:
        raise ConfigError(f"{prefix}.path is not allowed with {prefix}.type=inet")
    if not host or port is None:
        raise ConfigError(f"{prefix}.host and {prefix}.port are required with {prefix}.type=inet")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socktype)[0]
    except OSError as error:
        raise ConfigError(f"{prefix}.host={host}: {error.strerror}") from None
    return family, address


def _connected(family: socket.AddressFamily, address: Any) -> socket.socket:
    return _opened(family, socket.SOCK_STREAM, address, socket.socket.connect)


def _bound(family: socket.AddressFamily, address: Any, kind: socket.SocketKind) -> socket.socket:
    return _opened(family, kind, address, socket.socket.bind)


def _accepted(family: socket.AddressFamily, address: Any) -> socket.socket:
    """The one connection of a server, whose socket is gone when this returns."""
    with _bound(family, address, socket.SOCK_STREAM) as listener, ExitStack() as undo:
        if family == socket.AF_UNIX:
            undo.callback(os.unlink, address)
        listener.listen(1)
        log.warning("waiting for a connection to %s", _shown(address))
        return listener.accept()[0]


def _opened(
    family: socket.AddressFamily,
    kind: socket.SocketKind,
    address: Any,
    use: Callable[[socket.socket, Any], object],
) -> socket.socket:
    with ExitStack() as undo:
        made = undo.enter_context(socket.socket(family, kind))
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            use(made, address)
        except OSError as error:
            raise ConfigError(f"{_shown(address)}: {error.strerror or error}") from None
        undo.pop_all()
        return made


def _shown(address: Any) -> str:
    return address if isinstance(address, str) else f"{address[0]}:{address[1]}"
