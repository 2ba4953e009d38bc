"""The block device: what it offers, what every request does to the image, and how the host's errors end."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pyvirtio import BlockBackend
from pyvirtio.backends.block import File, Memory
from pyvirtio.devices.blk import Blk
from pyvirtio.errors import ConfigError
from pyvirtio.spec import BlkFeature
from pyvirtio.testing import Guest, Interface
from pyvirtio.testing.blk import SECTOR, Disk, Kind, Verdict

MIB = 1 << 20


class SparseDisk(BlockBackend):
    """A disk of zeroes that remembers the blocks written to it."""

    block_size = 4096

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.blocks: dict[int, bytes] = {}

    def pread(self, length: int, offset: int) -> bytes:
        zeroes = bytes(self.block_size)
        starts = range(offset, offset + length, self.block_size)
        return b"".join(self.blocks.get(start, zeroes) for start in starts)

    def pwrite(self, data: bytes, offset: int) -> None:
        for start in range(0, len(data), self.block_size):
            self.blocks[offset + start] = data[start : start + self.block_size]

    def discard(self, length: int, offset: int) -> None:
        for start in range(offset, offset + length, self.block_size):
            self.blocks.pop(start, None)


class ReadOnly(BlockBackend):
    """A disk that can only be read."""

    capacity = 8 * SECTOR

    def pread(self, length: int, offset: int) -> bytes:
        return bytes(length)


class Failing(BlockBackend):
    """A disk whose methods raise `error`, while there is one."""

    capacity = MIB
    error: BaseException | None = None

    def pread(self, length: int, offset: int) -> bytes:
        self.fail()
        return b"\x11" * length

    def pwrite(self, data: bytes, offset: int) -> None:
        self.fail()

    def flush(self) -> None:
        self.fail()

    def discard(self, length: int, offset: int) -> None:
        self.fail()

    def write_zeroes(self, length: int, offset: int) -> None:
        self.fail()

    def fail(self) -> None:
        if self.error is not None:
            raise self.error


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(MIB))
    return path


def backend_of(kind: str, image: Path) -> BlockBackend:
    if kind == "file":
        return File(image)
    memory = Memory(MIB) if kind == "buffers" else Bytes(MIB)
    memory.data[:] = image.read_bytes()
    return memory


class Bytes(BlockBackend):
    """A RAM disk that moves bytes, not buffers."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.data = bytearray(capacity)

    def pread(self, length: int, offset: int) -> bytes:
        return bytes(self.data[offset : offset + length])

    def pwrite(self, data: bytes, offset: int) -> None:
        self.data[offset : offset + len(data)] = data

    def flush(self) -> None:
        """RAM is as durable as it gets."""

    def discard(self, length: int, offset: int) -> None:
        self.data[offset : offset + length] = bytes(length)

    def write_zeroes(self, length: int, offset: int) -> None:
        self.discard(length, offset)


@pytest.fixture(params=["file", "bytes", "buffers"])
def blk(request: pytest.FixtureRequest, image: Path) -> Blk:
    return Blk(backend_of(request.param, image), serial="seven")


def content(blk: Blk, image: Path) -> bytes:
    return image.read_bytes() if isinstance(blk.drive, File) else bytes(blk.drive.data)  # type: ignore[attr-defined]


@pytest.mark.parametrize("transport", ["modern", "legacy"])
@pytest.mark.parametrize("indirect", [False, True], ids=["direct", "indirect"])
def test_reads_what_the_image_has(guest: Guest, blk: Blk, image: Path, transport: Interface, indirect: bool) -> None:
    disk = Disk(guest.plug(blk, transport=transport, indirect=indirect))
    expected = image.read_bytes()
    for sector, length in ((0, 512), (1, 4096), (2047, 512), (100, 65536)):
        assert disk.read(sector, length) == expected[sector * 512 : sector * 512 + length]


def test_writes_land_in_the_image_and_nowhere_else(guest: Guest, blk: Blk, image: Path) -> None:
    disk = Disk(guest.plug(blk))
    expected = bytearray(image.read_bytes())
    for sector, length in ((0, 512), (7, 4096), (2047, 512)):
        data = os.urandom(length)
        disk.write(sector, data)
        expected[sector * 512 : sector * 512 + length] = data
    disk.flush()
    assert content(blk, image) == bytes(expected)


def test_the_used_length_is_what_was_written(guest: Guest, blk: Blk) -> None:
    disk = Disk(guest.plug(blk))
    for kind, data, room, used in (
        (Kind.READ, b"", 1024, 1025),
        (Kind.WRITE, bytes(1024), 0, 1),
        (Kind.FLUSH, b"", 0, 1),
        (Kind.GET_ID, b"", 20, 21),
    ):
        request = disk.submit(kind, 0, data, room)
        assert request.wait() is Verdict.OK
        assert request.buffer.used_len == used


def test_data_in_many_pieces(guest: Guest, blk: Blk, image: Path) -> None:
    disk = Disk(guest.plug(blk))
    pieces = [os.urandom(n) for n in (1, 511, 512, 300, 724)]
    assert disk.submit(Kind.WRITE, 4, pieces).wait() is Verdict.OK
    assert disk.read(4, 2048) == b"".join(pieces)
    request = disk.submit(Kind.READ, 4, room=[700, 1, 1347])
    assert request.wait() is Verdict.OK
    assert request.data == b"".join(pieces)


@pytest.mark.parametrize("split", [1, 2, 4, 8, 16])
def test_the_header_may_be_split_anywhere(guest: Guest, blk: Blk, image: Path, split: int) -> None:
    disk = Disk(guest.plug(blk))
    queue = disk.queues[0]
    header = bytes(8) + (3).to_bytes(8, "little")
    parts = [header[n : n + 16 // split] for n in range(0, 16, 16 // split)]
    buffer = queue.add(parts, [512, 1])
    queue.kick()
    buffer.wait()
    assert buffer.room == image.read_bytes()[1536:2048] + b"\0"


def test_discard_and_write_zeroes_leave_zeroes(guest: Guest, blk: Blk) -> None:
    disk = Disk(guest.plug(blk))
    disk.discard(8, 8)
    disk.write_zeroes(32, 8)
    disk.write_zeroes(64, 8, flags=1)
    for sector in (8, 32, 64):
        assert disk.read(sector, 4096) == bytes(4096)
    assert disk.read(16, 512) != bytes(512)


def test_get_id_is_the_serial(guest: Guest, blk: Blk) -> None:
    assert Disk(guest.plug(blk)).get_id() == "seven"


def test_a_serial_of_20_characters_has_no_terminator(guest: Guest, image: Path) -> None:
    disk = Disk(guest.plug(Blk(File(image), serial="x" * 20)))
    assert disk.get_id() == "x" * 20


def test_requests_complete_while_others_wait_in_the_same_batch(guest: Guest, blk: Blk, image: Path) -> None:
    disk = Disk(guest.plug(blk))
    requests = [disk.submit(Kind.READ, sector, room=512, kick=False) for sector in range(40)]
    disk.queues[0].kick()
    assert [request.wait() for request in requests] == [Verdict.OK] * 40
    assert b"".join(request.data for request in requests) == image.read_bytes()[: 40 * 512]


def test_every_queue_serves(guest: Guest, image: Path) -> None:
    device = Blk(File(image), num_queues=4)
    disk = Disk(guest.plug(device))
    assert len(disk.queues) == 4
    assert disk.driver.config.num_queues == 4
    expected = image.read_bytes()
    for index in range(4):
        assert disk.read(index, 512, queue=index) == expected[index * 512 : index * 512 + 512]
        assert disk.queues[index].interrupts == 1


def test_a_read_only_file_refuses_writes(guest: Guest, image: Path) -> None:
    before = image.read_bytes()
    driver = guest.plug(Blk(File(image, readonly=True)))
    assert driver.features & BlkFeature.RO
    assert not driver.features & (BlkFeature.DISCARD | BlkFeature.WRITE_ZEROES)
    disk = Disk(driver)
    assert disk.submit(Kind.WRITE, 0, bytes(512)).wait() is Verdict.IOERR
    assert disk.read(0, 512) == before[:512]
    assert image.read_bytes() == before


def test_a_backend_without_pwrite_is_read_only(guest: Guest) -> None:
    driver = guest.plug(Blk(ReadOnly()))
    assert driver.features & BlkFeature.RO
    disk = Disk(driver)
    assert disk.read(0, 4096) == bytes(4096)
    assert disk.submit(Kind.WRITE, 0, bytes(512)).wait() is Verdict.IOERR


def test_a_backend_offers_what_its_class_defines(guest: Guest) -> None:
    features = guest.plug(Blk(SparseDisk(MIB))).features
    assert features & BlkFeature.DISCARD
    assert not features & (BlkFeature.FLUSH | BlkFeature.WRITE_ZEROES | BlkFeature.RO)


def test_a_sparse_disk_in_python(guest: Guest) -> None:
    backend = SparseDisk(1 << 40)
    disk = Disk(guest.plug(Blk(backend)))
    block = os.urandom(4096)
    disk.write(1 << 30, block)
    assert disk.read(1 << 30, 4096) == block
    assert disk.read(8, 4096) == bytes(4096)
    disk.discard(1 << 30, 8)
    assert backend.blocks == {}


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EROFS])
def test_an_oserror_fails_that_request_and_nothing_more(guest: Guest, number: int) -> None:
    backend = Failing()
    disk = Disk(guest.plug(Blk(backend)))
    requests = (
        (Kind.READ, b"", 512),
        (Kind.WRITE, bytes(512), 0),
        (Kind.FLUSH, b"", 0),
        (Kind.DISCARD, bytes(8) + (8).to_bytes(8, "little"), 0),
        (Kind.WRITE_ZEROES, bytes(8) + (8).to_bytes(8, "little"), 0),
    )
    for kind, data, room in requests:
        backend.error = OSError(number, os.strerror(number))
        assert disk.submit(kind, 0, data, room).wait() is Verdict.IOERR
        backend.error = None
        assert disk.submit(kind, 0, data, room).wait() is Verdict.OK


def test_a_defect_of_a_backend_breaks_the_device_and_is_logged(guest: Guest, caplog: pytest.LogCaptureFixture) -> None:
    backend = Failing()
    disk = Disk(guest.plug(Blk(backend)))
    backend.error = ZeroDivisionError("a defect")
    disk.submit(Kind.READ, room=512)
    assert "ZeroDivisionError" in disk.driver.wait_needs_reset()
    assert "a defect" in caplog.text
    backend.error = None
    disk.driver.start()
    assert Disk(disk.driver).read(0, 512) == b"\x11" * 512


class Pieces(BlockBackend):
    """Returns `piece` bytes, whatever it is asked for."""

    capacity = 8 * SECTOR

    def __init__(self, piece: int) -> None:
        self.piece = piece

    def pread(self, length: int, offset: int) -> bytes:
        return bytes((offset + n) % 251 for n in range(self.piece))


class Keeper(BlockBackend):
    """Keeps what `keep` takes of the buffers it gets."""

    capacity = 8 * SECTOR

    def __init__(self, keep: Callable[[list[memoryview]], object]) -> None:
        self.keep = keep
        self.kept: list[object] = []

    def preadv(self, buffers: list[memoryview], offset: int) -> None:
        self.kept.append(self.keep(buffers))


def take_the_only_one(buffers: list[memoryview]) -> memoryview:
    return buffers.pop()


@pytest.mark.parametrize("keep", [lambda buffers: buffers, lambda buffers: buffers[0], take_the_only_one])
def test_buffers_end_with_the_call_whatever_the_backend_keeps(
    guest: Guest, keep: Callable[[list[memoryview]], object]
) -> None:
    backend = Keeper(keep)
    disk = Disk(guest.plug(Blk(backend)))
    for _ in range(2):
        assert disk.submit(Kind.READ, room=512).wait() is Verdict.OK
    for kept in backend.kept:
        view = kept[0] if isinstance(kept, list) else kept
        assert isinstance(view, memoryview)
        with pytest.raises(ValueError, match="released"):
            bytes(view)


def test_a_slice_that_a_backend_keeps_stays_what_it_was(guest: Guest) -> None:
    backend = Keeper(lambda buffers: buffers[0][:4])
    disk = Disk(guest.plug(Blk(backend)))
    first = disk.submit(Kind.READ, room=512)
    first.wait()
    disk.submit(Kind.READ, room=1024).wait()
    kept = backend.kept[0]
    assert isinstance(kept, memoryview)
    kept[:] = b"late"
    address, _ = first.buffer.writable[0]
    assert guest.memory.read(address, 4) == b"late"


@pytest.mark.parametrize("piece", [0, 1, 511])
def test_a_short_read_fails_the_request(guest: Guest, piece: int) -> None:
    disk = Disk(guest.plug(Blk(Pieces(piece))))
    assert disk.submit(Kind.READ, room=512).wait() is Verdict.IOERR
    assert disk.driver.why_broken is None


def test_a_backend_that_returns_too_much_has_a_defect(guest: Guest) -> None:
    disk = Disk(guest.plug(Blk(Pieces(513))))
    request = disk.submit(Kind.READ, room=512)
    assert "513 bytes where 512" in disk.driver.wait_needs_reset()
    assert not request.buffer.done


def test_a_file_that_shrank_under_us_fails_the_read(guest: Guest, image: Path) -> None:
    disk = Disk(guest.plug(Blk(File(image))))
    os.truncate(image, 4096)
    assert disk.submit(Kind.READ, 100, room=512).wait() is Verdict.IOERR
    assert len(disk.read(0, 512)) == 512


def test_the_counters_tell_what_was_done(guest: Guest, blk: Blk) -> None:
    disk = Disk(guest.plug(blk))
    disk.read(0, 1024)
    disk.write(0, bytes(512))
    disk.flush()
    disk.submit(Kind.READ, 1 << 40, room=512).wait()
    counters = blk.plane.counters
    assert (counters["reads"], counters["bytes_read"]) == (1, 1024)
    assert (counters["writes"], counters["bytes_written"]) == (1, 512)
    assert (counters["flushes"], counters["errors"]) == (1, 1)


def test_a_disk_that_grows_is_told_of_and_can_be_written_to_its_new_end(guest: Guest, tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(64 * 512))
    blk = Blk(File(image))
    driver = guest.plug(blk)
    disk = Disk(driver)
    blk.resize(128 * 512)
    assert (driver.config.capacity, driver.config_interrupts) == (128, 1)
    disk.write(127, b"\7" * 512)
    assert image.read_bytes()[-512:] == b"\7" * 512
    blk.resize(64 * 512)
    assert driver.config.capacity == 64
    with pytest.raises(OSError, match="IOERR"):
        disk.write(127, b"\7" * 512)
    assert image.stat().st_size == 64 * 512


def test_a_disk_of_another_kind_cannot_be_resized(tmp_path: Path) -> None:
    class Fixed(BlockBackend):
        """A disk that has one size."""

        capacity = 512

        def pread(self, length: int, offset: int) -> bytes:
            return bytes(length)

    with pytest.raises(ConfigError, match="a Fixed cannot be resized"):
        Blk(Fixed()).resize(1024)
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(512))
    blk = Blk(File(image, readonly=True))
    with pytest.raises(ConfigError, match="only an image that may be written"):
        blk.resize(1024)
    assert blk.plane.capacity == 512
    blk.close()
