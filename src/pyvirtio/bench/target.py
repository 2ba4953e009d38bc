"""A disk on a vhost-user socket, ready for loads."""

import struct
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Self

from pyvirtio._core import BlkLoad
from pyvirtio.bench.driver import Driver, allocate, usage
from pyvirtio.bench.load import DiskLoad, DiskSample, measured
from pyvirtio.errors import ConfigError, ProtocolError
from pyvirtio.spec import SECTOR, BlkFeature, Feature

DEVICE_FEATURES = (1 << 24) - 1
CONFIG = struct.Struct("<Q12xI")  # the parts of virtio_blk_config that matter: capacity and blk_size


class Target:
    """The disk behind `path`, set up for loads of up to `iodepth` requests in each queue; see `Driver`."""

    def __init__(self, path: Path, load: DiskLoad, iodepth: int, pid: int | None = None) -> None:
        self.load, self.iodepth = load, iodepth
        self._bytes = iodepth * (load.block_size + BlkLoad.CONTROL_BYTES)
        with ExitStack() as stack:
            self._driver = stack.enter_context(Driver(path, *allocate(load.num_queues * self._bytes), pid))
            self.pid = self._driver.pid
            with self._driver.faults():
                self._disk = self._set_up()
                self._fill()
            self._close = stack.pop_all().close

    def measure(self, iodepth: int, seconds: float, round_: int = 0) -> DiskSample:
        """Load the disk for some seconds, after a moment that does not count."""
        run = partial(self._disk.run, poll=self.load.poll, verify=self.load.verify)
        with self._driver.faults():
            return measured(run, self.load, iodepth, seconds, round_, lambda: usage({self.pid}))

    def check(self) -> None:
        """With `verify`: read all of the disk that is in use, and compare it with what was written."""
        if self.load.verify:
            with self._driver.faults():
                self._sweep(write_percent=0)

    @property
    def pids(self) -> set[int]:
        return {self.pid}

    def close(self) -> None:
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _sweep(self, write_percent: int) -> None:
        """Go through all blocks once, verified."""
        each = self._blocks // self.load.num_queues
        figures = self._disk.run(
            write_percent=write_percent, random=False, iodepth=self.iodepth, requests=each, poll=self.load.poll,
            verify=True,
        )  # fmt: skip
        if figures["errors"]:
            raise ProtocolError(f"{figures['errors']} of {each * self.load.num_queues} requests failed")

    def _fill(self) -> None:
        """With `verify`: write each block, so that whatever is read can be checked."""
        if self.load.verify:
            self._sweep(write_percent=100)

    def _set_up(self) -> BlkLoad:
        driver, load = self._driver, self.load
        options = {"--indirect": Feature.INDIRECT_DESC} if load.indirect else {}
        options |= {"--packed": Feature.RING_PACKED} if load.packed else {}
        driver.negotiate(DEVICE_FEATURES, load.num_queues, options)
        self._blocks = self._usable_blocks(driver.vm.read_config(32), driver.vm.features)
        names = [f"requestq{index}" for index in range(load.num_queues)]
        queues = driver.start(names, self._ring_size(), self._bytes, indirect=load.indirect)
        return BlkLoad(
            driver.memory, queues, block_size=load.block_size, blocks=self._blocks, iodepth=self.iodepth
        )  # fmt: skip

    def _ring_size(self) -> int:
        """Header, data and status take a descriptor each, unless they are in a table of their own."""
        needed = self.iodepth * (1 if self.load.indirect else 3)
        return max(16, 1 << (needed - 1).bit_length())

    def _usable_blocks(self, config: bytes, features: int) -> int:
        name, load = self._driver.name, self.load
        if features & BlkFeature.RO and (load.write_percent or load.verify):
            raise ConfigError(f"{name}: the disk is read-only, and --rw {load.rw} or --verify writes")
        sectors, block_size = CONFIG.unpack_from(config.ljust(CONFIG.size, b"\0"))
        if not sectors:
            raise ProtocolError("there is no disk, or an empty one")
        if features & BlkFeature.BLK_SIZE and block_size and load.block_size % block_size:
            raise ConfigError(f"{name}: --bs {load.block_size} is no multiple of the disk's {block_size}")
        blocks: int = min(sectors * SECTOR, load.size) // load.block_size
        least = load.num_queues * (self.iodepth + 1)
        if blocks < least:
            raise ConfigError(f"{name}: {blocks} blocks of {load.block_size} bytes are too few for this load ({least})")
        return blocks
