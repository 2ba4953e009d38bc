"""The two register layouts of virtio-pci as a driver uses them (virtio 1.3, 4.1.4 and 4.1.4.10)."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from pyvirtio.device import Device
from pyvirtio.testing.pci import BUS_MASTER, IO, MEMORY, VENDOR_SPECIFIC, Layout, Pci, Registers, Window
from pyvirtio.testing.queue import Ring

COMMON_CFG, NOTIFY_CFG, ISR_CFG, DEVICE_CFG, PCI_CFG = 1, 2, 3, 4, 5

COMMON: Layout = {
    "device_feature_select": (0, 4),
    "device_feature": (4, 4),
    "driver_feature_select": (8, 4),
    "driver_feature": (12, 4),
    "config_msix_vector": (16, 2),
    "num_queues": (18, 2),
    "device_status": (20, 1),
    "config_generation": (21, 1),
    "queue_select": (22, 2),
    "queue_size": (24, 2),
    "queue_msix_vector": (26, 2),
    "queue_enable": (28, 2),
    "queue_notify_off": (30, 2),
    "queue_desc": (32, 8),
    "queue_driver": (40, 8),
    "queue_device": (48, 8),
    "queue_notif_config_data": (56, 2),
    "queue_reset": (58, 2),
}

LEGACY: Layout = {
    "device_features": (0, 4),
    "driver_features": (4, 4),
    "queue_address": (8, 4),
    "queue_size": (12, 2),
    "queue_select": (14, 2),
    "queue_notify": (16, 2),
    "device_status": (18, 1),
    "isr_status": (19, 1),
    "config_msix_vector": (20, 2),
    "queue_msix_vector": (22, 2),
}


def config_layout(device: Device) -> Layout:
    """The configuration space of a device by the names of its fields."""
    layout_of = device.config_layout
    names = [field[0] for field in layout_of._fields_] if layout_of else []
    return {name: (getattr(layout_of, name).offset, getattr(layout_of, name).size) for name in names}


class Structure(NamedTuple):
    """A virtio structure that a vendor-specific capability points to (4.1.4)."""

    capability: int
    bar: int
    offset: int
    length: int


def structures(pci: Pci, kind: int) -> list[Structure]:
    """Those of one `cfg_type`, in the order of the capability list."""
    return [
        Structure(cap.offset, pci.read(cap.offset + 4, 1), pci.read(cap.offset + 8, 4), pci.read(cap.offset + 12, 4))
        for cap in pci.capabilities
        if cap.id == VENDOR_SPECIFIC and pci.read(cap.offset + 3, 1) == kind
    ]


class VirtioRegisters(Protocol):
    """What both layouts can do."""

    common: Registers
    config: Registers

    def offered(self) -> int: ...
    def accept(self, features: int) -> None: ...
    def queue_size(self, index: int) -> int: ...
    def set_queue_size(self, index: int, size: int) -> int: ...
    def set_queue_vector(self, index: int, vector: int) -> int: ...
    def enable_queue(self, index: int, ring: Ring) -> None: ...
    def notifier(self, index: int) -> tuple[Window, int]: ...
    def read_isr(self) -> int: ...


class Modern:
    """The capabilities' structures (4.1.4.3 and on)."""

    def __init__(self, pci: Pci, config: Layout) -> None:
        self.pci = pci
        pci.command = MEMORY | IO | BUS_MASTER
        self.common = self._registers(COMMON_CFG, COMMON)
        self.isr = self._registers(ISR_CFG, {"status": (0, 1)})
        self.config = self._registers(DEVICE_CFG, config)
        self.notify_structures = structures(pci, NOTIFY_CFG)

    def _registers(self, kind: int, layout: Layout) -> Registers:
        found = structures(self.pci, kind)
        if not found:
            return Registers(self.pci.bars[min(self.pci.bars)], 0, {})
        return Registers(self.pci.bars[found[0].bar], found[0].offset, layout, found[0].length)

    def offered(self) -> int:
        features = 0
        for half in (0, 1):
            self.common.device_feature_select = half
            features |= self.common.device_feature << 32 * half
        return features

    def accept(self, features: int) -> None:
        for half in (0, 1):
            self.common.driver_feature_select = half
            self.common.driver_feature = features >> 32 * half & 0xFFFFFFFF

    def queue_size(self, index: int) -> int:
        self.common.queue_select = index
        return self.common.queue_size

    def set_queue_size(self, index: int, size: int) -> int:
        """Returns what the register reads back."""
        self.common.queue_select = index
        self.common.queue_size = size
        return self.common.queue_size

    def set_queue_vector(self, index: int, vector: int) -> int:
        """Returns what the register reads back; NO_VECTOR is a refusal."""
        self.common.queue_select = index
        self.common.queue_msix_vector = vector
        return self.common.queue_msix_vector

    def enable_queue(self, index: int, ring: Ring) -> None:
        self.common.queue_select = index
        self.common.queue_desc = ring.desc
        self.common.queue_driver = ring.avail
        self.common.queue_device = ring.used
        self.common.queue_enable = 1

    def notifier(self, index: int, structure: int = 0) -> tuple[Window, int]:
        """Where to write the number of a queue to notify it: in the given one of the notify structures."""
        cap = self.notify_structures[structure]
        self.common.queue_select = index
        multiplier = self.pci.read(cap.capability + 16, 4)
        return self.pci.bars[cap.bar], cap.offset + self.common.queue_notify_off * multiplier

    def read_isr(self) -> int:
        return self.isr.status


class Legacy:
    """The legacy interface's registers in BAR 0 (4.1.4.10)."""

    def __init__(self, pci: Pci, config: Layout, *, msix: bool) -> None:
        self.pci = pci
        pci.command = MEMORY | IO | BUS_MASTER
        self.common = Registers(pci.bars[0], 0, LEGACY)
        self.config = Registers(pci.bars[0], 24 if msix else 20, config)

    def offered(self) -> int:
        return self.common.device_features

    def accept(self, features: int) -> None:
        self.common.driver_features = features & 0xFFFFFFFF

    def queue_size(self, index: int) -> int:
        self.common.queue_select = index
        return self.common.queue_size

    def set_queue_size(self, index: int, size: int) -> int:
        """A legacy driver takes the device's size."""
        return self.queue_size(index)

    def set_queue_vector(self, index: int, vector: int) -> int:
        self.common.queue_select = index
        self.common.queue_msix_vector = vector
        return self.common.queue_msix_vector

    def enable_queue(self, index: int, ring: Ring) -> None:
        self.common.queue_select = index
        self.common.queue_address = ring.desc >> 12

    def notifier(self, index: int) -> tuple[Window, int]:
        return self.pci.bars[0], LEGACY["queue_notify"][0]

    def read_isr(self) -> int:
        return self.common.isr_status
