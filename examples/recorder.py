"""Records what a guest asks of a disk, and asks another disk the same.

    pyvirtio run ... --drive driver=examples/recorder.py:Recorder,image=disk.img,log=requests.log
    python examples/recorder.py requests.log other.img

The second command makes a copy of what disk.img was, and counts the reads that find something else.
"""

import json
import sys
from base64 import b64decode, b64encode
from collections.abc import Iterator
from pathlib import Path
from threading import Lock
from typing import Annotated, Any
from zlib import crc32

from pyvirtio import BlockBackend
from pyvirtio.backends.block import File


class Recorder(BlockBackend):
    """The disk in a raw file; each request that it has served is a line of JSON in `log`."""

    def __init__(
        self, image: Annotated[str, "a raw image"], log: Annotated[str, "where to record; replaced if it is there"]
    ) -> None:
        self.disk = File(image)
        self.capacity, self.block_size = self.disk.capacity, self.disk.block_size
        self._log = open(log, "w", encoding="ascii")  # noqa: SIM115 - closed with the disk
        self._lock = Lock()

    def pread(self, length: int, offset: int) -> bytes:
        data = self.disk.pread(length, offset)
        self.note(do="pread", offset=offset, length=length, crc32=crc32(data))
        return data

    def pwrite(self, data: bytes, offset: int) -> None:
        self.disk.pwrite(data, offset)
        self.note(do="pwrite", offset=offset, data=b64encode(data).decode())

    def flush(self) -> None:
        self.disk.flush()
        self.note(do="flush")

    def note(self, **request: Any) -> None:
        with self._lock:
            print(json.dumps(request), file=self._log)

    def close(self) -> None:
        self._log.close()
        self.disk.close()


def replay(log: Path, disk: Any) -> Iterator[dict[str, Any]]:
    """Do what `log` says with another disk; yields the reads that find other data than they did then."""
    for line in log.read_text("ascii").splitlines():
        request = json.loads(line)
        if request["do"] == "pread":
            if crc32(disk.pread(request["length"], request["offset"])) != request["crc32"]:
                yield request
        elif request["do"] == "pwrite":
            disk.pwrite(b64decode(request["data"]), request["offset"])
        else:
            disk.flush()


if __name__ == "__main__":
    different = list(replay(Path(sys.argv[1]), File(sys.argv[2])))
    print(f"{len(different)} reads found other data", *different, sep="\n")
    sys.exit(bool(different))
