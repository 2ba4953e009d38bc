"""The requests of a block driver (virtio 1.3, 5.2.6)."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from enum import IntEnum

from pyvirtio.testing.queue import Buffer, Driver, Queue

SECTOR = 512


class Kind(IntEnum):
    """The type of a request."""

    READ = 0
    WRITE = 1
    FLUSH = 4
    GET_ID = 8
    DISCARD = 11
    WRITE_ZEROES = 13


class Verdict(IntEnum):
    """The status byte of a request."""

    OK = 0
    IOERR = 1
    UNSUPP = 2
    PENDING = 0xFF
    """What the driver leaves there."""


class Request:
    """One request under way."""

    def __init__(self, queue: Queue, readable: Sequence[bytes], room: Sequence[int]) -> None:
        self.buffer: Buffer = queue.add(readable, [*room, 1])
        self.room = sum(room)
        status, _ = self.buffer.writable[-1]
        queue.memory.write(status, bytes([Verdict.PENDING]))

    def wait(self) -> Verdict:
        """Sleep until the device is done; return its verdict."""
        self.buffer.wait()
        return Verdict(self.buffer.room[-1])

    @property
    def data(self) -> bytes:
        """The room before the status byte, as the device left it."""
        return self.buffer.room[: self.room]


class Disk:
    """A disk as its driver sees it: `read`, `write` and so on wait, and raise `OSError` unless the verdict is OK."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        queues = driver.requestq
        self.queues: list[Queue] = queues if isinstance(queues, list) else [queues]

    def submit(
        self,
        kind: int,
        sector: int = 0,
        data: bytes | Sequence[bytes] = b"",
        room: int | Sequence[int] = 0,
        *,
        queue: int = 0,
        kick: bool = True,
    ) -> Request:
        """Send a request; `data` follows its header, `room` is for what the device answers before the status."""
        parts = [data] if isinstance(data, (bytes, bytearray)) else data
        sizes = [room] if isinstance(room, int) else room
        request = Request(self.queues[queue], [struct.pack("<IIQ", kind, 0, sector), *parts], sizes)
        if kick:
            self.queues[queue].kick()
        return request

    def do(self, kind: int, sector: int = 0, data: bytes = b"", room: int = 0, *, queue: int = 0) -> bytes:
        request = self.submit(kind, sector, data, room, queue=queue)
        verdict = request.wait()
        if verdict is not Verdict.OK:
            raise OSError(f"{Kind(kind).name} at sector {sector}: {verdict.name}")
        return request.data

    def read(self, sector: int, length: int, *, queue: int = 0) -> bytes:
        return self.do(Kind.READ, sector, room=length, queue=queue)

    def write(self, sector: int, data: bytes, *, queue: int = 0) -> None:
        self.do(Kind.WRITE, sector, data, queue=queue)

    def flush(self) -> None:
        self.do(Kind.FLUSH)

    def get_id(self) -> str:
        return self.do(Kind.GET_ID, room=20).rstrip(b"\0").decode()

    def discard(self, sector: int, sectors: int, flags: int = 0) -> None:
        self.do(Kind.DISCARD, data=struct.pack("<QII", sector, sectors, flags))

    def write_zeroes(self, sector: int, sectors: int, flags: int = 0) -> None:
        self.do(Kind.WRITE_ZEROES, data=struct.pack("<QII", sector, sectors, flags))
