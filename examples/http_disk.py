"""A disk that is a file on a web server, fetched piece by piece as the guest reads it.

    pyvirtio run ... --drive driver=examples/http_disk.py:HttpDisk,url=http://example.org/disk.img

The server has to know range requests; what was read is kept in pieces of 64 KiB.
"""

import errno
from functools import lru_cache
from typing import Annotated
from urllib.request import Request, urlopen

from pyvirtio import BlockBackend, ConfigError
from pyvirtio.properties import Range

TIMEOUT = 30.0


class HttpDisk(BlockBackend):
    """Read-only: a web server knows no writes. A failed request is an I/O error for the guest, and can be repeated."""

    BLOCK = 64 * 1024

    def __init__(
        self,
        url: Annotated[str, "the image; its server must know range requests"],
        cache: Annotated[int, "pieces of 64 KiB that are kept", Range(1, 1 << 20)] = 256,
    ) -> None:
        self.url = url
        try:
            with urlopen(Request(url, method="HEAD"), timeout=TIMEOUT) as answer:
                length = int(answer.headers["Content-Length"])
        except OSError as error:
            raise ConfigError(f"{url}: {error}") from error
        self.capacity = length // 512 * 512
        self.piece = lru_cache(cache)(self.fetch)

    def pread(self, length: int, offset: int) -> bytes:
        first, last = offset // self.BLOCK, (offset + length - 1) // self.BLOCK
        data = b"".join(self.piece(number) for number in range(first, last + 1))
        start = offset - first * self.BLOCK
        return data[start : start + length]

    def fetch(self, number: int) -> bytes:
        """One piece, from the server; `OSError` if it gives anything else."""
        start = number * self.BLOCK
        wanted = f"bytes={start}-{min(start + self.BLOCK, self.capacity) - 1}"
        with urlopen(Request(self.url, headers={"Range": wanted}), timeout=TIMEOUT) as answer:
            if answer.status != 206:
                raise OSError(errno.EIO, f"{self.url}: status {answer.status} for {wanted}")
            piece: bytes = answer.read(self.BLOCK)
        return piece
