"""What the memory of a front-end costs while old versions of it are in use."""

from pyvirtio._core import GuestMemory
from pyvirtio.serve.memory import MAX_SLOTS, MemoryTable, Region

PAGE = 4096
VERSIONS = 100


def test_memory_that_is_kept_costs_no_more_than_what_changed() -> None:
    """A process watches 4096 regions. Chains in flight keep their memory, and must not use these up for others."""
    file = GuestMemory.allocate([(0, MAX_SLOTS * PAGE)])
    ((_, _, fd, _),) = file.regions
    regions = [Region(at, PAGE, at, at) for at in range(0, MAX_SLOTS * PAGE, PAGE)]
    last = regions[-1]
    table = MemoryTable()
    table.replace(regions, [fd] * MAX_SLOTS)
    kept = []
    for _ in range(VERSIONS):
        kept.append(table.memory)
        table.remove(last.guest, last.size, last.user)
        kept.append(table.memory)
        table.add(last, fd)
    kept[0].write(last.guest, b"still there")
    assert table.memory.read(last.guest, 11) == b"still there"
    assert [len(memory.regions) for memory in kept] == [MAX_SLOTS, MAX_SLOTS - 1] * VERSIONS
