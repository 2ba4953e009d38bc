"""Block backends: what a disk can do, said by the methods its class defines."""

import fcntl
import os
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import ClassVar

from pyvirtio._core import NullIo
from pyvirtio.errors import ConfigError
from pyvirtio.spec import SECTOR


class BlockBackend:
    """A disk. What a class defines is what the guest is offered; there are no flags to keep true.

    Methods are named and ordered like `os.pread`; `length` and `offset` are bytes, multiples of 512 and inside
    the capacity:

    - `pread(length, offset) -> bytes`, or `preadv(buffers, offset)` to fill the guest's own buffers;
    - `pwrite(data, offset)`, or `pwritev(buffers, offset)`; with neither, the disk is read-only;
    - `flush()`: what was written is durable on return;
    - `discard(length, offset)`, `write_zeroes(length, offset)`.

    `preadv` and the writes return None or the number of bytes. Less than was asked for fails the request, as an
    `OSError` does, and nothing more.

    A backend with a `fileno()` is a raw file: the core does its I/O without Python, and can do all of the above.

    `buffers` are memoryviews of guest memory, valid until the method returns. Methods run on the device's I/O thread.
    """

    named_by: ClassVar[str] = "a --drive"
    capacity: int
    """Size in bytes, a multiple of 512."""
    block_size: int = SECTOR
    """Smallest unit that is written well: a power of two, 512 or more."""

    def offers(self, *methods: str) -> bool:
        """Whether the class defines one of the methods."""
        return any(hasattr(self, name) for name in methods)

    def native(self) -> int | NullIo | None:
        """What the core does the I/O with, without Python; None where the methods of the class do it."""
        fileno: Callable[[], int] | None = getattr(self, "fileno", None)
        return fileno() if fileno else None

    @property
    def readonly(self) -> bool:
        return not self.offers("pwrite", "pwritev")

    def close(self) -> None:
        """Release what the backend holds of the host."""


class File(BlockBackend):
    """A raw image or a block device. The core does its I/O without Python; the methods are for those who wrap it.

    Locked while open (`flock`): shared if read-only, else exclusive, so that no two machines write one image.
    """

    def __init__(self, path: str | os.PathLike[str], *, readonly: bool = False) -> None:
        self.path = Path(path)
        self._readonly = readonly
        try:
            self._fd = os.open(self.path, (os.O_RDONLY if readonly else os.O_RDWR) | os.O_CLOEXEC)
        except OSError as error:
            raise ConfigError(_why(self.path, error, readonly)) from error
        try:
            self.capacity = self._checked_size()
            self._lock()
        except BaseException:
            os.close(self._fd)
            raise

    def _checked_size(self) -> int:
        mode = os.fstat(self._fd).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            raise ConfigError(f"{self.path}: neither a file nor a block device")
        size = os.lseek(self._fd, 0, os.SEEK_END)
        if size < SECTOR or size % SECTOR:
            raise ConfigError(
                f"{self.path}: {size} bytes; an image is at least one sector and whole sectors of {SECTOR} bytes"
            )
        return size

    def _lock(self) -> None:
        kind = fcntl.LOCK_SH if self._readonly else fcntl.LOCK_EX
        try:
            fcntl.flock(self._fd, kind | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"{self.path}: in use by another machine or drive (it holds the lock)") from error
        except OSError:
            pass  # a file system without locks

    @property
    def readonly(self) -> bool:
        return self._readonly

    def fileno(self) -> int:
        return self._fd

    def pread(self, length: int, offset: int) -> bytes:
        return os.pread(self._fd, length, offset)

    def pwrite(self, data: bytes, offset: int) -> None:
        while data:
            written = os.pwrite(self._fd, data, offset)
            data, offset = data[written:], offset + written

    def flush(self) -> None:
        os.fdatasync(self._fd)

    def close(self) -> None:
        if self._fd >= 0:
            # A plane may still hold a duplicate, which shares the lock.
            with suppress(OSError):
                fcntl.flock(self._fd, fcntl.LOCK_UN)
            os.close(self._fd)
            self._fd = -1


def _why(path: Path, error: OSError, readonly: bool) -> str:
    if isinstance(error, IsADirectoryError):
        return f"{path}: a directory, not a disk image"
    hint = "" if readonly or not isinstance(error, PermissionError) else " for writing (readonly=on may do)"
    return f"{path}: {error.strerror}{hint}"


class Memory(BlockBackend):
    """A RAM disk of `capacity` bytes, zero at first."""

    def __init__(self, capacity: int) -> None:
        if capacity < SECTOR or capacity % SECTOR:
            raise ConfigError(f"Memory: {capacity} bytes; a disk is whole sectors of {SECTOR} bytes, at least one")
        self.capacity = capacity
        self.data = bytearray(capacity)

    def preadv(self, buffers: list[memoryview], offset: int) -> None:
        for buffer in buffers:
            buffer[:] = self.data[offset : offset + len(buffer)]
            offset += len(buffer)

    def pwritev(self, buffers: list[memoryview], offset: int) -> None:
        for buffer in buffers:
            self.data[offset : offset + len(buffer)] = buffer
            offset += len(buffer)

    def flush(self) -> None:
        """RAM is as durable as it gets."""

    def write_zeroes(self, length: int, offset: int) -> None:
        self.data[offset : offset + length] = bytes(length)

    discard = write_zeroes


class Null(BlockBackend):
    """A disk that does nothing, as QEMU's null-co: for measuring what everything around a disk costs."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity

    def native(self) -> NullIo:
        return NullIo()

    @property
    def readonly(self) -> bool:
        return False
