"""Faults of a disk: errors by sector, torn writes, flipped bits. They sit in front of its backend."""

import errno
import os
from random import Random
from threading import Lock

from pyvirtio.backends.block import BlockBackend
from pyvirtio.errors import ConfigError
from pyvirtio.faults.engine import Fault, Faults, Part, Running, Undo
from pyvirtio.faults.ring import number
from pyvirtio.spec import SECTOR

LAST_SECTOR = (1 << 55) - 1


def wrap(running: Running, faults: Faults) -> Undo:
    """Put a `FaultyDisk` in front of the device's backend."""
    device = running.device
    if not hasattr(device, "serve_from"):
        raise ConfigError(f"{device.name}: {type(device).__name__} has no disk that could go wrong")
    disk_faults = [(fault, faults.chances(fault, "disk")) for fault in faults if isinstance(fault, DiskFault)]
    if not device.drive.offers("pread", "preadv"):
        raise ConfigError(f"{device.name}: {type(device.drive).__name__} holds no data that could go wrong")
    _serve_from(running, FaultyDisk(device.drive, disk_faults))
    return lambda: _serve_from(running, device.drive)


def _serve_from(running: Running, disk: BlockBackend) -> None:
    running.device.serve_from(disk)
    running.renew_handlers()


class FaultyDisk(BlockBackend):
    """A disk behind faults; it offers what `inner` offers, through Python also if that is a raw file."""

    def __init__(self, inner: BlockBackend, faults: list[tuple["DiskFault", Random]]) -> None:
        self.inner, self.faults = inner, faults
        self.capacity, self.block_size = inner.capacity, inner.block_size
        self._lock = Lock()
        if inner.offers("flush"):
            self.flush = inner.flush  # type: ignore[attr-defined]

    @property
    def readonly(self) -> bool:
        return self.inner.readonly

    def pread(self, length: int, offset: int) -> bytes:
        data = read(self.inner, length, offset)
        with self._lock:
            for fault, chances in self.faults:
                data = fault.reading(data, offset, chances)
        return data

    def pwrite(self, data: bytes, offset: int) -> None:
        with self._lock:
            for fault, chances in self.faults:
                data = fault.writing(data, offset, chances)
        if data:
            write(self.inner, data, offset)

    def discard(self, length: int, offset: int) -> None:
        """A hint, which a raw file behind us cannot take in Python."""
        if self.inner.offers("discard"):
            self.inner.discard(length, offset)  # type: ignore[attr-defined]

    def write_zeroes(self, length: int, offset: int) -> None:
        if self.inner.offers("write_zeroes"):
            self.inner.write_zeroes(length, offset)  # type: ignore[attr-defined]
        else:
            write(self.inner, bytes(length), offset)


def read(disk: BlockBackend, length: int, offset: int) -> bytes:
    """`length` bytes of any backend; `OSError` if it gives fewer."""
    if disk.offers("preadv"):
        data = bytearray(length)
        done = disk.preadv([memoryview(data)], offset)  # type: ignore[attr-defined]
        found = bytes(data) if done is None else bytes(data[:done])
    else:
        found = disk.pread(length, offset)  # type: ignore[attr-defined]
    if len(found) < length:
        raise OSError(errno.EIO, f"{len(found)} of {length} bytes at {offset}")
    return found


def write(disk: BlockBackend, data: bytes, offset: int) -> None:
    """Write all of `data` to any backend; `OSError` if it takes less."""
    in_place = disk.offers("pwritev")
    done = disk.pwritev([memoryview(data)], offset) if in_place else disk.pwrite(data, offset)  # type: ignore[attr-defined]
    if done is not None and done < len(data):
        raise OSError(errno.EIO, f"{done} of {len(data)} bytes at {offset}")


class DiskFault(Fault):
    """A fault of a disk: it may change what is read or written, or fail the request with an `OSError`."""

    def part(self) -> Part:
        return wrap

    def reading(self, data: bytes, offset: int, chances: Random) -> bytes:
        return data

    def writing(self, data: bytes, offset: int, chances: Random) -> bytes:
        return data


class Error(DiskFault):
    """Requests that touch these sectors fail, for instance "100-200" or "7"; all unless it is given."""

    kind = "error"
    reads = writes = True

    def __init__(self, sectors: str | int = "", *, chance: float = 1.0) -> None:
        super().__init__(chance=chance)
        first, dash, last = str(sectors).partition("-")
        self.first = number(first or 0, "sector", 0, LAST_SECTOR)
        self.last = number(last or (first if not dash and first else LAST_SECTOR), "sector", self.first, LAST_SECTOR)

    @property
    def value(self) -> str | None:
        if (self.first, self.last) == (0, LAST_SECTOR):
            return None
        return f"{self.first}-{self.last}" if self.last > self.first else str(self.first)

    def reading(self, data: bytes, offset: int, chances: Random) -> bytes:
        return self._fail(data, offset, chances) if self.reads else data

    def writing(self, data: bytes, offset: int, chances: Random) -> bytes:
        return self._fail(data, offset, chances) if self.writes else data

    def _fail(self, data: bytes, offset: int, chances: Random) -> bytes:
        touched = self.first * SECTOR < offset + len(data) and offset < (self.last + 1) * SECTOR
        if touched and self.hit(chances):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return data


class ReadError(Error):
    """Reads that touch these sectors fail."""

    kind = "read-error"
    writes = False


class WriteError(Error):
    """Writes that touch these sectors fail."""

    kind = "write-error"
    reads = False


class Torn(DiskFault):
    """A write stores only its first sectors, some or none, and reports that it stored all."""

    kind = "torn"

    def writing(self, data: bytes, offset: int, chances: Random) -> bytes:
        if not self.hit(chances):
            return data
        return data[: SECTOR * chances.randrange(max(1, len(data) // SECTOR))]


class Flip(DiskFault):
    """One bit of what is read is wrong."""

    kind = "flip"

    def reading(self, data: bytes, offset: int, chances: Random) -> bytes:
        if not data or not self.hit(chances):
            return data
        flipped = bytearray(data)
        bit = chances.randrange(8 * len(data))
        flipped[bit // 8] ^= 1 << bit % 8
        return bytes(flipped)
