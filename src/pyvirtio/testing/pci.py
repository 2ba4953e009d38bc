"""What a driver does with a PCI function: configuration space, BARs, capabilities, MSI-X.

Nothing here knows the device's side; every access takes the path of a vCPU's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from pyvirtio._core import Bus

CONFIG_ADDRESS, CONFIG_DATA = 0xCF8, 0xCFC
COMMAND, BAR0, CAPABILITY_POINTER = 0x04, 0x10, 0x34
IO, MEMORY, BUS_MASTER = 1, 2, 4
VENDOR_SPECIFIC, MSIX = 0x09, 0x11

Space = Literal["pio", "mmio"]
Layout = dict[str, tuple[int, int]]  # name -> offset, bytes


class Window:
    """A range of ports or of memory, reached as a vCPU does. `base` follows the BAR."""

    def __init__(self, bus: Bus, space: Space, base: int) -> None:
        self.bus, self.space, self.base = bus, space, base

    def read(self, offset: int, size: int) -> int:
        read = self.bus.pio_read if self.space == "pio" else self.bus.mmio_read
        return read(self.base + offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        write = self.bus.pio_write if self.space == "pio" else self.bus.mmio_write
        write(self.base + offset, size, value)


class Registers:
    """Named registers from `start` of a window on: attributes that are read and written where the device has them.

    A register of 8 bytes is accessed as two halves, as the specification asks of drivers (virtio 1.3, 4.1.3.1).
    """

    def __init__(self, window: Window, start: int, layout: Layout, length: int = 0) -> None:
        vars(self).update(window=window, start=start, layout=layout, length=length)

    def __getattr__(self, name: str) -> int:
        offset, size = _field(self.layout, name)
        return sum(self.read(offset + at, min(size - at, 4)) << 8 * at for at in range(0, size, 4))

    def __setattr__(self, name: str, value: int) -> None:
        offset, size = _field(self.layout, name)
        for at in range(0, size, 4):
            part = min(size - at, 4)
            self.write(offset + at, part, value >> 8 * at & (1 << 8 * part) - 1)

    def read(self, offset: int, size: int) -> int:
        """Any offset and width, whatever stands there."""
        value: int = self.window.read(self.start + offset, size)
        return value

    def write(self, offset: int, size: int, value: int) -> None:
        self.window.write(self.start + offset, size, value)

    def bytes(self, offset: int, length: int) -> bytes:
        return bytes(self.read(offset + n, 1) for n in range(length))

    window: Any
    start: Any
    layout: Any
    length: Any


def _field(layout: Layout, name: str) -> tuple[int, int]:
    if name not in layout:
        raise AttributeError(name)
    return layout[name]


class Capability(NamedTuple):
    """An entry of the capability list: its offset in configuration space and its id."""

    offset: int
    id: int


class Pci:
    """One function on the bus, by its slot, found through mechanism 1.

    Sizes its BARs and places them at what `allocate(space, size)` returns, as an operating system does on hot-plug.
    """

    def __init__(self, bus: Bus, slot: int, allocate: Callable[[Space, int], int]) -> None:
        self.bus, self.slot = bus, slot
        self.bars: dict[int, Window] = {}
        self.sizes: dict[int, int] = {}
        for index, space, size in list(self._sized_bars()):
            self.sizes[index] = size
            self.bars[index] = Window(bus, space, 0)
            self.move_bar(index, allocate(space, size))

    def read(self, offset: int, size: int) -> int:
        """Configuration space; the width is the access's own."""
        self._select(offset)
        return self.bus.pio_read(CONFIG_DATA + offset % 4, size)

    def write(self, offset: int, size: int, value: int) -> None:
        self._select(offset)
        self.bus.pio_write(CONFIG_DATA + offset % 4, size, value)

    def _select(self, offset: int) -> None:
        self.bus.pio_write(CONFIG_ADDRESS, 4, 1 << 31 | self.slot << 11 | offset & 0xFC)

    @property
    def command(self) -> int:
        return self.read(COMMAND, 2)

    @command.setter
    def command(self, value: int) -> None:
        self.write(COMMAND, 2, value)

    def _sized_bars(self) -> Iterator[tuple[int, Space, int]]:
        """(index, space, bytes) of each BAR, found by writing all ones (PCI Local Bus 3.0, 6.2.5.1)."""
        index = 0
        while index < 6:
            at, kind = BAR0 + 4 * index, self.read(BAR0 + 4 * index, 4) & 0xF
            wide = kind & 5 == 4
            mask = 0
            for half in range(1 + wide):
                self.write(at + 4 * half, 4, 0xFFFFFFFF)
                mask |= self.read(at + 4 * half, 4) << 32 * half
                self.write(at + 4 * half, 4, 0)
            if mask:
                low_bits, width = (3, 32) if kind & 1 else (15, 64 if wide else 32)
                yield index, "pio" if kind & 1 else "mmio", (1 << width) - (mask & ~low_bits)
            index += 1 + wide

    def bar_address(self, bar: int) -> int:
        """What the BAR's register says now."""
        low = self.read(BAR0 + 4 * bar, 4)
        if low & 1:
            return low & ~3
        high = self.read(BAR0 + 4 * bar + 4, 4) if low & 4 else 0
        return high << 32 | low & ~0xF

    def move_bar(self, bar: int, address: int) -> None:
        """Place a BAR elsewhere, and go on there."""
        wide = self.read(BAR0 + 4 * bar, 4) & 5 == 4
        self.write(BAR0 + 4 * bar, 4, address & 0xFFFFFFFF)
        if wide:
            self.write(BAR0 + 4 * bar + 4, 4, address >> 32)
        self.bars[bar].base = address

    @cached_property
    def capabilities(self) -> list[Capability]:
        """The capability list, which does not change."""
        return list(self._walk())

    def _walk(self) -> Iterator[Capability]:
        offset = self.read(CAPABILITY_POINTER, 1)
        while offset:
            yield Capability(offset, self.read(offset, 1))
            offset = self.read(offset + 1, 1)

    def capability(self, id_: int) -> int | None:
        """The offset of the first capability with this id."""
        return next((cap.offset for cap in self.capabilities if cap.id == id_), None)


class Msix:
    """The MSI-X table of a function (PCI Local Bus 3.0, 6.8.2)."""

    ENABLE, FUNCTION_MASK = 0x8000, 0x4000

    def __init__(self, pci: Pci, offset: int) -> None:
        self.pci, self.offset = pci, offset
        self.count = (self.control & 0x7FF) + 1
        self._table = self._window(4)
        self._pba = self._window(8)

    def _window(self, at: int) -> tuple[Window, int]:
        where = self.pci.read(self.offset + at, 4)
        return self.pci.bars[where & 7], where & ~7

    @property
    def control(self) -> int:
        return self.pci.read(self.offset + 2, 2)

    @control.setter
    def control(self, value: int) -> None:
        self.pci.write(self.offset + 2, 2, value)

    def set_message(self, entry: int, address: int, data: int) -> None:
        window, start = self._table
        for at, value in ((0, address & 0xFFFFFFFF), (4, address >> 32), (8, data)):
            window.write(start + 16 * entry + at, 4, value)

    def mask(self, entry: int, masked: bool) -> None:
        window, start = self._table
        window.write(start + 16 * entry + 12, 4, int(masked))

    def pending(self, entry: int) -> bool:
        window, start = self._pba
        return bool(window.read(start + entry // 32 * 4, 4) >> entry % 32 & 1)
