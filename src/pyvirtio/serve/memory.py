"""The memory table of a front-end: which of its files are guest memory, and where it has mapped them itself."""

import os
import stat
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pyvirtio._core import GuestMemory
from pyvirtio.errors import GuestError, ProtocolError

MAX_SLOTS = 64
END = 1 << 64


@dataclass(frozen=True)
class Region:
    """A part of guest memory. `user` is its address in the front-end's process, in which rings are described."""

    guest: int
    size: int
    user: int
    offset: int

    def check(self, fd: int) -> None:
        if max(self.guest, self.user) + self.size > END:
            raise ProtocolError(f"{self}: it passes the end of the address space")
        _check_file(f"{self}", self.size, self.offset, fd)

    def overlaps(self, other: "Region") -> bool:
        return any(
            a < b + other.size and b < a + self.size for a, b in ((self.guest, other.guest), (self.user, other.user))
        )

    def __str__(self) -> str:
        return f"memory region of {self.size:#x} bytes at {self.guest:#x}"


class MemoryTable:
    """The regions that a front-end has given us, and the guest memory that they make up.

    A change makes a new `memory`, which shares what stays as it is: chains in flight may keep many old ones. The fds
    are duplicated.
    """

    def __init__(self) -> None:
        self.memory = GuestMemory([])
        self._regions: list[Region] = []
        self._repeated: Counter[Region] = Counter()
        """How many more times each was added, and is to be removed."""

    def replace(self, regions: Sequence[Region], fds: Sequence[int]) -> None:
        """All regions at once. `ProtocolError` for what cannot be, and then nothing has changed."""
        for index, (region, fd) in enumerate(zip(regions, fds, strict=True)):
            _check_new(region, fd, regions[:index])
        self._map(regions, fds)
        self._repeated.clear()

    def add(self, region: Region, fd: int) -> None:
        """One more. QEMU 7.2 adds each of them for every queue pair of a network card, and removes it as often."""
        if region in self._regions and os.path.sameopenfile(fd, *self._fds([region])):
            self._repeated[region] += 1
            return
        if len(self._regions) >= MAX_SLOTS:
            raise ProtocolError(f"{region}: all {MAX_SLOTS} slots are in use")
        _check_new(region, fd, self._regions)
        self._map([*self._regions, region], [*self._fds(self._regions), fd])

    def remove(self, guest: int, size: int, user: int) -> None:
        region = next((r for r in self._regions if (r.guest, r.size, r.user) == (guest, size, user)), None)
        if region is None:
            raise ProtocolError(f"memory region of {size:#x} bytes at {guest:#x}: there is none to remove")
        if self._repeated[region]:
            self._repeated[region] -= 1
            return
        kept = [r for r in self._regions if r != region]
        self._map(kept, self._fds(kept))

    def translate(self, user: int) -> int:
        """The guest address of an address in the front-end's process."""
        for region in self._regions:
            if region.user <= user < region.user + region.size:
                return user - region.user + region.guest
        raise GuestError(f"ring address {user:#x} lies in no memory region of the front-end")

    def _fds(self, regions: Iterable[Region]) -> list[int]:
        """Those that the present memory keeps."""
        fds = {guest: fd for guest, _, fd, _ in self.memory.regions}
        return [fds[region.guest] for region in regions]

    def _map(self, regions: Sequence[Region], fds: Sequence[int]) -> None:
        pairs = zip(regions, fds, strict=True)
        self.memory = _remapped(self.memory, "the memory", [(r.guest, r.size, fd, r.offset) for r, fd in pairs])
        self._regions = list(regions)

    @property
    def end(self) -> int:
        """The guest address behind the last region."""
        return max((region.guest + region.size for region in self._regions), default=0)


def map_shared(what: str, size: int, offset: int, fd: int) -> GuestMemory:
    """A file of the front-end that is not memory of its guest, from address 0; `what` is its name in messages."""
    _check_file(what, size, offset, fd)
    return _remapped(GuestMemory([]), what, [(0, size, fd, offset)])


def _remapped(memory: GuestMemory, what: str, regions: list[tuple[int, int, int, int]]) -> GuestMemory:
    try:
        return memory.remap(regions)
    except (OSError, ValueError) as error:
        raise ProtocolError(f"{what} cannot be mapped: {error}") from error


def _check_file(what: str, size: int, offset: int, fd: int) -> None:
    if not size:
        raise ProtocolError(f"{what}: it is empty")
    file = os.fstat(fd)
    if not stat.S_ISREG(file.st_mode):
        raise ProtocolError(f"{what}: its file descriptor is not a file's")
    if offset + size > file.st_size:
        raise ProtocolError(f"{what}: it passes the end of its file ({file.st_size:#x} bytes)")


def _check_new(region: Region, fd: int, others: Iterable[Region]) -> None:
    region.check(fd)
    for other in others:
        if region.overlaps(other):
            raise ProtocolError(f"{region} overlaps the one at {other.guest:#x}")
