"""The block device: its configuration space, the write cache, and options that cannot be."""

import os
from pathlib import Path

import pytest

from pyvirtio import ConfigError
from pyvirtio.backends.block import File, Memory
from pyvirtio.devices.blk import Blk
from pyvirtio.spec import BlkFeature
from pyvirtio.testing import Guest
from pyvirtio.testing.blk import Disk

MIB = 1 << 20


class Logged(Memory):
    """A RAM disk that remembers the calls."""

    def __init__(self, capacity: int = MIB) -> None:
        super().__init__(capacity)
        self.calls: list[str] = []

    def pwritev(self, buffers: list[memoryview], offset: int) -> None:
        self.calls.append("pwritev")
        super().pwritev(buffers, offset)

    def flush(self) -> None:
        self.calls.append("flush")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(MIB))
    return path


def test_config_says_what_the_disk_is(guest: Guest, image: Path) -> None:
    config = guest.plug(
        Blk(File(image), logical_block_size=1024, physical_block_size=4096, min_io_size=4096, opt_io_size=65536)
    ).config
    assert config.capacity == 2048
    assert config.blk_size == 1024
    assert config.physical_block_exp == 2
    assert (config.min_io_size, config.opt_io_size) == (4, 64)
    assert config.writeback == 1
    assert config.max_discard_sectors > 0
    assert config.max_discard_seg == 1
    assert config.discard_sector_alignment == 2
    assert config.max_write_zeroes_sectors > 0


def test_config_reads_the_same_over_the_legacy_registers(guest: Guest, image: Path) -> None:
    for msix in (False, True):
        driver = guest.plug(Blk(File(image)), transport="legacy", msix=msix)
        assert driver.config.capacity == 2048
        assert driver.config.blk_size == 512
        guest.unplug(driver)


def flushes_after_a_write(disk: Disk, backend: Logged) -> bool:
    backend.calls.clear()
    disk.write(0, bytes(512))
    return backend.calls == ["pwritev", "flush"]


def test_write_cache_off_flushes_after_each_write(guest: Guest) -> None:
    backend = Logged()
    disk = Disk(guest.plug(Blk(backend, write_cache=False)))
    assert disk.driver.config.writeback == 0
    assert flushes_after_a_write(disk, backend)


def test_the_driver_switches_the_write_cache(guest: Guest) -> None:
    backend = Logged()
    disk = Disk(guest.plug(Blk(backend)))
    assert not flushes_after_a_write(disk, backend)
    disk.driver.config.writeback = 0
    assert flushes_after_a_write(disk, backend)
    disk.driver.config.writeback = 1
    assert not flushes_after_a_write(disk, backend)


def test_without_config_wce_the_write_cache_stays(guest: Guest) -> None:
    backend = Logged()
    disk = Disk(guest.plug(Blk(backend, config_wce=False)))
    disk.driver.config.writeback = 0
    assert disk.driver.config.writeback == 1
    assert not flushes_after_a_write(disk, backend)


def test_a_reset_restores_the_write_cache(guest: Guest) -> None:
    backend = Logged()
    disk = Disk(guest.plug(Blk(backend)))
    disk.driver.config.writeback = 0
    disk.driver.start()
    assert disk.driver.config.writeback == 1
    assert not flushes_after_a_write(Disk(disk.driver), backend)


def test_a_driver_that_cannot_flush_gets_durable_writes(guest: Guest) -> None:
    backend = Logged()
    disk = Disk(guest.plug(Blk(backend), features=~BlkFeature.FLUSH & ~BlkFeature.CONFIG_WCE))
    assert flushes_after_a_write(disk, backend)


@pytest.mark.parametrize(("queue_size", "segments"), [(256, 126), (128, 126), (64, 62), (2, 1)])
def test_a_request_of_the_most_segments_fits_its_ring(guest: Guest, queue_size: int, segments: int) -> None:
    """A front-end over vhost-user makes rings of 128 although ours could be larger."""
    disk = Disk(guest.plug(Blk(Logged(), queue_size=queue_size)))
    assert disk.driver.config.seg_max == segments


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"serial": "x" * 21}, "serial"),
        ({"queue_size": 48}, "queue-size=48"),
        ({"logical_block_size": 1000}, "logical-block-size=1000"),
        ({"logical_block_size": 4096, "physical_block_size": 512}, "physical-block-size=512"),
        ({"min_io_size": 700}, "min-io-size=700"),
    ],
)
def test_impossible_options_are_refused_by_name(image: Path, options: dict[str, int | str], said: str) -> None:
    drive = File(image)
    try:
        with pytest.raises(ConfigError, match=said):
            Blk(drive, **options)  # type: ignore[arg-type]
    finally:
        drive.close()
