"""Faults of a disk: errors by sector, torn writes, flipped bits; over a backend in Python and over a raw file."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from pyvirtio import Device, VirtQueue, queue
from pyvirtio.backends.block import BlockBackend, File, Memory
from pyvirtio.devices.blk import Blk
from pyvirtio.errors import ConfigError
from pyvirtio.faults import Error, Flip, Late, ReadError, Torn, WriteError
from pyvirtio.testing import Guest
from pyvirtio.testing.blk import Disk, Kind, Verdict

SIZE = 1 << 20
SECTOR = 512
PAGE = bytes(range(256)) * 16


class Rig:
    """A disk in a machine and its driver."""

    def __init__(self, guest: Guest, backend: BlockBackend) -> None:
        self.device = Blk(backend)
        self.faults = self.device.faults
        self.driver = guest.plug(self.device)
        self.disk = Disk(self.driver)


@pytest.fixture(params=["python", "native"])
def rig(guest: Guest, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Rig]:
    if request.param == "native":
        image = tmp_path / "disk.img"
        image.write_bytes(bytes(SIZE))
        rig = Rig(guest, File(image))
    else:
        rig = Rig(guest, Memory(SIZE))
    yield rig
    vars(rig).clear()


def fails(rig: Rig, kind: Kind, sector: int, sectors: int = 1) -> bool:
    data, room = (b"", sectors * SECTOR) if kind is Kind.READ else (bytes(sectors * SECTOR), 0)
    return rig.disk.submit(kind, sector, data, room).wait() is Verdict.IOERR


def test_errors_are_for_requests_that_touch_the_sectors(rig: Rig) -> None:
    rig.faults.add(Error("8-15"))
    assert [fails(rig, Kind.READ, sector) for sector in (7, 8, 15, 16)] == [False, True, True, False]
    assert fails(rig, Kind.READ, 0, sectors=9)
    assert fails(rig, Kind.WRITE, 15)
    rig.faults.clear()
    assert not fails(rig, Kind.READ, 8)


@pytest.mark.parametrize(
    ("fault", "bad", "good"), [(ReadError, Kind.READ, Kind.WRITE), (WriteError, Kind.WRITE, Kind.READ)]
)
def test_errors_of_one_direction(rig: Rig, fault: type[Error], bad: Kind, good: Kind) -> None:
    rig.faults.add(fault("3"))
    assert fails(rig, bad, 3)
    assert not fails(rig, good, 3)
    assert not fails(rig, bad, 4)


def test_a_torn_write_stores_its_first_sectors_and_says_it_stored_all(rig: Rig) -> None:
    rig.faults.add(Torn(), seed=2)
    rig.disk.write(0, PAGE)
    rig.faults.clear()
    stored = rig.disk.read(0, len(PAGE))
    sectors = next(n for n in range(9) if stored[n * SECTOR :] == bytes(len(PAGE) - n * SECTOR))
    assert stored[: sectors * SECTOR] == PAGE[: sectors * SECTOR]
    assert sectors < 8


def test_one_bit_of_a_read_flips_and_the_disk_keeps_the_right_one(rig: Rig) -> None:
    rig.disk.write(0, PAGE)
    rig.faults.add(Flip())
    wrong = rig.disk.read(0, len(PAGE))
    assert (int.from_bytes(wrong) ^ int.from_bytes(PAGE)).bit_count() == 1
    rig.faults.clear()
    assert rig.disk.read(0, len(PAGE)) == PAGE


def test_all_else_still_works_behind_a_fault(rig: Rig) -> None:
    rig.faults.add(Error("2000"))
    rig.disk.write(0, PAGE)
    rig.disk.flush()
    rig.disk.write_zeroes(0, 1)
    assert rig.disk.read(0, len(PAGE)) == bytes(SECTOR) + PAGE[SECTOR:]
    rig.disk.discard(1, 1)


def test_the_write_cache_stays_as_the_driver_set_it(rig: Rig) -> None:
    rig.driver.config.writeback = 0
    rig.faults.add(Error("2000"))
    assert rig.device.plane.writethrough
    rig.faults.clear()
    assert rig.device.plane.writethrough


def test_faults_of_disk_and_ring_compose(rig: Rig) -> None:
    rig.faults.add(Late("1ms"), Error("4", chance=0.5), Flip(chance=0.5), seed=1)
    failed = [fails(rig, Kind.READ, 4) for _ in range(16)]
    assert 0 < sum(failed) < 16


def test_a_device_without_a_disk_has_no_fault_of_a_disk(guest: Guest) -> None:
    class Idle(Device, id=63):
        """No disk."""

        @queue(size=8)
        def idleq(self, vq: VirtQueue) -> None: ...

    device = Idle()
    guest.plug(device)
    with pytest.raises(ConfigError, match=r"^idle0: Idle has no disk that could go wrong"):
        device.faults.add(Flip())
    assert list(device.faults) == []
