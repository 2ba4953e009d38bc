"""Disks to compare with those of others: `pyvirtio serve pyvirtio.bench.disks:PythonFile,path=disk.img`."""

import os
from typing import Annotated

from pyvirtio.backends.block import BlockBackend, File, Memory, Null
from pyvirtio.devices.blk import Blk
from pyvirtio.properties import Size

QUEUE_SIZE = 1024
"""Room for 128 requests of three descriptors each, and more."""
Capacity = Annotated[Size, "size of the disk"]
Queues = Annotated[int, "request queues"]


class NativeNull(Blk):
    """A disk that does nothing, without Python."""

    def __init__(self, size: Capacity = 1 << 30, num_queues: Queues = 1) -> None:
        super().__init__(Null(size), num_queues=num_queues, queue_size=QUEUE_SIZE)


class NothingInPython(BlockBackend):
    """Nothing, done by a method for each request."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity

    def preadv(self, buffers: list[memoryview], offset: int) -> None:
        """Leaves the buffers as they are."""

    def pwritev(self, buffers: list[memoryview], offset: int) -> None:
        """Drops what is in the buffers."""

    def flush(self) -> None:
        """There is nothing to be flushed."""


class PythonNull(Blk):
    """A disk that does nothing, in Python."""

    def __init__(self, size: Capacity = 1 << 30, num_queues: Queues = 1) -> None:
        super().__init__(NothingInPython(size), num_queues=num_queues, queue_size=QUEUE_SIZE)


class FileInPython(BlockBackend):
    """A file, read and written by a method for each request."""

    def __init__(self, path: str) -> None:
        self._file = File(path)
        self._fd = self._file.fileno()
        self.capacity = self._file.capacity

    def preadv(self, buffers: list[memoryview], offset: int) -> int:
        return os.preadv(self._fd, buffers, offset)

    def pwritev(self, buffers: list[memoryview], offset: int) -> int:
        return os.pwritev(self._fd, buffers, offset)

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class PythonFile(Blk):
    """A file that Python reads and writes."""

    def __init__(self, path: Annotated[str, "the image"], num_queues: Queues = 1) -> None:
        super().__init__(FileInPython(path), num_queues=num_queues, queue_size=QUEUE_SIZE)


class PythonMemory(Blk):
    """A RAM disk written in Python."""

    def __init__(self, size: Capacity = 1 << 28, num_queues: Queues = 1) -> None:
        super().__init__(Memory(size), num_queues=num_queues, queue_size=QUEUE_SIZE)
