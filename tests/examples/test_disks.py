"""The disks among the examples: over HTTP, recorded, and lying."""

import os
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from http_disk import HttpDisk
from lying_disk import LyingDisk
from recorder import Recorder, replay

from pyvirtio import ConfigError
from pyvirtio.backends.block import File, Memory
from pyvirtio.devices.blk import Blk
from pyvirtio.testing import Guest
from pyvirtio.testing.blk import Disk

MIB = 1 << 20


class ImageServer(ThreadingHTTPServer):
    """Serves one image by ranges; remembers what was asked for, and can be told to fail."""

    def __init__(self, image: bytes) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.image, self.asked, self.broken = image, list[str](), False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/disk.img"


class Answers(BaseHTTPRequestHandler):
    server: ImageServer

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.server.image)))
        self.end_headers()

    def do_GET(self) -> None:
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"])
        assert found is not None
        self.server.asked.append(found[0])
        if self.server.broken:
            self.send_error(503)
            return
        self.send_response(206)
        self.end_headers()
        self.wfile.write(self.server.image[int(found[1]) : int(found[2]) + 1])

    def log_message(self, format: str, *args: object) -> None:
        """Not on the terminal of a test."""


@pytest.fixture
def server() -> Iterator[ImageServer]:
    with ImageServer(os.urandom(MIB + 100)) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_disk_over_http_fetches_each_piece_once(server: ImageServer, guest: Guest) -> None:
    driver = guest.plug(Blk(HttpDisk(server.url)))
    disk = Disk(driver)
    assert driver.config.capacity == MIB // 512
    for sector, count in ((0, 8), (100, 300), (MIB // 512 - 8, 8), (120, 8), (0, 8)):
        assert disk.read(sector, 512 * count) == server.image[512 * sector : 512 * (sector + count)]
    pieces = [f"bytes={start}-{start + 65535}" for start in (0, 65536, 131072, 196608, MIB - 65536)]
    assert sorted(server.asked) == sorted(pieces)
    with pytest.raises(OSError, match="IOERR"):
        disk.write(0, bytes(512))


def test_a_failing_server_is_an_io_error_that_can_be_repeated(server: ImageServer, guest: Guest) -> None:
    disk = Disk(guest.plug(Blk(HttpDisk(server.url, cache=1))))
    server.broken = True
    with pytest.raises(OSError, match="IOERR"):
        disk.read(0, 512)
    server.broken = False
    assert disk.read(0, 512) == server.image[:512]


def test_no_server_is_a_mistake() -> None:
    with pytest.raises(ConfigError, match=r"http://127\.0\.0\.1:1/x: "):
        HttpDisk("http://127.0.0.1:1/x")


def test_what_was_recorded_makes_a_copy(guest: Guest, tmp_path: Path) -> None:
    image, copy, log = tmp_path / "disk.img", tmp_path / "copy.img", tmp_path / "requests.log"
    image.write_bytes(bytes(MIB))
    copy.write_bytes(bytes(MIB))
    driver = guest.plug(Blk(Recorder(str(image), str(log))))
    disk = Disk(driver)
    for sector in (5, 900, 5):
        disk.write(sector, os.urandom(1024))
    assert len(disk.read(4, 4096)) == 4096
    disk.flush()
    guest.unplug(driver)

    with_copy = File(copy)
    assert list(replay(log, with_copy)) == []
    with_copy.close()
    assert copy.read_bytes() == image.read_bytes() != bytes(MIB)
    other = Memory(MIB)
    other.data[4 * 512] = 1
    (different,) = replay(log, _Bytes(other.data))
    assert (different["do"], different["offset"]) == ("pread", 4 * 512)


class _Bytes:
    """A disk that a replay needs, over a bytearray."""

    def __init__(self, data: bytearray) -> None:
        self.data = data

    def pread(self, length: int, offset: int) -> bytes:
        return bytes(self.data[offset : offset + length])

    def pwrite(self, data: bytes, offset: int) -> None:
        self.data[offset : offset + len(data)] = data

    def flush(self) -> None:
        """Nothing to be done."""


def lies(guest: Guest, seed: int) -> tuple[list[int], list[int]]:
    """The sectors that hold other data than was written, and those that cannot be read."""
    device = LyingDisk(Memory(MIB), seed=seed, percent=5, bad="100-103")
    driver = guest.plug(device)
    disk, wrong, unreadable = Disk(driver), [], []
    for sector in range(200):
        disk.write(sector, bytes([sector]) * 512)
    for sector in range(200):
        try:
            if disk.read(sector, 512) != bytes([sector]) * 512:
                wrong.append(sector)
        except OSError:
            unreadable.append(sector)
    guest.unplug(driver)
    return wrong, unreadable


def test_a_disk_lies_the_same_in_each_run(guest: Guest) -> None:
    wrong, unreadable = lies(guest, seed=7)
    assert 1 <= len(wrong) <= 60
    assert unreadable == [100, 101, 102, 103]
    assert lies(guest, seed=7) == (wrong, unreadable)
    assert lies(guest, seed=8)[0] != wrong
