"""Addresses to hand out: guest RAM for buffers and rings, ports and memory for BARs."""

from __future__ import annotations


class Free(dict[int, list[int]]):
    """Addresses that were given back, by the size they have room for; what gets the same room shares them."""

    def __missing__(self, size: int) -> list[int]:
        room = _room(size)
        self[size] = addresses = [] if size == room else self[room]
        return addresses


class Heap:
    """Hands out ranges of `[start, end)` in powers of two, aligned to their size but at most to `align`."""

    def __init__(self, start: int, end: int, align: int = 4096) -> None:
        self._next, self._end, self._align = start, end, align
        self._free = Free()

    def allocate(self, size: int) -> int:
        """The address of `size` bytes, at least 16; what they contain is anything."""
        if free := self._free[size]:
            return free.pop()
        room = _room(size)
        align = min(room, self._align)
        address = -(-self._next // align) * align
        if address + room > self._end:
            raise MemoryError(f"{size} bytes wanted of {self._end - self._next} left")
        self._next = address + room
        return address

    def free(self, address: int, size: int) -> None:
        self._free[size].append(address)


def _room(size: int) -> int:
    return 1 << (size - 1).bit_length() if size > 16 else 16
