"""Block backends: what a disk can do, said by the methods its class defines."""

import errno
import fcntl
import logging
import mmap
import os
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, ClassVar

from pyvirtio._core import FileIo, NullIo, io_uring_missing
from pyvirtio.errors import ConfigError
from pyvirtio.properties import Size
from pyvirtio.spec import SECTOR

log = logging.getLogger("pyvirtio")


class BlockBackend:
    """A disk. What a class defines is what the guest is offered; there are no flags to keep true.

    Methods are named and ordered like `os.pread`; `length` and `offset` are bytes, multiples of 512 and inside
    the capacity:

    - `pread(length, offset) -> bytes`, or `preadv(buffers, offset)` to fill the guest's own buffers;
    - `pwrite(data, offset)`, or `pwritev(buffers, offset)`; with neither, the disk is read-only;
    - `flush()`: what was written is durable on return;
    - `discard(length, offset)`, `write_zeroes(length, offset)`;
    - `resize(capacity)`: have another size from now on, which `capacity` says.

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
    writethrough: bool = False
    """The guest's writes are to be durable when they complete, unless it switches that off itself."""

    def offers(self, *methods: str) -> bool:
        """Whether the class defines one of the methods."""
        return any(hasattr(self, name) for name in methods)

    def native(self) -> int | FileIo | NullIo | None:
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

    Locked while open (`flock`): shared if read-only, else exclusive, so that no two machines write one image. Without
    `locking` that is the user's care, as for a machine that migrates from one server to another.

    `cache` and `aio` are QEMU's words. `cache=none` goes past the host's page cache (O_DIRECT). `aio=auto` is io_uring
    with that, and else `threads`, where the I/O thread itself reads and writes, which the page cache answers soonest.
    """

    CACHE = ("writeback", "writethrough", "none")
    AIO = ("auto", "threads", "io_uring")

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        readonly: bool = False,
        cache: str = "writeback",
        aio: str = "auto",
        locking: bool = True,
    ) -> None:
        self.path = Path(path)
        self._readonly = readonly
        _check_word(self.path, "cache", cache, self.CACHE)
        _check_word(self.path, "aio", aio, self.AIO)
        self.writethrough = cache == "writethrough"
        self.aio = _usable_aio(self.path, aio, direct=cache == "none")
        try:
            flags = (os.O_RDONLY if readonly else os.O_RDWR) | (os.O_DIRECT if cache == "none" else 0)
            self._fd = os.open(self.path, flags | os.O_CLOEXEC)
        except OSError as error:
            raise ConfigError(_why(self.path, error, readonly, cache)) from error
        try:
            if cache == "none":
                self.block_size = self._align = _alignment(self._fd, self.path)
            self.capacity = self._checked_size()
            if locking:
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

    _align = 1

    def fileno(self) -> int:
        return self._fd

    def native(self) -> FileIo:
        return FileIo(self._fd, align=self._align, aio=self.aio)

    def pread(self, length: int, offset: int) -> bytes:
        if self._align == 1:
            return os.pread(self._fd, length, offset)
        with mmap.mmap(-1, -(-length // self._align) * self._align) as buffer:
            return buffer[: min(length, os.preadv(self._fd, [buffer], offset))]

    def pwrite(self, data: bytes, offset: int) -> None:
        if self._align > 1:
            with mmap.mmap(-1, len(data)) as buffer:
                buffer[:] = data
                self._write_all(memoryview(buffer), offset)
        else:
            self._write_all(memoryview(data), offset)

    def _write_all(self, data: memoryview, offset: int) -> None:
        with data:
            done = 0
            while done < len(data):
                done += os.pwritev(self._fd, [data[done:]], offset + done)

    def flush(self) -> None:
        os.fdatasync(self._fd)

    def resize(self, capacity: int) -> None:
        if self._readonly or not stat.S_ISREG(os.fstat(self._fd).st_mode):
            raise ConfigError(f"{self.path}: only an image that may be written has another size at will")
        os.ftruncate(self._fd, capacity)
        self.capacity = capacity

    def close(self) -> None:
        if self._fd >= 0:
            # A plane may still hold a duplicate, which shares the lock.
            with suppress(OSError):
                fcntl.flock(self._fd, fcntl.LOCK_UN)
            os.close(self._fd)
            self._fd = -1


def _check_word(path: Path, key: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{path}: {key}={value} is not allowed: {', '.join(allowed)}")


def _usable_aio(path: Path, wanted: str, *, direct: bool) -> str:
    """`threads` or `io_uring`, whichever was asked for as far as the host has it."""
    if wanted == "threads" or (wanted == "auto" and not direct):
        return "threads"
    if reason := io_uring_missing():
        log.warning("%s: aio=threads, because there is no io_uring: %s", path, reason)
        return "threads"
    return "io_uring"


def _alignment(fd: int, path: Path) -> int:
    """What lengths and offsets of a file opened with O_DIRECT have to be multiples of: found out by reading."""
    for size in (512, 1024, 2048, 4096):
        with mmap.mmap(-1, size) as buffer:  # of whole pages, and therefore aligned
            try:
                os.preadv(fd, [buffer], 0)
            except OSError:
                continue
            return size
    raise ConfigError(f"{path}: cache=none: cannot be read past the page cache in pieces of 4096 bytes or less")


def _why(path: Path, error: OSError, readonly: bool, cache: str) -> str:
    if isinstance(error, IsADirectoryError):
        return f"{path}: a directory, not a disk image"
    if cache == "none" and error.errno == errno.EINVAL:
        return f"{path}: cache=none is not possible on its file system"
    for_writing = not readonly and isinstance(error, PermissionError)
    hint = " for writing (readonly=on may do, or --read-only with --blk-file)" if for_writing else ""
    return f"{path}: {error.strerror}{hint}"


class Memory(BlockBackend):
    """A RAM disk of `capacity` bytes, zero at first."""

    def __init__(self, capacity: Annotated[Size, "bytes of the disk"]) -> None:
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

    def resize(self, capacity: int) -> None:
        self.data = self.data[:capacity].ljust(capacity, b"\0")
        self.capacity = capacity

    def write_zeroes(self, length: int, offset: int) -> None:
        self.data[offset : offset + length] = bytes(length)

    discard = write_zeroes


class Null(BlockBackend):
    """A disk that does nothing, as QEMU's null-co: for measuring what everything around a disk costs."""

    def __init__(self, capacity: Annotated[Size, "bytes of the disk"]) -> None:
        self.capacity = capacity

    def native(self) -> NullIo:
        return NullIo()

    @property
    def readonly(self) -> bool:
        return False
