"""Addresses to hand out: guest RAM for buffers and rings, ports and memory for BARs."""

from __future__ import annotations

from collections import defaultdict


class Heap:
    """Hands out ranges of `[start, end)` in powers of two, aligned to their size but at most to `align`."""

    def __init__(self, start: int, end: int, align: int = 4096) -> None:
        self._next, self._end, self._align = start, end, align
        self._free: defaultdict[int, list[int]] = defaultdict(list)

    def allocate(self, size: int) -> int:
        """The address of `size` bytes, at least 16; what they contain is anything."""
        room = _room(size)
        if free := self._free[room]:
            return free.pop()
        align = min(room, self._align)
        address = -(-self._next // align) * align
        if address + room > self._end:
            raise MemoryError(f"{size} bytes wanted of {self._end - self._next} left")
        self._next = address + room
        return address

    def free(self, address: int, size: int) -> None:
        self._free[_room(size)].append(address)


def _room(size: int) -> int:
    return 1 << (size - 1).bit_length() if size > 16 else 16
