"""A client on the socket of an NBD server: it negotiates here, and the core sends the requests."""

import socket
import struct
from contextlib import suppress
from pathlib import Path
from typing import Self

from pyvirtio._core import NbdLoad
from pyvirtio.bench.driver import usage
from pyvirtio.bench.load import DiskLoad, DiskSample, measured
from pyvirtio.errors import ConfigError, ProtocolError

MAGIC = b"NBDMAGICIHAVEOPT"
NO_ZEROES = 2
FIXED_NEWSTYLE_NO_ZEROES = 3
OPT_GO = 7
REPLY_MAGIC = 0x3E889045565A9
REP_ACK, REP_INFO, INFO_EXPORT = 1, 3, 0
GREETING = struct.Struct(">16sH")
REPLY = struct.Struct(">QIII")
HANG = 10.0


class NbdTarget:
    """The default export of the server at `path`, for loads without verification; `pid` is the server's process."""

    def __init__(self, path: Path, load: DiskLoad, pid: int) -> None:
        self.load, self.pid, self.path = load, pid, path
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._socket.settimeout(HANG)
            self._socket.connect(str(path))
            size = self._negotiate()
            self._socket.settimeout(None)
            blocks = min(size, load.size) // load.block_size
            self._client = NbdLoad(self._socket.fileno(), block_size=load.block_size, blocks=blocks)
        except OSError as error:
            self._socket.close()
            raise ConfigError(f"{path}: {error.strerror or error}") from error
        except BaseException:
            self._socket.close()
            raise

    def measure(self, iodepth: int, seconds: float, round_: int = 0) -> DiskSample:
        """Load the disk for some seconds, after a moment that does not count."""
        return measured(self._client.run, self.load, iodepth, seconds, round_, lambda: usage({self.pid}))

    def check(self) -> None:
        """There is nothing to be checked: without verification."""

    @property
    def pids(self) -> set[int]:
        return {self.pid}

    def close(self) -> None:
        with suppress(OSError):  # it may have been faster
            self._socket.shutdown(socket.SHUT_RDWR)  # the core has a duplicate
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _negotiate(self) -> int:
        """The size of the export, from which on requests are expected."""
        magic, flags = GREETING.unpack(self._read(GREETING.size))
        if magic != MAGIC or not flags & NO_ZEROES:
            raise ProtocolError(f"{self.path}: no NBD server of today")
        name = struct.pack(">IH", 0, 0)
        self._socket.sendall(struct.pack(">I", FIXED_NEWSTYLE_NO_ZEROES))
        self._socket.sendall(struct.pack(">8sII", MAGIC[8:], OPT_GO, len(name)) + name)
        size = 0
        while True:
            magic, option, kind, length = REPLY.unpack(self._read(REPLY.size))
            data = self._read(length)
            if magic != REPLY_MAGIC or option != OPT_GO or kind not in (REP_ACK, REP_INFO):
                raise ProtocolError(f"{self.path}: the NBD server refuses its default export ({kind:#x})")
            if kind == REP_ACK:
                return size
            if struct.unpack_from(">H", data)[0] == INFO_EXPORT:
                (size,) = struct.unpack_from(">Q", data, 2)

    def _read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            piece = self._socket.recv(size - len(data))
            if not piece:
                raise ProtocolError(f"{self.path}: the NBD server hung up")
            data += piece
        return data
