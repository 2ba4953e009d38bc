"""A virtio-pci function in hands that do anything to it, and what has to hold all the same."""

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from pci_echo import Echo, Tracebacks

from pyvirtio.dataplane import QueueSetup
from pyvirtio.spec import Feature, Status
from pyvirtio.testing import Guest
from pyvirtio.testing.pci import BUS_MASTER, IO, MEMORY, Space
from pyvirtio.testing.plugin import nothing_left_behind
from pyvirtio.testing.queue import Buffer
from pyvirtio.testing.registers import COMMON, NOTIFY_CFG, PCI_CFG, structures
from pyvirtio.testing.registers import LEGACY as REGISTERS
from pyvirtio.transports.base import IoAddress

LEGACY, MSIX, PIO_NOTIFY, MODERN = 0, 1, 2, 4
MSIX_CAP, ADVANCED_FEATURES = 0x11, 0x13
LEGACY_NOTIFY, LEGACY_STATUS, MODERN_STATUS = 16, 18, 20
WRITABLE_STATUS = Status.ACKNOWLEDGE | Status.DRIVER | Status.DRIVER_OK | Status.FEATURES_OK | Status.FAILED
ROGUE_RINGS = 0x9_0000
"""RAM that the driver never uses."""


def rogue_rings(ring: int) -> dict[str, int]:
    """The address registers of a queue, with values that are sound."""
    start = ROGUE_RINGS + 0x1000 * ring
    return {"queue_desc": start, "queue_driver": start + 0x400, "queue_device": start + 0x800}


class Explorer:
    """One device in one machine; the methods do one thing to it, those that `check` assert what must hold."""

    def __init__(self, properties: dict[str, Any]) -> None:
        self.left_behind = nothing_left_behind()
        self.left_behind.__enter__()
        self.tracebacks = Tracebacks()
        logging.getLogger("pyvirtio").addHandler(self.tracebacks)
        self.guest = Guest(memory=1 << 20)
        self.device = Echo()
        self.driver = self.guest.plug(self.device, start=False, **properties)
        self.function, self.pci = self.driver.function, self.driver.pci
        self.home = {bar: window.base for bar, window in self.pci.bars.items()}
        self.window = structures(self.pci, PCI_CFG)[0].capability
        self.notifier = structures(self.pci, NOTIFY_CFG)[0]
        self.multiplier = self.pci.read(self.notifier.capability + 16, 4)
        self.sent: list[tuple[Buffer, bytes]] = []
        self.unheard = False
        """Whether a kick went to an address that nobody answered."""
        self.rogue = False
        """Whether the guest wrote anything since `start` that could break the device."""
        self.refusals = "modern_pio_notify" in properties
        """Whether an ioeventfd may be refused: two BARs may share an address, or the test asked for it."""
        self.started = -1
        """How often the device had been reset when `start` gave it the rings of the driver."""
        self.agreed: tuple[int, int] | None = None

    # What is decoded where, from configuration space alone.

    def decoded(self) -> dict[int, int]:
        """The address of each BAR that is decoded."""
        found, command = {}, self.pci.command
        for bar, window in self.pci.bars.items():
            if command & (IO if window.space == "pio" else MEMORY):
                address = self.pci.bar_address(bar)
                top = (1 << (64 if bar == MODERN else 32)) - self.pci.sizes[bar]
                if address not in (0, top):
                    found[bar] = address
        return found

    def reachable(self, bar: int, at: dict[int, int] | None = None) -> bool:
        """Whether it is decoded and shares no address with another BAR; `at` is what `decoded` has said."""
        at, bars, sizes = self.decoded() if at is None else at, self.pci.bars, self.pci.sizes
        return bar in at and all(
            at[bar] + sizes[bar] <= at[other] or at[other] + sizes[other] <= at[bar]
            for other in at
            if other != bar and bars[other].space == bars[bar].space
        )

    def up(self) -> bool:
        """Whether the device should be served unless it broke, by what its registers say."""
        state = self.function.driver
        needed = Status.DRIVER_OK if state.legacy else Status.DRIVER_OK | Status.FEATURES_OK
        return needed in state.status and state.features is not None and bool(self.pci.command & BUS_MASTER)

    def running(self) -> bool:
        return self.up() and Status.NEEDS_RESET not in self.function.driver.status

    def has_our_rings(self) -> bool:
        """Whether the rings of `start` are still those that the device serves."""
        setups = self.function.driver.setups
        return self.started == self.device.resets and all(
            setups[vq.index].enabled and setups[vq.index].desc == vq.ring.desc for vq in self.driver.queues
        )

    # What a sound driver does.

    def start(self, *, legacy: bool, msix: bool, size: int | None) -> None:
        self.come_home()
        self.write_msix_control(0)
        driver, accel = self.driver, self.guest.accel
        driver.transport = "legacy" if legacy and LEGACY in self.home else "modern"
        driver.registers = driver._find_registers()
        driver.msix_wanted, driver.queue_size = msix, size
        self.sent.clear()
        self.rogue = self.unheard = False
        self.agreed = None
        refused = any(number >= accel.assigns for number in accel.fail_ioeventfd_at)
        driver.start()
        for vq in driver.queues:
            vq.polling = True
        self.started = self.device.resets
        assert self.device.active
        assert self.has_our_rings()
        assert self.running()
        assert refused or not self.function.dataplane.notifiers.reasons

    def come_home(self) -> None:
        """Put the BARs back and switch everything on, without a reset."""
        for bar, address in self.home.items():
            self.pci.move_bar(bar, address)
        self.pci.command = IO | MEMORY | BUS_MASTER

    def add_while_paused(self, data: bytes, index: int) -> None:
        """What is made available while the device may not touch memory is served when it may again."""
        self.pci.command = IO | MEMORY
        self.add_and_kick(data, index)

    def add_and_kick(self, data: bytes, index: int) -> None:
        if not self.has_our_rings():
            return
        vq = self.driver.queues[index]
        try:
            buffer = vq.add(data or b"x", writable=len(data) + 8)
        except BufferError:
            self.finish_io()
            return
        self.sent.append((buffer, data or b"x"))
        self.unheard |= not self.reachable(self._notify_bar())
        vq.kick()

    def _notify_bar(self) -> int:
        return LEGACY if self.driver.transport == "legacy" else MODERN

    def finish_io(self) -> None:
        """Everything sent is answered once the device runs, and no kick but those to nowhere is repeated."""
        self.come_home()
        if not (self.has_our_rings() and self.running()):
            return
        if self.unheard:
            for vq in self.driver.queues:
                vq.notify()
            self.unheard = False
        for buffer, data in self.sent:
            assert buffer.wait() == data
        self.sent.clear()

    def let_assign_fail(self, count: int, error: int) -> None:
        accel = self.guest.accel
        accel.fail_ioeventfd_at = {accel.assigns + count: error}
        self.refusals = True

    def move_bar(self, bar: int, place: int) -> None:
        if bar in self.home:
            near = [address for other, address in self.home.items() if other != bar]
            size = self.pci.sizes[bar]
            low = [self.home[bar], 0x4000, 0x5000, 0xFFFF_FFFF, 0, *near, self.home.get(LEGACY, 0) + LEGACY_NOTIFY]
            high = [self.home[bar], 0xD000_0000, 0xD800_0000, 2**64 - 1, 0, *near, 1 << 40]
            places = low if self.pci.bars[bar].space == "pio" else high
            limit = 1 << (64 if bar == MODERN else 32)
            self.pci.move_bar(bar, places[place % len(places)] % limit & -size)

    def function_level_reset(self) -> None:
        at = self.pci.capability(ADVANCED_FEATURES)
        assert at is not None
        self.write_config(at + 4, 1, 1)
        assert self.pci.command == 0
        assert not any(self.pci.bar_address(bar) for bar in self.home)
        self.check_reset()

    # What any guest can do.

    def write_config(self, offset: int, size: int, value: int) -> None:
        self.rogue = True
        self.pci.write(offset, size, value & (1 << 8 * size) - 1)
        for bar, window in self.pci.bars.items():
            window.base = self.pci.bar_address(bar)

    def write_msix_control(self, control: int) -> None:
        at = self.pci.capability(MSIX_CAP)
        if at is not None:
            self.pci.write(at + 2, 2, control)

    def write_bar(self, bar: int, offset: int, size: int, value: int) -> None:
        self.rogue = True
        if bar in self.home:
            size = self._possible(bar, size)
            self.pci.bars[bar].write(offset % self.pci.sizes[bar], size, value & (1 << 8 * size) - 1)

    def read_bar(self, bar: int, offset: int, size: int) -> int:
        if bar not in self.home:
            return 0
        return self.pci.bars[bar].read(offset % self.pci.sizes[bar], self._possible(bar, size))

    def _possible(self, bar: int, size: int) -> int:
        """There are no 8-byte accesses in I/O space."""
        space: Space = self.pci.bars[bar].space
        return min(size, 4) if space == "pio" else size

    def write_window(self, bar: int, offset: int, length: int, value: int) -> None:
        self._aim_window(bar, offset, length)
        self.write_config(self.window + 16, 4, value)

    def read_window(self, bar: int, offset: int, length: int) -> None:
        self._aim_window(bar, offset, length)
        self.pci.read(self.window + 16, 4)

    def _aim_window(self, bar: int, offset: int, length: int) -> None:
        self.pci.write(self.window + 4, 1, bar)
        self.pci.write(self.window + 8, 4, offset)
        self.pci.write(self.window + 12, 4, length)

    def write_common(self, name: str, value: int, ring: int) -> None:
        """A register of the common configuration; every other address of a ring is one where it could be."""
        offset, size = COMMON[name]
        if size == 8 and value % 2 == 0:
            value = rogue_rings(ring)[name]
        if name in ("queue_enable", "queue_reset"):
            value = min(value, 2)
        state, before = self.function.driver, self._setups()
        frozen = state.queue_select >= len(before) or before[state.queue_select].enabled
        frozen = frozen or (Status.DRIVER_OK in state.status and not before[state.queue_select].reset)
        resets = name == "queue_reset" and value == 1 and state.has_agreed(Feature.RING_RESET)
        frozen = frozen and not resets
        self.write_bar(MODERN, offset, size, value)
        if frozen and self.reachable(MODERN):
            assert self._setups() == before

    def _setups(self) -> list[QueueSetup]:
        return [replace(setup) for setup in self.function.driver.setups]

    def write_legacy(self, name: str, value: int) -> None:
        offset, size = REGISTERS[name]
        self.write_bar(LEGACY, offset, size, value)

    def set_up_by_hand(self, omitted: set[str], index: int, ring: int, avail_idx: int, features: int) -> None:
        """A driver that leaves steps out, and may make more available than there is."""
        steps: dict[str, Callable[[], object]] = {
            "home": self.come_home,
            "reset": lambda: self.write_status(0, legacy=False),
            "version": lambda: self._write_features(1, 1),
            "features": lambda: self._write_features(0, features & self.function.driver.offered),
            "agree": lambda: self.write_status(11, legacy=False),
            "select": lambda: self.write_common("queue_select", index, 0),
            "addresses": lambda: self._write_addresses(ring),
            "enable": lambda: self.write_common("queue_enable", 1, 0),
            "driver_ok": lambda: self.write_status(7 if "agree" in omitted else 15, legacy=False),
            "more features": lambda: self._write_features(0, 0),
            "avail": lambda: self.guest.memory.store16(rogue_rings(ring)["queue_driver"] + 2, avail_idx),
            "notify": lambda: self.notify(index, 2, "modern"),
        }
        for name, step in steps.items():
            if name not in omitted:
                step()
                self.check()

    def _write_addresses(self, ring: int) -> None:
        for name in rogue_rings(ring):
            self.write_common(name, 0, ring)

    def _write_features(self, word: int, value: int) -> None:
        self.write_common("driver_feature_select", word, 0)
        self.write_common("driver_feature", value, 0)

    def notify(self, index: int, size: int, way: str) -> None:
        at = self.notifier.offset + index * self.multiplier
        if way == "window":
            self.write_window(MODERN, at, min(size, 4), index)
        elif way == "modern" and at < self.pci.sizes[MODERN]:
            self.write_bar(MODERN, at, size, index)
        elif way == "pio":
            self.write_bar(PIO_NOTIFY, 0, size, index)
        elif way == "legacy":
            self.write_bar(LEGACY, LEGACY_NOTIFY, size, index)

    def write_status(self, value: int, *, legacy: bool) -> None:
        """Write, read back, and compare with what 2.1 says."""
        bar, offset = (LEGACY, LEGACY_STATUS) if legacy else (MODERN, MODERN_STATUS)
        if bar not in self.home or not self.reachable(bar):
            return
        sticks = self._features_are_accepted(legacy) and bool(value & Status.FEATURES_OK)
        self.pci.bars[bar].write(offset, 1, value)
        after = Status(self.pci.bars[bar].read(offset, 1))
        if value == 0:
            assert after == 0
            self.check_reset()
        else:
            wanted = Status(value) & WRITABLE_STATUS & ~Status.FEATURES_OK
            assert after & ~Status.NEEDS_RESET == wanted | (Status.FEATURES_OK if sticks else Status(0))

    def _features_are_accepted(self, legacy: bool) -> bool:
        state = self.function.driver
        if Status.FEATURES_OK in state.status or state.features is not None:
            return True
        offered = (state.legacy_offered or 0) if legacy else state.offered
        enough = LEGACY in self.home or state.driver_features & Feature.VERSION_1
        return not state.driver_features & ~offered and bool(enough)

    # What holds.

    def check(self) -> None:
        assert not self.tracebacks.found
        assert self.pci.read(0, 2) == 0x1AF4
        at, up = self.decoded(), self.up()
        self.check_needs_reset(at)
        self.check_running(up)
        self.check_features()
        self.check_ioeventfds(at, up)

    def check_reset(self) -> None:
        """Right after a reset nothing is left of the driver."""
        assert self.function.driver.status == 0
        assert not self.device.active
        assert not self.driver.why_broken
        assert not any(vq.ready for vq in self.function.dataplane.queues)
        assert not self.guest.accel.ioeventfds

    def check_needs_reset(self, at: dict[int, int]) -> None:
        """The bit tells whether the device is broken, which no sound driver can bring about."""
        before = bool(self.driver.why_broken)
        if self.reachable(MODERN, at):
            shown = bool(self.pci.bars[MODERN].read(MODERN_STATUS, 1) & Status.NEEDS_RESET)
            assert shown in (before, bool(self.driver.why_broken))
        assert self.rogue or not self.driver.why_broken

    def check_running(self, up: bool) -> None:
        queues, setups = self.function.dataplane.queues, self.function.driver.setups
        if up and Status.NEEDS_RESET not in self.function.driver.status:
            assert self.device.active
            assert [vq.ready for vq in queues] == [setup.enabled for setup in setups]
        elif LEGACY not in self.home and not self.driver.why_broken:
            # A legacy driver may be served before DRIVER_OK.
            assert not any(vq.ready for vq in queues)

    def check_features(self) -> None:
        """Agreed features stay what they are until a reset."""
        state = self.function.driver
        if not state.status & (Status.FEATURES_OK | Status.DRIVER_OK) or state.features is None:
            self.agreed = None
            return
        features = state.features, state.driver_features
        assert self.agreed in (None, features)
        self.agreed = features

    def check_ioeventfds(self, at: dict[int, int], up: bool) -> None:
        assigned = self.guest.accel.ioeventfds
        wanted = self._notify_addresses(at) if up and self.function.ioeventfd else set()
        broken = bool(self.driver.why_broken)  # asked last: the I/O thread may break the device meanwhile
        if self.function.dataplane.notifiers.reasons:
            assert self.refusals
            assert not assigned
        elif broken:
            # Whether they have been taken down already is nobody's business.
            assert assigned in (wanted, set())
        else:
            assert assigned == wanted

    def _notify_addresses(self, at: dict[int, int]) -> set[IoAddress]:
        found = set()
        for vq in self.function.dataplane.queues:
            if vq.ready:
                if LEGACY in at:
                    found.add(IoAddress("pio", at[LEGACY] + LEGACY_NOTIFY, 2, vq.index))
                if PIO_NOTIFY in at:
                    found.add(IoAddress("pio", at[PIO_NOTIFY], 2, vq.index))
                if MODERN in at:
                    found.add(IoAddress("mmio", at[MODERN] + self.notifier.offset + vq.index * self.multiplier, 0))
        return found

    def close(self, failing: bool) -> None:
        """A reset brings the device back, whatever happened to it, and unplugged it leaves nothing behind."""
        try:
            if not failing:
                self._recover()
        finally:
            self.guest.close()
            logging.getLogger("pyvirtio").removeHandler(self.tracebacks)
        left_behind = self.left_behind
        vars(self).clear()
        if not failing:
            left_behind.__exit__(None, None, None)

    def _recover(self) -> None:
        self.guest.accel.fail_ioeventfd_at.clear()
        self.start(legacy=False, msix=True, size=None)
        for vq in self.driver.queues:
            vq.polling = False
            buffer = vq.add(b"again", writable=8)
            vq.kick()
            assert buffer.wait() == b"again"
        assert not self.tracebacks.found
