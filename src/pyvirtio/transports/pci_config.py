"""A PCI function as software sees it: configuration space, capabilities and BARs (PCI Local Bus 3.0, chapter 6)."""

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum, IntFlag
from typing import Any

from pyvirtio.errors import ConfigError

COMMAND = 0x04
STATUS = 0x06
FIRST_BAR = 0x10
CAPABILITY_POINTER = 0x34
INTERRUPT_LINE = 0x3C
INTERRUPT_PIN = 0x3D
FIRST_CAPABILITY = 0x40

STATUS_INTERRUPT = 1 << 3
STATUS_CAPABILITIES = 1 << 4


class Command(IntFlag):
    """The command register; bits that are not here read as 0."""

    IO = 1 << 0
    MEMORY = 1 << 1
    BUS_MASTER = 1 << 2
    INTX_DISABLE = 1 << 10


DECODING = (Command.IO | Command.MEMORY) << 8 * COMMAND | ((1 << 8 * 24) - 1) << 8 * FIRST_BAR
"""The bits of configuration space that say which addresses a function answers: the BARs, and two of the command."""


class BarKind(Enum):
    """What a BAR asks for: the read-only low bits of its register."""

    IO = 0x1
    MEM32 = 0x0
    MEM64_PREFETCH = 0xC


@dataclass(frozen=True)
class Bar:
    """A range of addresses that a function asks for; `size` is a power of two, in bytes."""

    index: int
    kind: BarKind
    size: int

    @property
    def offset(self) -> int:
        """Where its register is in configuration space."""
        return FIRST_BAR + 4 * self.index

    @property
    def width(self) -> int:
        """Bytes of its register."""
        return 8 if self.kind is BarKind.MEM64_PREFETCH else 4

    @property
    def decoded_by(self) -> Command:
        """The command register bit that switches its decoding on."""
        return Command.IO if self.kind is BarKind.IO else Command.MEMORY

    @property
    def address_mask(self) -> int:
        """The bits of its register that can be written: all ones written and read back tell the size."""
        return ((1 << 8 * self.width) - 1) & ~(self.size - 1)


@dataclass(frozen=True)
class Region:
    """A range of guest addresses that a BAR of `function` answers. `space` is "pio" or "mmio"."""

    space: str
    start: int
    end: int
    function: "PciFunction"
    bar: int


class ConfigSpace:
    """256 bytes with a mask of the bits that software may change."""

    SIZE = 256

    def __init__(self) -> None:
        self._data = bytearray(self.SIZE)
        self._writable = bytearray(self.SIZE)
        self._free = FIRST_CAPABILITY
        self._last_pointer = CAPABILITY_POINTER

    def put(self, offset: int, data: bytes, writable: bytes = b"") -> None:
        """Set bytes whatever their mask, and the mask too if it is given."""
        self._data[offset : offset + len(data)] = data
        if writable:
            self._writable[offset : offset + len(writable)] = writable

    def add_capability(self, identity: int, body: bytes, writable: bytes = b"") -> int:
        """Append to the capability list, 4-byte aligned; return the offset. `body` starts after the next pointer."""
        offset = self._free
        self.put(self._last_pointer, bytes([offset]))
        self.put(offset, bytes([identity, 0]) + body, bytes(2) + writable)
        self.put(STATUS, struct.pack("<H", STATUS_CAPABILITIES))
        self._last_pointer = offset + 1
        self._free = (offset + 2 + len(body) + 3) & ~3
        return offset

    def read(self, offset: int, size: int) -> int:
        return int.from_bytes(self._data[offset : offset + size], "little")

    def changes(self, offset: int, size: int, value: int) -> int:
        """The bits that a write would change, numbered from the start of configuration space."""
        writable = int.from_bytes(self._writable[offset : offset + size], "little")
        return ((self.read(offset, size) ^ value) & writable) << 8 * offset

    def write(self, offset: int, size: int, value: int) -> None:
        changed = self.changes(offset, size, value) >> 8 * offset
        self.put(offset, (self.read(offset, size) ^ changed).to_bytes(size, "little"))

    def restore(self, data: bytes) -> None:
        """Take the contents of another process. `ValueError` if what software cannot change differs."""
        for offset, (now, was, writable) in enumerate(zip(self._data, data, self._writable, strict=True)):
            if (now ^ was) & ~writable:
                raise ValueError(f"its configuration space has {now:#04x} at {offset:#04x} in place of {was:#04x}")
        self._data[:] = data

    def reset(self) -> None:
        """Everything that software changed goes back to 0; the read-only bits stay."""
        keep = zip(self._data, self._writable, strict=True)
        self._data[:] = bytes(byte & ~mask for byte, mask in keep)


class PciFunction:
    """One function on the bus: header, capabilities, BARs. Subclasses answer the accesses to its BARs.

    `slot` is its device number. `decoding_changed` is called after every change of the addresses it answers;
    the bus sets it.
    """

    def __init__(self, slot: int, *, device: int, class_code: int, revision: int = 0, vendor: int = 0x1AF4) -> None:
        self.slot = slot
        self.config = ConfigSpace()
        self.bars: list[Bar] = []
        self.decoding_changed: Callable[[], None] = lambda: None
        self.config.put(0x00, struct.pack("<HH", vendor, device))
        self.config.put(0x08, (class_code << 8 | revision).to_bytes(4, "little"))
        self.config.put(INTERRUPT_LINE, b"\0", b"\xff")

    def set_subsystem(self, vendor: int, device: int) -> None:
        self.config.put(0x2C, struct.pack("<HH", vendor, device))

    def set_commands(self, commands: Command) -> None:
        """The bits of the command register that can be set."""
        self.config.put(COMMAND, bytes(2), commands.to_bytes(2, "little"))

    def add_bar(self, bar: Bar) -> None:
        self.bars.append(bar)
        self.config.put(
            bar.offset, bar.kind.value.to_bytes(bar.width, "little"), bar.address_mask.to_bytes(bar.width, "little")
        )

    @property
    def command(self) -> Command:
        return Command(self.config.read(COMMAND, 2))

    def bar_address(self, bar: Bar) -> int | None:
        """The guest address of a BAR, or None while it is not decoded, not placed, or being sized."""
        address = self.config.read(bar.offset, bar.width) & bar.address_mask
        if bar.decoded_by not in self.command or address in (0, bar.address_mask):
            return None
        return address

    def place_bar(self, bar: Bar, address: int) -> None:
        """Write a BAR register, as firmware does."""
        self.config_write(bar.offset, 4, address & 0xFFFFFFFF)
        if bar.width == 8:
            self.config_write(bar.offset + 4, 4, address >> 32)

    def regions(self) -> Iterator[Region]:
        """The addresses that the function answers now."""
        for bar in self.bars:
            address = self.bar_address(bar)
            if address is not None:
                space = "pio" if bar.kind is BarKind.IO else "mmio"
                yield Region(space, address, address + bar.size, self, bar.index)

    def config_read(self, offset: int, size: int) -> int:
        """Any offset and size within the 256 bytes; never blocks."""
        return self.config.read(offset, size)

    def config_write(self, offset: int, size: int, value: int) -> None:
        moves = self.config.changes(offset, size, value) & DECODING
        self.config.write(offset, size, value)
        if moves:
            self.decoding_changed()

    def bar_read(self, bar: int, offset: int, size: int) -> int:
        """Answer a read; all ones where there is nothing."""
        return (1 << 8 * size) - 1

    def bar_write(self, bar: int, offset: int, size: int, value: int) -> None:
        """Take a write; ignored where there is nothing."""

    def reset(self) -> None:
        """Bus reset: BARs and command register go back to 0."""
        self.config.reset()
        self.decoding_changed()

    def save(self) -> dict[str, Any]:
        """Its state, for `restore` in another process; while nothing runs."""
        return {"config": self.config.read(0, ConfigSpace.SIZE).to_bytes(ConfigSpace.SIZE, "little")}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `save`. `ConfigError` if it was another function or had other properties."""
        try:
            self.config.restore(state["config"])
        except ValueError as error:
            raise ConfigError(f"pci: slot {self.slot}: {error}: another device, or another property") from error
        self.decoding_changed()

    def close(self) -> None:
        """The function leaves the machine."""
