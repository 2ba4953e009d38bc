"""A disk in anything that Python can seek in: an open file, or a file of `fsspec` (S3, HTTP, archives, ...)."""

import errno
import os
from threading import Lock
from typing import Annotated, BinaryIO, Literal

from pyvirtio.backends.block import BlockBackend
from pyvirtio.errors import ConfigError
from pyvirtio.spec import SECTOR


class FileObject(BlockBackend):
    """A binary file object with `seek` and `read`, and `write` if it is to be written. It is closed with the disk."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self._lock = Lock()
        self.capacity = file.seek(0, os.SEEK_END)
        if self.capacity < SECTOR or self.capacity % SECTOR:
            raise ConfigError(f"{file!r}: {self.capacity} bytes; a disk is whole sectors of {SECTOR} bytes")
        self._readonly = not file.writable()

    @property
    def readonly(self) -> bool:
        return self._readonly

    def pread(self, length: int, offset: int) -> bytes:
        pieces = []
        with self._lock:
            self.file.seek(offset)
            while length and (piece := self.file.read(length)):
                pieces.append(piece)
                length -= len(piece)
        return b"".join(pieces)

    def pwrite(self, data: bytes, offset: int) -> None:
        with self._lock:
            self.file.seek(offset)
            left = memoryview(data)
            while left:
                left = left[self.file.write(left) :]

    def flush(self) -> None:
        with self._lock:
            self.file.flush()
            try:
                os.fsync(self.file.fileno())
            except (OSError, AttributeError) as error:
                # Not every object is a file of the system; what it has flushed then is all that can be done.
                if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
                    raise

    def close(self) -> None:
        self.file.close()


class Url(FileObject):
    """What `fsspec` opens: s3://, https://, zip://, memory:// and so on. That package must be installed."""

    def __init__(
        self,
        url: Annotated[str, "what to open, in the words of fsspec"],
        *,
        mode: Annotated[Literal["rb", "r+b"], "rb, or r+b to write as well"] = "rb",
    ) -> None:
        try:
            import fsspec
        except ImportError:
            raise ConfigError(f"{url}: the package fsspec is not installed: pip install fsspec") from None
        self.path = url
        try:
            file = fsspec.open(url, mode).open()
        except (OSError, ValueError, ImportError) as error:
            raise ConfigError(f"{url}: {error}") from error
        super().__init__(file)
