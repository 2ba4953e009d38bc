"""What every transport shares: the accelerator it needs, and what a driver has told the device."""

import logging
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

from pyvirtio._core import GuestMemory, IrqLine, MsixVector
from pyvirtio.dataplane import Dataplane, QueueSetup
from pyvirtio.errors import ConfigError, GuestError, raised
from pyvirtio.spec import Feature, Status

Undo = Callable[[], object]
Result = TypeVar("Result")

log = logging.getLogger("pyvirtio")


class IoAddress(NamedTuple):
    """A guest write that can be an ioeventfd: `length` 0 matches any width, `datamatch` None any value."""

    space: Literal["pio", "mmio"]
    address: int
    length: int
    datamatch: int | None = None


class Accelerator(Protocol):
    """What a transport needs of KVM, or of its in-process stand-in. Errors are `OSError`."""

    @property
    def memory(self) -> GuestMemory: ...

    def assign_ioeventfd(self, fd: int, at: IoAddress) -> Undo:
        """Signal `fd` on that write instead of leaving the guest; `EEXIST` if the address is taken."""

    def route_msi(self, vector: MsixVector, address: int, data: int) -> None:
        """Make `vector` send this message; the first call makes its eventfd an irqfd."""

    def release_msi(self, vector: MsixVector) -> None: ...

    def intx_line(self, slot: int) -> IrqLine:
        """An input of the interrupt line that INTA of this slot is wired to."""


class DriverState:
    """What the driver has told the device, and what follows from it (virtio 1.3, 2.1, 2.2 and 3.1).

    Registers of any transport write it. The device runs while DRIVER_OK is set on agreed features and
    `bus_master` lets it reach memory; every change sets a field and settles. The transport serialises all but reads.
    """

    SAVED = (
        "features", "driver_features", "legacy", "queue_select", "device_feature_select", "driver_feature_select",
    )  # fmt: skip
    KNOWN_STATUS = Status.ACKNOWLEDGE | Status.DRIVER | Status.DRIVER_OK | Status.FEATURES_OK | Status.FAILED

    def __init__(
        self,
        dataplane: Dataplane,
        memory: GuestMemory,
        on_reset: Callable[[], None],
        *,
        offered: int,
        legacy_offered: int | None,
    ) -> None:
        """`legacy_offered` is None for a device without a legacy interface. `on_reset` runs before a reset ends."""
        self.dataplane = dataplane
        self.memory = memory
        self.on_reset = on_reset
        self.offered = offered
        self.legacy_offered = legacy_offered
        self._running = False
        self._bus_master = False
        self._status = Status(0)
        self._slow = Status(0), 0.0
        self._forget()

    def _forget(self) -> None:
        self.features: int | None = None
        """What was agreed; None until then, fixed afterwards."""
        self.driver_features = 0
        self.legacy = False
        self.queue_select = 0
        self.device_feature_select = 0
        self.driver_feature_select = 0
        self.setups = [QueueSetup(size=vq.max_size) for vq in self.dataplane.queues]
        self._positions: dict[int, tuple[int, int]] = {}

    @property
    def status(self) -> Status:
        before, until = self._slow
        if until and time.monotonic() < until:
            return before
        return self._status | Status.NEEDS_RESET if self.dataplane.state.broken else self._status

    @property
    def bus_master(self) -> bool:
        return self._bus_master

    @bus_master.setter
    def bus_master(self, value: bool) -> None:
        self._bus_master = value
        self._settle()

    def setup(self, index: int) -> QueueSetup | None:
        """What is known of a queue, if it exists."""
        return self.setups[index] if index < len(self.setups) else None

    @property
    def configurable(self) -> QueueSetup | None:
        """The selected queue while its registers may be written: it is disabled, and DRIVER_OK is clear or it was
        reset by itself."""
        setup = self.setup(self.queue_select)
        if setup is None or setup.enabled:
            return None
        return setup if setup.reset or Status.DRIVER_OK not in self._status else None

    def offered_word(self) -> int:
        """device_feature: 32 bits of what is offered; 0 beyond the end."""
        select = self.device_feature_select
        return self.offered >> 32 * select & 0xFFFFFFFF if select < 2 else 0

    def driver_word(self) -> int:
        select = self.driver_feature_select
        return self.driver_features >> 32 * select & 0xFFFFFFFF if select < 2 else 0

    def write_driver_word(self, value: int) -> None:
        """driver_feature; frozen once the features are agreed."""
        if self.features is None and self.driver_feature_select < 2:
            shift = 32 * self.driver_feature_select
            self.driver_features = self.driver_features & ~(0xFFFFFFFF << shift) | value << shift

    def write_legacy_features(self, value: int) -> None:
        """The legacy guest features: no way to refuse, so what was not offered is dropped."""
        if self.features is None:
            self.driver_features = value & (self.legacy_offered or 0)

    def write_status(self, value: int, *, legacy: bool = False) -> None:
        """device_status (2.1): 0 resets; a legacy driver agrees on features by setting DRIVER_OK."""
        if not value:
            self.reset()
            return
        new = Status(value) & self.KNOWN_STATUS
        added = new & ~self._status
        if Status.FEATURES_OK in added and not self._agree(legacy):
            new &= ~Status.FEATURES_OK
        if legacy and Status.DRIVER_OK in added:
            self.agree_legacy()
        self._status = new
        self._settle()

    def _agree(self, legacy: bool) -> bool:
        """FEATURES_OK: accept a subset of what is offered, VERSION_1 included where there is no legacy interface."""
        if self.features is not None:
            return True
        refused = self.driver_features & ~((self.legacy_offered or 0) if legacy else self.offered)
        if faults := self.dataplane.device.active_faults:
            refused |= faults.refused(self.driver_features)
        if self.legacy_offered is None:
            refused |= int(Feature.VERSION_1) & ~self.driver_features
        if refused:
            log.warning("%s: features refused: %#x", self.dataplane.state.name, refused)
            return False
        self.features = self.driver_features
        return True

    def agree_legacy(self) -> None:
        """A legacy driver takes the first queue or the device into use: its features are what it has written."""
        if self.features is None:
            # Masked once more: the modern registers take any bit.
            self.features = self.driver_features & (self.legacy_offered or 0)
            self.legacy = True

    def has_agreed(self, feature: Feature) -> bool:
        return bool((self.features or 0) & feature)

    def enable_queue(self) -> None:
        """queue_enable = 1: the selected queue is served from DRIVER_OK on, or at once if it was reset by itself."""
        setup, index = self.configurable, self.queue_select
        if setup is None:
            return
        setup.enabled, setup.reset = True, False
        if self._running:
            with self.dataplane.notifiers.without(index):
                self._guard(lambda: self._start_queue(index))

    def reset_queue(self) -> None:
        """queue_reset = 1 (2.6.1): forget the selected queue. Waits for a handler that runs; its chains are stale."""
        setup = self.setup(self.queue_select)
        if setup and setup.enabled:
            self._give_up(self.queue_select)
            most = self.dataplane.queues[self.queue_select].max_size
            self.setups[self.queue_select] = QueueSetup(size=most, reset=True)

    def _give_up(self, index: int) -> None:
        self.dataplane.stop_queue(index)
        self._positions.pop(index, None)

    def start_legacy_queue(self, setup: QueueSetup) -> None:
        """QUEUE_PFN: served from now on, because a legacy driver may kick before DRIVER_OK."""
        self.agree_legacy()
        setup.enabled = True
        self._guard(lambda: self._start_legacy_queue(self.queue_select))

    def _start_legacy_queue(self, index: int) -> None:
        self.dataplane.activate(self.features or 0)
        self._start_queue(index)

    def stop_legacy_queue(self) -> None:
        """QUEUE_PFN = 0: give the selected ring up."""
        setup = self.setup(self.queue_select)
        if setup and setup.enabled:
            self._give_up(self.queue_select)
            self.setups[self.queue_select] = QueueSetup(size=setup.size)

    def read_config(self) -> bytes:
        """The configuration space of the device; never blocks."""
        return self._guard(self.dataplane.device.config_bytes) or b""

    def write_config(self, offset: int, size: int, value: int) -> None:
        """A driver's write to it; ignored past its end."""
        if offset + size <= len(self.read_config()):
            data = value.to_bytes(size, "little")
            self._guard(lambda: self.dataplane.device.write_config(offset, data))

    def notify(self, index: int) -> None:
        """A notify that reached userspace; from any thread, without a lock."""
        if self._bus_master:
            self.dataplane.notify(index)

    def reset(self) -> None:
        """Forget the driver. Waits for I/O in flight; the status reads 0 once that is done."""
        if self._running:
            log.info("%s: reset", self.dataplane.state.name)
        before = self.status
        self._running = False
        self.dataplane.stop()
        self._forget()
        self.on_reset()
        self._status = Status(0)
        if faults := self.dataplane.device.active_faults:
            self._slow = before, time.monotonic() + faults.reset_time()

    def save(self) -> dict[str, Any]:
        """All that the driver has said, and where each ring stands; while the queues are held."""
        positions = {index: vq.position for index, vq in enumerate(self.dataplane.queues) if vq.ready}
        return {
            "status": int(self._status),
            "broken": self.dataplane.state.broken,
            "offered": self.offered,
            **{name: getattr(self, name) for name in self.SAVED},
            "queues": [vars(setup) for setup in self.setups],
            "ready": [*positions],
            "positions": list((self._positions | positions).items()),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take the state of `save`; `bus_master` is to be set afterwards, which starts the device."""
        name = self.dataplane.state.name
        if state["offered"] != self.offered:
            raise ConfigError(f"{name}: offers the features {self.offered:#x}, and offered {state['offered']:#x}")
        for field in self.SAVED:
            setattr(self, field, state[field])
        self.setups = [QueueSetup(**setup) for setup, _ in zip(state["queues"], self.setups, strict=True)]
        self._positions = {index: (avail, used) for index, (avail, used) in state["positions"]}
        self._status = Status(state["status"])
        if state["broken"]:
            self._fail(GuestError(state["broken"]))
        elif self.legacy:
            for index in state["ready"]:
                self._guard(partial(self._start_legacy_queue, index))

    def _settle(self) -> None:
        """Run or pause as status and bus mastering ask for. Calling it twice changes nothing."""
        up = Status.DRIVER_OK in self._status and self.features is not None
        if not self.legacy:
            up = up and Status.FEATURES_OK in self._status
        wanted = up and self._bus_master and not self.dataplane.state.broken
        if wanted and not self._running:
            self._guard(self._start)
        elif not wanted and self._running:
            self._pause()

    def _start(self) -> None:
        for index, setup in enumerate(self.setups):
            if setup.enabled:
                self._start_queue(index)
        self.dataplane.run(self.features or 0)
        self._running = True
        log.info("%s: driver up, features %#x", self.dataplane.state.name, self.features)

    def _start_queue(self, index: int) -> None:
        if not self.dataplane.queues[index].ready:
            features = self.features or 0
            at = self._positions.pop(index, None)
            self.dataplane.start_queue(index, self.memory, self.setups[index], features, legacy=self.legacy, at=at)

    def _pause(self) -> None:
        self._running = False
        self._positions = self.dataplane.pause()

    def _guard(self, call: Callable[[], Result]) -> Result | None:
        """The result of `call`; if it fails the device needs a reset, and the machine goes on."""
        try:
            return call()
        except GuestError as error:
            self._fail(error)
        except Exception as error:
            # A defect of a user's device must not end the thread of a vCPU.
            log.exception("%s: the device failed", self.dataplane.state.name)
            self._fail(error)
        return None

    def _fail(self, error: Exception) -> None:
        state = self.dataplane.state
        state.driver_ok = Status.DRIVER_OK in self._status
        state.fail(str(error) if isinstance(error, (GuestError, ConfigError)) else raised(error))
