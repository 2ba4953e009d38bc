"""virtio-pci: one transitional transport with the legacy and the modern interface (virtio 1.3, 4.1).

BARs as in QEMU: 0 legacy registers (I/O), 1 MSI-X, 2 notify register in I/O space, 4 modern structures.
"""

import logging
import struct
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, nullcontext
from threading import RLock
from typing import Annotated, Any

from pyvirtio._core import VirtQueue
from pyvirtio.dataplane import Dataplane, IoThread
from pyvirtio.device import STORABLE, Device, is_storable
from pyvirtio.errors import ConfigError, raised
from pyvirtio.properties import Range
from pyvirtio.spec import DeviceId, Feature
from pyvirtio.transports import msix, pci_legacy
from pyvirtio.transports.base import Accelerator, DriverState, IoAddress, Undo
from pyvirtio.transports.msix import MsixTable
from pyvirtio.transports.pci_capabilities import VENDOR_SPECIFIC, CfgType, ConfigWindow, describe
from pyvirtio.transports.pci_config import (
    DECODING,
    INTERRUPT_PIN,
    STATUS,
    STATUS_INTERRUPT,
    Bar,
    BarKind,
    Command,
    PciFunction,
)
from pyvirtio.transports.pci_interrupts import Interrupts
from pyvirtio.transports.pci_legacy import LegacyRegisters
from pyvirtio.transports.pci_modern import CommonConfig
from pyvirtio.vhost.kernel import VhostNet

LEGACY_BAR, MSIX_BAR, PIO_NOTIFY_BAR, MODERN_BAR = 0, 1, 2, 4
ISR_REGION, DEVICE_REGION, NOTIFY_REGION = 0x1000, 0x2000, 0x3000
REGION_SIZE = 0x1000

TRANSITIONAL_IDS = {
    DeviceId.NET: 0x1000,
    DeviceId.BLOCK: 0x1001,
    DeviceId.BALLOON: 0x1002,
    DeviceId.CONSOLE: 0x1003,
    DeviceId.SCSI: 0x1004,
    DeviceId.ENTROPY: 0x1005,
}
"""PCI device ids (4.1.2.1); a device type that is not here has no legacy interface."""
MODERN_ID = 0x1040
SUBSYSTEM_MODERN = 0x1100

ADVANCED_FEATURES = 0x13
AF_CONTROL = 4
INITIATE_FLR = 1

log = logging.getLogger("pyvirtio")


class VirtioPci(PciFunction):
    """A virtio device on the PCI bus.

    Register writes take the lock of the transport, so that one of them is done at a time; reads and notifies do not, so
    that neither waits for a reset that waits for I/O. All methods may be called from any thread.
    """

    def __init__(
        self,
        device: Device,
        accel: Accelerator,
        *,
        name: str,
        iothread: Annotated[IoThread, "I/O thread that serves the queues, by default one for all devices"],
        slot: Annotated[int, "slot on the bus, by default the next free one", Range(1, 31)],
        iothread_vq_mapping: Annotated[
            Sequence[IoThread], "I/O threads that the queues, of net the queue pairs, are dealt out to in turn"
        ] = (),
        ioeventfd: Annotated[bool | None, "kicks do not leave the guest; the device type's default"] = None,
        vectors: Annotated[
            int | None, "MSI-X vectors, 0 = INTx only; one more than queues", Range(0, msix.MAX_VECTORS)
        ] = None,
        disable_legacy: Annotated[bool, "no legacy interface"] = False,
        disable_modern: Annotated[bool, "no modern interface"] = False,
        page_per_vq: Annotated[bool, "a page for each notify register instead of 4 bytes"] = False,
        modern_pio_notify: Annotated[bool, "a notify register in I/O space as well"] = False,
        event_idx: Annotated[bool, "offer EVENT_IDX"] = True,
        indirect_desc: Annotated[bool, "offer indirect descriptors"] = True,
        packed: Annotated[bool, "offer packed rings"] = False,
        in_order: Annotated[bool, "offer IN_ORDER: chains are given back in the order they came in"] = False,
    ) -> None:
        has_legacy = device.id in TRANSITIONAL_IDS and not disable_legacy
        if disable_modern and not has_legacy:
            reason = "disable-legacy" if disable_legacy else f"device type {device.id}"
            raise ConfigError(f"{name}: disable-modern with {reason} leaves no interface")
        if disable_modern and packed:
            raise ConfigError(f"{name}: packed with disable-modern: the legacy interface has split rings only")
        self.name = name
        self.device = device
        self.accel = accel
        self.lock = RLock()
        self.notify_multiplier = REGION_SIZE if page_per_vq else 4
        self._identify(slot, has_legacy)
        self.dataplane = Dataplane(
            device,
            name,
            iothread,
            self._assign_ioeventfd,
            ioeventfd=device.ioeventfd if ioeventfd is None else ioeventfd,
            mapping=iothread_vq_mapping,
        )
        self._add_interrupts(len(self.dataplane.queues) + 1 if vectors is None else vectors)
        generic = {
            Feature.EVENT_IDX: event_idx,
            Feature.INDIRECT_DESC: indirect_desc,
            Feature.RING_PACKED: packed,
            Feature.IN_ORDER: in_order,
            Feature.RING_RESET: True,
        }
        self.driver = self._driver_state(has_legacy, sum(feature for feature, offer in generic.items() if offer))
        self.legacy = self._add_legacy() if has_legacy else None
        self.common = None if disable_modern else self._add_modern(modern_pio_notify)
        self.vhost = VhostNet(self.driver, self.interrupts) if device.vhost else None
        self._af = self.config.add_capability(ADVANCED_FEATURES, b"\x06\x03\x00\x00")
        self.window = None if disable_modern else ConfigWindow(self)

    @property
    def ioeventfd(self) -> bool:
        """What the user asked for; can be switched while the guest runs."""
        return self.dataplane.notifiers.ioeventfd

    @ioeventfd.setter
    def ioeventfd(self, value: bool) -> None:
        self.dataplane.notifiers.ioeventfd = value

    def config_read(self, offset: int, size: int) -> int:
        if self.window is not None and self.window.covers(offset, size):
            self.window.read()
        value = super().config_read(offset, size)
        if offset <= STATUS < offset + size and self.interrupts.pending:
            value |= STATUS_INTERRUPT << 8 * (STATUS - offset)
        return value

    def config_write(self, offset: int, size: int, value: int) -> None:
        with self.lock:
            self._write_config(offset, size, value)
        if self.window is not None and self.window.covers(offset, size):
            # Not under the lock: it may be a notify.
            self.window.write()

    def bar_read(self, bar: int, offset: int, size: int) -> int:
        if bar == LEGACY_BAR and self.legacy is not None:
            return self.legacy.read(offset, size)
        if bar == MSIX_BAR and self.msix is not None:
            return self.msix.read(offset, size)
        if bar == MODERN_BAR and self.common is not None:
            return self._read_modern(self.common, offset, size)
        return 0

    def bar_write(self, bar: int, offset: int, size: int, value: int) -> None:
        queue = self._notified_queue(bar, offset, value)
        if queue is not None:
            self.driver.notify(queue)
            return
        with self.lock:
            self._write_register(bar, offset, size, value)

    def reset(self) -> None:
        """Bus reset or FLR: the driver, the MSI-X table, BARs and command register are forgotten."""
        with self.lock:
            self.driver.reset()
            self.interrupts.reset()
            super().reset()
            self._follow_command()

    def save(self) -> dict[str, Any]:
        return {
            **super().save(),
            "ioeventfd": self.ioeventfd,
            "device": self._save_device(),
            "generation": self.device.config_generation,
            "interrupts": self.interrupts.save(),
            "driver": self.driver.save(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `save`; a device that was running runs. Its queues may be held until all others are restored."""
        with self.lock:
            super().restore(state)
            self.ioeventfd = state["ioeventfd"]
            self._restore_device(state["device"])
            self.device.config_generation = state["generation"]
            self.interrupts.restore(state["interrupts"], self._msix_control_word)
            self.driver.restore(state["driver"])
            self._follow_command()
            self.interrupts.send_again()

    def _save_device(self) -> dict[str, Any]:
        who = f"{self.name}: {type(self.device).__name__}.save()"
        try:
            state = self.device.save()
        except ConfigError:
            raise
        except Exception as error:
            raise ConfigError(f"{who}: {raised(error)}") from error
        if not isinstance(state, dict) or not is_storable(state):
            raise ConfigError(f"{who} returns {state!r}; a snapshot holds {STORABLE}")
        return state

    def _restore_device(self, state: dict[str, Any]) -> None:
        try:
            self.device.restore(state)
        except ConfigError:
            raise
        except Exception as error:
            who = f"{self.name}: {type(self.device).__name__}.restore()"
            raise ConfigError(f"{who} cannot do with what save() returned: {raised(error)}") from error

    @property
    def _msix_control_word(self) -> int:
        return self.config.read(self._msix_control, 2) if self.msix is not None else 0

    def close(self) -> None:
        """Unplug: after I/O in flight everything that the device holds is released."""
        self.reset()
        if self.vhost is not None:
            self.vhost.close()
        self.device.detach()
        self.device.close()

    def notify_addresses(self, index: int) -> Iterator[IoAddress]:
        """Where the guest writes to notify a queue, as far as that is decoded now."""
        at = {bar.index: address for bar in self.bars if (address := self.bar_address(bar)) is not None}
        if LEGACY_BAR in at:
            yield IoAddress("pio", at[LEGACY_BAR] + pci_legacy.NOTIFY, 2, index)
        if PIO_NOTIFY_BAR in at:
            yield IoAddress("pio", at[PIO_NOTIFY_BAR], 2, index)
        if MODERN_BAR in at:
            yield IoAddress("mmio", at[MODERN_BAR] + NOTIFY_REGION + index * self.notify_multiplier, 0)

    def _assign_ioeventfd(self, vq: VirtQueue) -> Undo:
        with ExitStack() as undo:
            for at in self.notify_addresses(vq.index):
                undo.callback(self.accel.assign_ioeventfd(vq.kick_fd, at))
            return undo.pop_all().close

    def _identify(self, slot: int, has_legacy: bool) -> None:
        if has_legacy:
            pci_id, revision, subsystem = TRANSITIONAL_IDS[DeviceId(self.device.id)], 0, self.device.id
        else:
            pci_id, revision, subsystem = MODERN_ID + self.device.id, 1, SUBSYSTEM_MODERN
        super().__init__(slot, device=pci_id, class_code=self.device.pci_class, revision=revision)
        self.set_subsystem(0x1AF4, subsystem)
        self.set_commands(Command.IO | Command.MEMORY | Command.BUS_MASTER | Command.INTX_DISABLE)
        self.config.put(INTERRUPT_PIN, b"\1")

    def _add_interrupts(self, vectors: int) -> None:
        if not 0 <= vectors <= msix.MAX_VECTORS:
            raise ConfigError(f"{self.name}: vectors={vectors}: allowed are 0 to {msix.MAX_VECTORS}")
        self.msix = MsixTable(self.name, vectors, self.accel) if vectors else None
        if self.msix is not None:
            body, writable = self.msix.capability(MSIX_BAR)
            self._msix_control = 2 + self.config.add_capability(msix.CAPABILITY, body, writable)
            self.add_bar(Bar(MSIX_BAR, BarKind.MEM32, self.msix.bar_size))
        self.interrupts = Interrupts(self.dataplane, self.accel.intx_line(self.slot), self.msix)

    def _driver_state(self, has_legacy: bool, generic: int) -> DriverState:
        # Plain integers: the complement of an IntFlag has the bits of its class only.
        offered = int(self.device.device_features) | int(Feature.VERSION_1) | int(generic)
        legacy = offered & 0xFFFFFFFF | int(Feature.NOTIFY_ON_EMPTY | Feature.ANY_LAYOUT)
        return DriverState(
            self.dataplane,
            self.accel.memory,
            self.interrupts.forget,
            offered=offered,
            legacy_offered=legacy if has_legacy else None,
        )

    def _add_legacy(self) -> LegacyRegisters:
        self.add_bar(Bar(LEGACY_BAR, BarKind.IO, pci_legacy.register_file_size(self.device)))
        return LegacyRegisters(self.driver, self.interrupts)

    def _add_modern(self, pio_notify: bool) -> CommonConfig:
        notify_size = len(self.dataplane.queues) * self.notify_multiplier
        notify_size = (notify_size + REGION_SIZE - 1) & -REGION_SIZE
        size = 1 << (NOTIFY_REGION + notify_size - 1).bit_length()
        self.add_bar(Bar(MODERN_BAR, BarKind.MEM64_PREFETCH, size))
        multiplier = struct.pack("<I", self.notify_multiplier)
        self._add_structure(CfgType.COMMON, MODERN_BAR, 0, REGION_SIZE)
        self._add_structure(CfgType.ISR, MODERN_BAR, ISR_REGION, REGION_SIZE)
        self._add_structure(CfgType.DEVICE, MODERN_BAR, DEVICE_REGION, REGION_SIZE)
        self._add_structure(CfgType.NOTIFY, MODERN_BAR, NOTIFY_REGION, notify_size, multiplier)
        if pio_notify:
            self.add_bar(Bar(PIO_NOTIFY_BAR, BarKind.IO, 4))
            self._add_structure(CfgType.NOTIFY, PIO_NOTIFY_BAR, 0, 4, bytes(4))
        return CommonConfig(self.driver, self.interrupts)

    def _add_structure(self, cfg_type: CfgType, bar: int, offset: int, length: int, tail: bytes = b"") -> None:
        self.config.add_capability(VENDOR_SPECIFIC, describe(cfg_type, bar, offset, length, tail))

    def _write_config(self, offset: int, size: int, value: int) -> None:
        moves = self.config.changes(offset, size, value) & DECODING
        with self.dataplane.notifiers.moving() if moves else nullcontext():
            super().config_write(offset, size, value)
        self._follow_command()
        if self.msix is not None and offset < self._msix_control + 2 and offset + size > self._msix_control:
            self.interrupts.set_msix_control(self._msix_control_word)
        control = self._af + AF_CONTROL - offset
        if 0 <= control < size and value >> 8 * control & INITIATE_FLR:
            log.info("%s: function level reset", self.name)
            self.reset()

    def _follow_command(self) -> None:
        """Make INTx and bus mastering what the command register asks for; does nothing if that has not changed."""
        self.interrupts.disable_intx(Command.INTX_DISABLE in self.command)
        self.driver.bus_master = Command.BUS_MASTER in self.command

    def _notified_queue(self, bar: int, offset: int, value: int) -> int | None:
        """The queue that a write to a BAR notifies, or None if it is a write to another register."""
        if (bar, offset) == (LEGACY_BAR, pci_legacy.NOTIFY) or bar == PIO_NOTIFY_BAR:
            return value & 0xFFFF
        if bar == MODERN_BAR and offset >= NOTIFY_REGION:
            return (offset - NOTIFY_REGION) // self.notify_multiplier
        return None

    def _read_modern(self, common: CommonConfig, offset: int, size: int) -> int:
        if offset < ISR_REGION:
            return common.read(offset, size)
        if offset < DEVICE_REGION:
            return self.interrupts.isr.read() if offset == ISR_REGION else 0
        if offset < NOTIFY_REGION:
            start = offset - DEVICE_REGION
            return int.from_bytes(self.driver.read_config()[start : start + size], "little")
        return 0

    def _write_register(self, bar: int, offset: int, size: int, value: int) -> None:
        if bar == LEGACY_BAR and self.legacy is not None:
            self.legacy.write(offset, size, value)
        elif bar == MSIX_BAR and self.msix is not None:
            self.msix.write(offset, size, value)
        elif bar == MODERN_BAR and self.common is not None:
            if offset < ISR_REGION:
                self.common.write(offset, size, value)
            elif DEVICE_REGION <= offset < NOTIFY_REGION:
                self.driver.write_config(offset - DEVICE_REGION, size, value)
