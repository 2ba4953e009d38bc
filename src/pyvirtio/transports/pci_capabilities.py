"""The virtio capabilities: where in which BAR a structure is, and the window on the BARs (virtio 1.3, 4.1.4)."""

import struct
from enum import IntEnum

from pyvirtio.transports.pci_config import PciFunction

VENDOR_SPECIFIC = 0x09


class CfgType(IntEnum):
    """Which structure a capability describes."""

    COMMON = 1
    NOTIFY = 2
    ISR = 3
    DEVICE = 4
    PCI = 5


def describe(cfg_type: CfgType, bar: int, offset: int, length: int, tail: bytes = b"") -> bytes:
    """`struct virtio_pci_cap` from its third byte on; `tail` is what follows it for some types."""
    return struct.pack("<BBBBHII", 16 + len(tail), cfg_type, bar, 0, 0, offset, length) + tail


class ConfigWindow:
    """The PCI_CFG capability: reaches what is in the BARs through configuration space (4.1.4.9)."""

    BAR, OFFSET, DATA = 4, 8, 16

    def __init__(self, function: PciFunction) -> None:
        self.function = function
        body = describe(CfgType.PCI, 0, 0, 0, bytes(4))
        writable = bytes(2) + b"\xff" + bytes(3) + b"\xff" * 12
        self.at = function.config.add_capability(VENDOR_SPECIFIC, body, writable)

    def covers(self, offset: int, size: int) -> bool:
        """Whether an access to configuration space touches the data of the window."""
        data = self.at + self.DATA
        return offset < data + 4 and offset + size > data

    def read(self) -> None:
        """Fetch what the window is on into its data; a window on nothing leaves it alone."""
        target = self._target()
        if target:
            bar, offset, length = target
            value = self.function.bar_read(bar, offset, length)
            self.function.config.put(self.at + self.DATA, value.to_bytes(length, "little"))

    def write(self) -> None:
        """Write its data to what the window is on."""
        target = self._target()
        if target:
            bar, offset, length = target
            self.function.bar_write(bar, offset, length, self.function.config.read(self.at + self.DATA, length))

    def _target(self) -> tuple[int, int, int] | None:
        """BAR, offset and length that the driver chose, if they are a possible access."""
        config = self.function.config
        index = config.read(self.at + self.BAR, 1)
        offset, length = config.read(self.at + self.OFFSET, 4), config.read(self.at + self.OFFSET + 4, 4)
        bar = next((bar for bar in self.function.bars if bar.index == index), None)
        if bar is None or length not in (1, 2, 4) or offset % length or offset + length > bar.size:
            return None
        return index, offset, length
