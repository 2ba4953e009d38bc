"""A disk on an NBD server: the fixed newstyle handshake and simple replies of the NBD protocol."""

import errno
import os
import re
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from threading import Lock
from time import monotonic
from typing import Annotated
from urllib.parse import parse_qs, unquote, urlsplit

from pyvirtio.backends.block import BlockBackend
from pyvirtio.errors import ConfigError
from pyvirtio.spec import SECTOR

PORT = 10809
TIMEOUT = 30.0
"""Seconds that a server may take for one answer."""
PATIENCE = 1.0
"""Seconds between two attempts to connect again."""
MAX_PAYLOAD = 32 << 20
"""What a server takes at once unless it says otherwise."""

MAGIC = struct.Struct(">8s8sH")
INIT_MAGIC, OPTION_MAGIC, REPLY_MAGIC = b"NBDMAGIC", b"IHAVEOPT", 0x3E889045565A9
FIXED_NEWSTYLE = NO_ZEROES = 1
CLIENT_FLAGS = 1 | 2
OPTION, OPTION_REPLY = struct.Struct(">8sII"), struct.Struct(">QIII")
EXPORT_NAME, GO = 1, 7
ACK, INFO = 1, 3
INFO_EXPORT, INFO_BLOCK_SIZE = 0, 3
ERROR = 1 << 31
UNSUPPORTED = ERROR + 1
MAX_OPTION_REPLY = 1 << 16

REQUEST, REPLY = struct.Struct(">IHHQQI"), struct.Struct(">IIQ")
REQUEST_MAGIC, SIMPLE_MAGIC = 0x25609513, 0x67446698
READ, WRITE, DISCONNECT, FLUSH, TRIM, WRITE_ZEROES = 0, 1, 2, 3, 4, 6
READ_ONLY, SEND_FLUSH, SEND_TRIM, SEND_WRITE_ZEROES = 2, 4, 32, 64


@dataclass(frozen=True)
class Address:
    """Where a server listens, a path or a host and its port, and which of its exports is meant."""

    where: str | tuple[str, int]
    export: str = ""

    @classmethod
    def parse(cls, text: str) -> "Address":
        """`nbd://HOST[:PORT]/EXPORT`, `nbd+unix:///EXPORT?socket=PATH`, or QEMU's `nbd:unix:PATH`, `nbd:HOST:PORT`."""
        if match := re.fullmatch(r"nbd:(?:unix:(.+?)|([^:/]+):(\d+))(?::exportname=(.*))?", text):
            path, host, port, export = match.groups()
            return cls(path or (host, int(port)), export or "")
        parts = urlsplit(text)
        export = unquote(parts.path[1:])
        if parts.scheme == "nbd+unix" and (paths := parse_qs(parts.query).get("socket")):
            return cls(paths[0], export)
        try:
            if parts.scheme == "nbd" and parts.hostname:
                return cls((parts.hostname, parts.port or PORT), export)
        except ValueError:
            pass  # a port that is none
        raise ConfigError(
            f"{text}: an NBD server is nbd://HOST[:PORT]/EXPORT, nbd+unix:///EXPORT?socket=PATH or nbd:unix:PATH"
        )

    def connect(self) -> socket.socket:
        if isinstance(self.where, str):
            connection = socket.socket(socket.AF_UNIX)
            try:
                connection.settimeout(TIMEOUT)
                connection.connect(self.where)
            except BaseException:
                connection.close()
                raise
            return connection
        connection = socket.create_connection(self.where, TIMEOUT)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection


class Connection:
    """One connection to an export. Not thread-safe; whatever fails raises `OSError`, after which it is of no use."""

    def __init__(self, address: Address) -> None:
        self.size, self.flags, self.most, self.block_size = 0, 0, MAX_PAYLOAD, SECTOR
        self._cookie = 0
        self._socket = address.connect()
        try:
            self._negotiate(address.export)
        except BaseException:
            self._socket.close()
            raise

    def _negotiate(self, export: str) -> None:
        init, option, flags = MAGIC.unpack(self._receive(MAGIC.size))
        if (init, option) != (INIT_MAGIC, OPTION_MAGIC) or not flags & FIXED_NEWSTYLE:
            raise _protocol("the server does not speak the fixed newstyle handshake of NBD")
        self._socket.sendall(struct.pack(">I", flags & CLIENT_FLAGS))
        name = export.encode()
        wanted = struct.pack(">HH", 1, INFO_BLOCK_SIZE)
        self._send_option(GO, struct.pack(">I", len(name)) + name + wanted)
        if not self._go(export):
            self._send_option(EXPORT_NAME, name)
            self.size, self.flags = struct.unpack(">QH", self._receive(10))
            if not flags & CLIENT_FLAGS & 2:
                self._receive(124)

    def _send_option(self, option: int, data: bytes) -> None:
        self._socket.sendall(OPTION.pack(OPTION_MAGIC, option, len(data)) + data)

    def _go(self, export: str) -> bool:
        """The answers to NBD_OPT_GO; false for a server that does not know it."""
        while True:
            magic, _, kind, length = OPTION_REPLY.unpack(self._receive(OPTION_REPLY.size))
            if magic != REPLY_MAGIC or length > MAX_OPTION_REPLY:
                raise _protocol(f"a reply of {length} bytes to an option")
            data = self._receive(length)
            if kind == ACK:
                return True
            if kind == UNSUPPORTED:
                return False
            if kind & ERROR:
                reason = data.decode(errors="replace") or f"error {kind & ~ERROR}"
                raise OSError(errno.ENOENT, f"the server refuses export {export!r}: {reason}")
            if kind == INFO:
                self._inform(data)

    def _inform(self, data: bytes) -> None:
        what = int.from_bytes(data[:2])
        if what == INFO_EXPORT and len(data) == 12:
            self.size, self.flags = struct.unpack(">QH", data[2:])
        elif what == INFO_BLOCK_SIZE and len(data) == 14:
            least, _, most = struct.unpack(">III", data[2:])
            self.block_size = max(SECTOR, least)
            self.most = min(MAX_PAYLOAD, max(most, self.block_size))

    def request(self, command: int, length: int, offset: int, data: bytes = b"") -> bytes:
        """Do one command; return what a read gives."""
        self._cookie += 1
        head = REQUEST.pack(REQUEST_MAGIC, 0, command, self._cookie, offset, length)
        self._socket.sendall(head + data)
        magic, code, cookie = REPLY.unpack(self._receive(REPLY.size))
        if (magic, cookie) != (SIMPLE_MAGIC, self._cookie):
            raise _protocol("an answer to no question")
        if code:
            raise Refusal(code, os.strerror(code))
        return self._receive(length) if command == READ else b""

    def _receive(self, length: int) -> bytes:
        data = bytearray(length)
        view, done = memoryview(data), 0
        while done < length:
            if not (got := self._socket.recv_into(view[done:])):
                raise ConnectionResetError(errno.ECONNRESET, "the NBD server closed the connection")
            done += got
        return bytes(data)

    def close(self) -> None:
        """Tell the server, as far as it still listens."""
        try:
            self._socket.sendall(REQUEST.pack(REQUEST_MAGIC, 0, DISCONNECT, 0, 0, 0))
        except OSError:
            pass
        finally:
            self._socket.close()


class Refusal(OSError):
    """The server answered a request with an error; the connection is as good as before."""


def _protocol(what: str) -> OSError:
    return OSError(errno.EPROTO, what)


class Nbd(BlockBackend):
    """An export of an NBD server (qemu-nbd, nbdkit, ...), one request at a time.

    A connection that breaks fails its request; the next one connects again. What was written before and not flushed
    may be lost with the server, so the next flush fails too.
    """

    def __init__(
        self,
        uri: Annotated[str, "nbd://HOST[:PORT]/EXPORT, nbd+unix:///EXPORT?socket=PATH or nbd:unix:PATH"],
        *,
        readonly: Annotated[bool, "never write, even if the server would"] = False,
    ) -> None:
        self.path = uri
        self._address = Address.parse(uri)
        self._lock = Lock()
        self._written = self._lost = False
        self._next_attempt = 0.0
        try:
            self._connection: Connection | None = Connection(self._address)
        except OSError as error:
            raise ConfigError(f"{uri}: {error.strerror or error}") from error
        self._take(self._connection, readonly)

    def _take(self, connection: Connection, readonly: bool) -> None:
        if connection.size < SECTOR or connection.size % SECTOR:
            connection.close()
            raise ConfigError(f"{self.path}: {connection.size} bytes; a disk is whole sectors of {SECTOR} bytes")
        self.capacity, self.block_size, self.flags = connection.size, connection.block_size, connection.flags
        self._readonly = readonly or bool(self.flags & READ_ONLY)
        for flag, name in ((SEND_FLUSH, "flush"), (SEND_TRIM, "discard"), (SEND_WRITE_ZEROES, "write_zeroes")):
            if self.flags & flag:
                setattr(self, name, getattr(self, f"_{name}"))

    @property
    def readonly(self) -> bool:
        return self._readonly

    def pread(self, length: int, offset: int) -> bytes:
        return b"".join(self._request(READ, size, at) for size, at in self._pieces(length, offset))

    def pwrite(self, data: bytes, offset: int) -> None:
        for size, at in self._pieces(len(data), offset):
            self._request(WRITE, size, at, data[at - offset : at - offset + size])

    def _flush(self) -> None:
        self._request(FLUSH, 0, 0)

    def _discard(self, length: int, offset: int) -> None:
        self._request(TRIM, length, offset)

    def _write_zeroes(self, length: int, offset: int) -> None:
        self._request(WRITE_ZEROES, length, offset)

    def _pieces(self, length: int, offset: int) -> Iterator[tuple[int, int]]:
        most = self._connection.most if self._connection else MAX_PAYLOAD
        for at in range(offset, offset + length, most):
            yield min(most, offset + length - at), at

    def _request(self, command: int, length: int, offset: int, data: bytes = b"") -> bytes:
        with self._lock:
            connection = self._connected()
            if command == FLUSH and self._lost:
                self._lost = False
                raise OSError(errno.EIO, "the connection broke after writes that were not flushed")
            try:
                answer = connection.request(command, length, offset, data)
            except Refusal:
                raise
            except OSError:
                self._lost |= self._written or command in (WRITE, WRITE_ZEROES)
                self._connection = None
                connection.close()
                raise
            self._written = command != FLUSH and (self._written or command in (WRITE, WRITE_ZEROES))
            return answer

    def _connected(self) -> Connection:
        if self._connection is None:
            if monotonic() < self._next_attempt:
                raise OSError(errno.ENOTCONN, f"{self.path}: not connected")
            self._next_attempt = monotonic() + PATIENCE
            connection = Connection(self._address)
            if connection.size != self.capacity:
                connection.close()
                raise OSError(errno.ENXIO, f"{self.path}: {connection.size} bytes now, {self.capacity} before")
            self._connection = connection
        return self._connection

    def close(self) -> None:
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None
            self._next_attempt = float("inf")
