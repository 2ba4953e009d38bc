"""Memory balloon device (virtio 1.3, 5.5)."""

import logging
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from ctypes import LittleEndianStructure, c_uint32
from enum import IntEnum, IntFlag
from itertools import pairwise
from typing import Annotated

from pyvirtio._core import Chain, VirtQueue
from pyvirtio.device import Device, queue
from pyvirtio.errors import StaleChain
from pyvirtio.spec import DeviceId

PAGE = 4096
PIECE = 16 * 1024
"""Bytes of page numbers that are looked at in one message; Linux sends 1024."""

log = logging.getLogger("pyvirtio")


class BalloonFeature(IntFlag):
    """Feature bits (5.5.3)."""

    STATS_VQ = 1 << 1
    DEFLATE_ON_OOM = 1 << 2
    REPORTING = 1 << 5


class Stat(IntEnum):
    """What the guest tells of its memory (5.5.6.4); bytes, unless it says events."""

    SWAP_IN = 0
    SWAP_OUT = 1
    MAJOR_FAULTS = 2  # events
    MINOR_FAULTS = 3  # events
    FREE_MEMORY = 4
    TOTAL_MEMORY = 5
    AVAILABLE_MEMORY = 6
    DISK_CACHES = 7
    HTLB_ALLOCATIONS = 8  # events
    HTLB_FAILURES = 9  # events


class BalloonConfig(LittleEndianStructure):
    """`struct virtio_balloon_config` (5.5.4), in pages of 4096 bytes."""

    _pack_ = 1
    _fields_ = (
        ("num_pages", c_uint32),
        ("actual", c_uint32),
        ("free_page_hint_cmd_id", c_uint32),
        ("poison_val", c_uint32),
    )


class Balloon(Device, id=DeviceId.BALLOON, config=BalloonConfig):
    """Takes memory from the guest while it is told to, and gives it back. Pages in it belong to the host.

    A page that the guest names more than once, or uses all the same, only reads as zeroes.
    """

    pci_class = 0x00FF00
    STAT = struct.Struct("<HQ")
    MAX_STATS = 32
    """Entries of one message that are looked at."""

    def __init__(
        self,
        *,
        deflate_on_oom: Annotated[bool, "let the guest take pages back when it runs out of memory"] = False,
        free_page_reporting: Annotated[bool, "let the guest report free pages, which the host takes"] = False,
    ) -> None:
        self.device_features = BalloonFeature.STATS_VQ
        if deflate_on_oom:
            self.device_features |= BalloonFeature.DEFLATE_ON_OOM
        if free_page_reporting:
            self.device_features |= BalloonFeature.REPORTING
        self.stats: dict[str, int] = {}
        """What the guest said last, by names such as `free-memory`."""
        self._statsq: VirtQueue | None = None
        self._wanted = 0
        self._told = False
        self._fresh = threading.Event()
        self._lock = threading.RLock()

    @queue(size=128)
    def inflateq(self, vq: VirtQueue) -> None:
        for chain in vq:
            self._release(chain, chain.read(PIECE))
            chain.complete()

    @queue(size=128)
    def deflateq(self, vq: VirtQueue) -> None:
        """The pages come back by being used; there is nothing to do for them."""
        for chain in vq:
            chain.complete()

    @queue(size=64)
    def statsq(self, vq: VirtQueue) -> None:
        """The driver's buffer stays in the ring until somebody wants to know: giving it back asks for another."""
        with self._lock:
            self._statsq = vq
            self._look_at_stats()

    @queue(size=32)
    def reporting_vq(self, vq: VirtQueue) -> None:
        for chain in vq:
            with self._tolerant():
                chain.discard_buffers()
            chain.complete()

    @property
    def target(self) -> int:
        """How many pages are to be in the balloon."""
        return int(self.config.num_pages)

    @target.setter
    def target(self, pages: int) -> None:
        with self.update_config() as config:
            config.num_pages = pages

    @property
    def actual(self) -> int:
        """How many pages are in it, as the driver says."""
        return int(self.config.actual)

    def write_config(self, offset: int, data: bytes) -> None:
        """A driver tells `actual`, maybe byte by byte, and nothing else."""
        start = offset - BalloonConfig.actual.offset
        actual = bytearray(self.actual.to_bytes(4, "little"))
        if 0 <= start <= len(actual) - len(data):
            actual[start : start + len(data)] = data
            self.config.actual = int.from_bytes(actual, "little")

    def ask_stats(self, timeout: float = 0) -> dict[str, int]:
        """Ask the guest, and return what it said last: the answer, if it comes within `timeout` seconds."""
        with self._lock, suppress(StaleChain):  # the driver may reset the device at any time
            self._fresh.clear()
            self._wanted = 2  # the buffer that is there says what was, the next one what is
            self._look_at_stats()
        self._fresh.wait(timeout)
        return self.stats

    def reset(self) -> None:
        with self._lock:
            self.config.actual = 0
            self.stats = {}
            self._statsq = None
            self._wanted = 0

    def _look_at_stats(self) -> None:
        while self._wanted and self._statsq is not None and (chain := next(self._statsq, None)):
            entries = chain.read(self.STAT.size * self.MAX_STATS)
            self._wanted -= 1
            if not self._wanted:
                self.stats = dict(self._named(entries))
                self._fresh.set()
            chain.complete()

    def _named(self, entries: bytes) -> Iterator[tuple[str, int]]:
        whole = len(entries) // self.STAT.size * self.STAT.size
        for tag, value in self.STAT.iter_unpack(entries[:whole]):
            if tag in set(Stat):
                yield Stat(tag).name.lower().replace("_", "-"), value

    def _release(self, chain: Chain, numbers: bytes) -> None:
        count = len(numbers) // 4
        for first, pages in runs(sorted(set(struct.unpack_from(f"<{count}I", numbers)))):
            with self._tolerant():
                chain.discard(first * PAGE, pages * PAGE)

    @contextmanager
    def _tolerant(self) -> Iterator[None]:
        """A host that cannot take the pages has told so once, and the guest does not get to know."""
        try:
            yield
        except OSError as error:
            if not self._told:
                log.warning("%s: pages stay with the guest: %s", self.name, error.strerror)
            self._told = True


def runs(numbers: list[int]) -> Iterator[tuple[int, int]]:
    """The first number and the length of each run of consecutive ones in a sorted list."""
    borders = [index for index, (a, b) in enumerate(pairwise(numbers), 1) if b != a + 1]
    for start, end in pairwise([0, *borders, len(numbers)]):
        if start < end:
            yield numbers[start], end - start
