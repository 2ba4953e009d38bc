"""Random block requests, sound and broken, against a model of the disk (virtio 1.3, 5.2.6)."""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import pytest
from exploring import budget, exploring
from hypothesis import given
from hypothesis import strategies as st

from pyvirtio import BlockBackend
from pyvirtio.backends.block import File, Memory
from pyvirtio.devices.blk import Blk
from pyvirtio.testing import Guest
from pyvirtio.testing.blk import SECTOR, Kind, Verdict

SECTORS = 16
CAPACITY = SECTORS * SECTOR
SERIAL = b"serial"
MAX_RANGE = Blk.MAX_SECTORS
UNMAP = 1


@dataclass
class Request:
    """What a driver sends: `readable` holds header and data, `room` is before the status byte."""

    readable: bytes
    room: int

    @property
    def header(self) -> tuple[int, int]:
        """Type and sector."""
        kind, _, sector = struct.unpack("<IIQ", self.readable[:16])
        return kind, sector


class Model:
    """A disk that is a `bytearray`, and the verdicts the specification asks for."""

    def __init__(self, *, readonly: bool) -> None:
        self.data = bytearray(n // SECTOR + n % 251 & 0xFF for n in range(CAPACITY))
        self.readonly = readonly

    def answer(self, request: Request) -> tuple[Verdict, bytes]:
        """The verdict, and what is written in front of it."""
        if len(request.readable) < 16:
            return Verdict.IOERR, b""
        kind, sector = request.header
        body = request.readable[16:]
        if kind == Kind.READ:
            return self._read(sector, body, request.room)
        if kind == Kind.WRITE:
            return self._write(sector, body, request.room), b""
        if kind == Kind.GET_ID:
            return (Verdict.IOERR, b"") if body else (Verdict.OK, SERIAL.ljust(20, b"\0")[: request.room])
        if self.readonly:
            return Verdict.UNSUPP, b""
        if kind == Kind.FLUSH:
            return Verdict.OK, b""
        if kind in (Kind.DISCARD, Kind.WRITE_ZEROES):
            return self._zero(kind, body, request.room), b""
        return Verdict.UNSUPP, b""

    def _read(self, sector: int, body: bytes, room: int) -> tuple[Verdict, bytes]:
        if body or not inside(sector, room):
            return Verdict.IOERR, b""
        return Verdict.OK, bytes(self.data[sector * SECTOR : sector * SECTOR + room])

    def _write(self, sector: int, body: bytes, room: int) -> Verdict:
        if self.readonly or room or not inside(sector, len(body)):
            return Verdict.IOERR
        self.data[sector * SECTOR : sector * SECTOR + len(body)] = body
        return Verdict.OK

    def _zero(self, kind: int, body: bytes, room: int) -> Verdict:
        if room or len(body) != 16:
            return Verdict.IOERR
        sector, sectors, flags = struct.unpack("<QII", body)
        if flags & ~(UNMAP if kind == Kind.WRITE_ZEROES else 0):
            return Verdict.UNSUPP
        if sectors > MAX_RANGE or not inside(sector, sectors * SECTOR):
            return Verdict.IOERR
        self.data[sector * SECTOR : (sector + sectors) * SECTOR] = bytes(sectors * SECTOR)
        return Verdict.OK


def inside(sector: int, length: int) -> bool:
    return length % SECTOR == 0 and sector * SECTOR + length <= CAPACITY


kinds = st.one_of(st.sampled_from(list(Kind)), st.integers(0, 16), st.integers(0, 2**32 - 1))
sectors = st.one_of(st.integers(0, SECTORS + 1), st.sampled_from([2**55 - 1, 2**55, 2**63, 2**64 - 1]))
counts = st.one_of(st.integers(0, SECTORS + 1), st.sampled_from([MAX_RANGE, MAX_RANGE + 1, 2**32 - 1]))
lengths = st.one_of(
    st.integers(0, 6).map(SECTOR.__mul__),
    st.sampled_from([1, 15, 16, 17, 20, 32, 511, 513, SECTORS * SECTOR, SECTORS * SECTOR + SECTOR]),
)
bodies = st.builds(
    lambda length, tint: bytes((n * 7 + tint) & 0xFF for n in range(length)), lengths, st.integers(0, 255)
)
ranges = st.builds(struct.Struct("<QII").pack, sectors, counts, st.sampled_from([0, 0, 0, 1, 2, 2**31]))


@st.composite
def requests(draw: st.DrawFn) -> Request:
    """Mostly what a driver would send, otherwise any combination."""
    kind, sector = draw(kinds), draw(sectors)
    header = struct.pack("<IIQ", kind, draw(st.integers(0, 2**32 - 1)), sector)
    if draw(st.integers(0, 9)) == 0:
        return Request(draw(st.sampled_from([header[:8], header[:15], header + draw(bodies)])), draw(lengths))
    if kind == Kind.WRITE:
        return Request(header + draw(bodies), 0)
    if kind in (Kind.DISCARD, Kind.WRITE_ZEROES):
        return Request(header + draw(ranges) + draw(st.sampled_from([b"", b"", b"", b"x", bytes(16)])), 0)
    return Request(header, draw(lengths) if kind in (Kind.READ, Kind.GET_ID) else 0)


def split(draw: st.DrawFn, length: int) -> list[int]:
    """`length` bytes in up to four pieces."""
    cuts = sorted({0, length, *draw(st.lists(st.integers(0, length), max_size=3))})
    return [high - low for low, high in pairwise(cuts)]


@st.composite
def cut_requests(draw: st.DrawFn) -> tuple[Request, list[bytes], list[int]]:
    """A request, and its descriptors: readable parts, then the sizes of the writable ones with the status byte."""
    request, parts, at = draw(requests()), [], 0
    for size in split(draw, len(request.readable)):
        parts.append(request.readable[at : at + size])
        at += size
    return request, parts, split(draw, request.room + 1)


@pytest.fixture(params=["file", "memory", "read-only"])
def drive(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[BlockBackend]:
    """The native plane, a Python backend, and a file that must not be written."""
    if request.param == "memory":
        yield Memory(CAPACITY)
    else:
        path = tmp_path / "disk.img"
        path.write_bytes(bytes(CAPACITY))
        yield File(path, readonly=request.param == "read-only")


def contents(drive: BlockBackend) -> bytes:
    return drive.path.read_bytes() if isinstance(drive, File) else bytes(drive.data)  # type: ignore[attr-defined]


def put_contents(drive: BlockBackend, data: bytes) -> None:
    if isinstance(drive, File):
        drive.path.write_bytes(data)
    else:
        drive.data[:] = data  # type: ignore[attr-defined]


@pytest.mark.parametrize("transport", ["modern", "legacy"])
def test_every_request_ends_as_the_model_says(
    guest: Guest, drive: BlockBackend, transport: Literal["modern", "legacy"]
) -> None:
    blk = guest.plug(Blk(drive, serial=SERIAL.decode(), queue_size=32), transport=transport)
    vq = blk.requestq

    @exploring
    @budget(20)
    @given(st.lists(cut_requests(), min_size=1, max_size=3), st.booleans())
    def explore(batch: list[tuple[Request, list[bytes], list[int]]], indirect: bool) -> None:
        model = Model(readonly=drive.readonly)
        put_contents(drive, bytes(model.data))
        buffers = []
        for _, parts, room in batch:
            buffer = vq.add(parts, room, indirect=indirect)
            for range_ in buffer.writable:
                guest.memory.write(range_[0], b"\xee" * range_[1])
            buffers.append(buffer)
        vq.kick()
        for buffer, (request, _, _) in zip(buffers, batch, strict=True):
            buffer.wait()
            verdict, data = model.answer(request)
            untouched = b"\xee" * (request.room - len(data))
            assert Verdict(buffer.room[-1]) is verdict, request
            assert buffer.room[:-1] == data + untouched, request
            assert buffer.used_len == len(data) + 1
        assert contents(drive) == bytes(model.data)

    explore()
