"""Hostile block requests: what is refused, with which status, and that nothing is repeated or touched."""

import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from attack import Echo, echo

from pyvirtio import BlockBackend
from pyvirtio.backends.block import File
from pyvirtio.devices.blk import Blk
from pyvirtio.testing import Guest
from pyvirtio.testing.blk import SECTOR, Disk, Kind, Verdict
from pyvirtio.testing.ring import WRITE, Desc

SECTORS = 128
ALL_ONES = (1 << 64) - 1


class Ram(BlockBackend):
    """A RAM disk that moves bytes."""

    def __init__(self, data: bytes) -> None:
        self.data = bytearray(data)
        self.capacity = len(data)

    def pread(self, length: int, offset: int) -> bytes:
        return bytes(self.data[offset : offset + length])

    def pwrite(self, data: bytes, offset: int) -> None:
        assert offset + len(data) <= self.capacity
        self.data[offset : offset + len(data)] = data

    def flush(self) -> None:
        """RAM is as durable as it gets."""

    def discard(self, length: int, offset: int) -> None:
        self.pwrite(bytes(length), offset)

    write_zeroes = discard


class Victim:
    """A disk with a hostile driver, and what its image was before."""

    def __init__(self, guest: Guest, path: Path, *, native: bool, indirect: bool, packed: bool) -> None:
        self.guest, self.path = guest, path
        self.before = os.urandom(SECTORS * SECTOR)
        path.write_bytes(self.before)
        self.drive = File(path) if native else Ram(self.before)
        self.bystander = guest.plug(Echo(), name="bystander")
        self.disk = Disk(guest.plug(Blk(self.drive), name="victim", indirect=indirect, packed=packed))

    @property
    def content(self) -> bytes:
        return bytes(self.drive.data) if isinstance(self.drive, Ram) else self.path.read_bytes()


@pytest.fixture(params=["direct", "indirect"])
def layout(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["native", "python"])
def victim(request: pytest.FixtureRequest, guest: Guest, tmp_path: Path, layout: str) -> Iterator[Victim]:
    """Served natively and by a Python backend; whatever was done to it, it and the other device serve, and its
    image is what it was. Both kinds of ring are there with both layouts and in both modes."""
    attacked = Victim(
        guest,
        tmp_path / "disk.img",
        native=request.param == "native",
        indirect=layout == "indirect",
        packed=(layout == "indirect") is not guest.ioeventfd,
    )
    yield attacked
    if attacked.disk.driver.may_break:
        attacked.disk.driver.start()
    assert Disk(attacked.disk.driver).read(0, 4096) == attacked.before[:4096]
    assert echo(attacked.bystander.echoq) == b"hello"
    assert attacked.content == attacked.before
    assert len(attacked.content) == SECTORS * SECTOR


@pytest.mark.parametrize("kind", [Kind.READ, Kind.WRITE])
@pytest.mark.parametrize(
    ("sector", "length"),
    [
        (SECTORS, 512),
        (SECTORS - 1, 1024),
        (0, SECTORS * SECTOR + 512),
        (1 << 55, 512),
        ((1 << 55) - 1, 1024),
        (ALL_ONES, 512),
        (ALL_ONES - 1, 2048),
    ],
)
def test_past_the_end_or_around_it(victim: Victim, kind: Kind, sector: int, length: int) -> None:
    data, room = (b"", length) if kind is Kind.READ else (bytes(length), 0)
    request = victim.disk.submit(kind, sector, data, room)
    assert request.wait() is Verdict.IOERR
    assert request.buffer.used_len is not None
    assert request.buffer.used_len <= length + 1


@pytest.mark.parametrize("kind", [Kind.READ, Kind.WRITE])
@pytest.mark.parametrize("length", [1, 511, 513, 1000])
def test_not_a_multiple_of_a_sector(victim: Victim, kind: Kind, length: int) -> None:
    data, room = (b"", length) if kind is Kind.READ else (bytes(length), 0)
    assert victim.disk.submit(kind, 0, data, room).wait() is Verdict.IOERR


@pytest.mark.parametrize("kind", [2, 3, 5, 7, 9, 10, 12, 14, 25, 0x80000000, 0xFFFFFFFF])
def test_a_type_that_does_not_exist(victim: Victim, kind: int) -> None:
    assert victim.disk.submit(kind, 0, bytes(512)).wait() is Verdict.UNSUPP
    assert victim.disk.submit(kind, 0, room=512).wait() is Verdict.UNSUPP


@pytest.mark.parametrize("length", [1, 4, 8, 15])
def test_a_short_header(victim: Victim, length: int) -> None:
    queue = victim.disk.queues[0]
    buffer = queue.add(bytes(length), [512, 1])
    queue.kick()
    buffer.wait()
    assert buffer.room[-1] == Verdict.IOERR


def test_no_header_at_all(victim: Victim) -> None:
    queue = victim.disk.queues[0]
    buffer = queue.add(writable=1)
    queue.kick()
    buffer.wait()
    assert buffer.room == bytes([Verdict.IOERR])


def test_no_writable_status_byte(victim: Victim) -> None:
    queue = victim.disk.queues[0]
    queue.add([struct.pack("<IIQ", Kind.WRITE, 0, 0), bytes(512)])
    queue.kick()
    assert "status" in victim.disk.driver.wait_needs_reset()


def test_a_read_into_readable_buffers_reads_nothing(victim: Victim) -> None:
    request = victim.disk.submit(Kind.READ, 0, bytes(512))
    [(address, length)] = request.buffer.readable[1:]
    assert request.wait() in (Verdict.OK, Verdict.IOERR)
    assert request.buffer.used_len == 1
    assert victim.guest.memory.read(address, length) == bytes(length)


def test_a_write_out_of_writable_buffers_writes_nothing(victim: Victim) -> None:
    request = victim.disk.submit(Kind.WRITE, 0, room=512)
    assert request.wait() in (Verdict.OK, Verdict.IOERR)
    assert request.buffer.used_len == 1


@pytest.mark.parametrize("kind", [Kind.READ, Kind.WRITE])
def test_a_request_of_no_sectors(victim: Victim, kind: Kind) -> None:
    assert victim.disk.submit(kind, 0).wait() in (Verdict.OK, Verdict.IOERR)


@pytest.mark.parametrize("kind", [Kind.DISCARD, Kind.WRITE_ZEROES])
@pytest.mark.parametrize(
    ("sector", "sectors"),
    [(SECTORS, 1), (SECTORS - 1, 2), (0, SECTORS + 1), (ALL_ONES, 1), (ALL_ONES, 2), (1 << 55, 1)],
)
def test_discard_and_write_zeroes_past_the_end(victim: Victim, kind: Kind, sector: int, sectors: int) -> None:
    assert victim.disk.submit(kind, 0, struct.pack("<QII", sector, sectors, 0)).wait() is Verdict.IOERR


@pytest.mark.parametrize("kind", [Kind.DISCARD, Kind.WRITE_ZEROES])
def test_discard_and_write_zeroes_beyond_their_limit(victim: Victim, kind: Kind) -> None:
    sectors = Blk.MAX_SECTORS + 1
    assert victim.disk.submit(kind, 0, struct.pack("<QII", 0, sectors, 0)).wait() is Verdict.IOERR
    assert victim.disk.submit(kind, 0, struct.pack("<QII", 0, 0xFFFFFFFF, 0)).wait() is Verdict.IOERR


@pytest.mark.parametrize("flags", [2, 4, 0x80000000, 0xFFFFFFFF])
@pytest.mark.parametrize("kind", [Kind.DISCARD, Kind.WRITE_ZEROES])
def test_reserved_flags(victim: Victim, kind: Kind, flags: int) -> None:
    assert victim.disk.submit(kind, 0, struct.pack("<QII", 0, 8, flags)).wait() in (Verdict.IOERR, Verdict.UNSUPP)


def test_unmap_is_no_flag_of_discard(victim: Victim) -> None:
    verdict = victim.disk.submit(Kind.DISCARD, 0, struct.pack("<QII", 0, 8, 1)).wait()
    assert verdict in (Verdict.IOERR, Verdict.UNSUPP)


@pytest.mark.parametrize("length", [0, 1, 15, 17, 24])
@pytest.mark.parametrize("kind", [Kind.DISCARD, Kind.WRITE_ZEROES])
def test_ranges_of_an_odd_length(victim: Victim, kind: Kind, length: int) -> None:
    assert victim.disk.submit(kind, 0, bytes(length)).wait() is Verdict.IOERR


@pytest.mark.parametrize("kind", [Kind.DISCARD, Kind.WRITE_ZEROES])
def test_more_ranges_than_offered_do_nothing(victim: Victim, kind: Kind) -> None:
    ranges = struct.pack("<QII", 0, 8, 0) * 2
    assert victim.disk.submit(kind, 0, ranges).wait() is Verdict.IOERR


@pytest.mark.parametrize("room", [0, 1, 19, 21, 4096])
def test_get_id_into_a_buffer_of_another_size(victim: Victim, room: int) -> None:
    request = victim.disk.submit(Kind.GET_ID, room=room)
    request.wait()
    assert request.buffer.used_len is not None
    assert request.buffer.used_len <= 21


def test_a_write_to_a_read_only_disk(guest: Guest, tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(before := os.urandom(8 * SECTOR))
    disk = Disk(guest.plug(Blk(File(path, readonly=True))))
    for kind, data in (
        (Kind.WRITE, bytes(512)),
        (Kind.DISCARD, struct.pack("<QII", 0, 1, 0)),
        (Kind.WRITE_ZEROES, struct.pack("<QII", 0, 1, 0)),
    ):
        assert disk.submit(kind, 0, data).wait() in (Verdict.IOERR, Verdict.UNSUPP)
    assert path.read_bytes() == before


class Stumbling(Ram):
    """Fails every other call, after it has seen the data."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.writes: list[tuple[int, int]] = []

    def pwrite(self, data: bytes, offset: int) -> None:
        self.writes.append((offset, len(data)))
        if len(self.writes) % 2 == 0:
            raise OSError(28, "No space left on device")
        super().pwrite(data, offset)


def test_a_partial_failure_never_repeats_data(guest: Guest) -> None:
    """4 MiB are handed over in pieces; one fails, and so does the request, without a retry and without the rest."""
    backend = Stumbling(bytes(8 << 20))
    disk = Disk(guest.plug(Blk(backend)))
    queue, piece, status = disk.queues[0], guest.heap.allocate(65536), guest.heap.allocate(16)
    header = guest.heap.allocate(16)
    guest.memory.write(header, struct.pack("<IIQ", Kind.WRITE, 0, 0))
    queue.ring.add([Desc(header, 16), *[Desc(piece, 65536)] * 64, Desc(status, 1, WRITE)])
    queue.kick()
    queue.wait_until(lambda: bool(queue.strays), "it is answered")
    assert guest.memory.read(status, 1) == bytes([Verdict.IOERR])
    assert len(backend.writes) == 2
    assert backend.writes[0][0] + backend.writes[0][1] == backend.writes[1][0]


def test_requests_behind_a_failed_one_are_served(guest: Guest, tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(SECTORS * SECTOR))
    disk = Disk(guest.plug(Blk(File(path))))
    requests = [disk.submit(Kind.READ, sector, room=512, kick=False) for sector in (0, SECTORS, 1, ALL_ONES, 2)]
    disk.queues[0].kick()
    verdicts = [request.wait() for request in requests]
    assert verdicts == [Verdict.OK, Verdict.IOERR, Verdict.OK, Verdict.IOERR, Verdict.OK]


def test_the_used_length_of_a_failed_read_shows_nothing_that_was_not_written(victim: Victim) -> None:
    """CVE-2024-8612."""
    request = victim.disk.submit(Kind.READ, SECTORS, room=4096)
    for address, length in request.buffer.writable[:-1]:
        assert length == 4096
        assert address
    request.wait()
    assert request.buffer.used_len in (1, 4097)
    if request.buffer.used_len == 4097:
        assert request.data == bytes(4096)
