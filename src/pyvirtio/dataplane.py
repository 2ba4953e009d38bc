"""A running device: its queues, the I/O thread that serves them, and the notifiers in between."""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from ctypes import sizeof
from dataclasses import dataclass
from typing import Annotated, ClassVar

from pyvirtio import _core
from pyvirtio._core import DeviceState, GuestMemory, InflightRegion, VirtQueue
from pyvirtio.device import Device, Handler, Queue, check_events
from pyvirtio.errors import ConfigError
from pyvirtio.events import Events
from pyvirtio.notifiers import HostNotifiers, Undo
from pyvirtio.properties import Range
from pyvirtio.spec import MAX_QUEUE_SIZE, MAX_QUEUES, WRAP_COUNTER, Feature

MAX_DEVICE_ID = 63
"""Device types end here on PCI (virtio 1.3, 4.1.2)."""
DRAIN = 10.0
"""Seconds that requests under way may take before a snapshot gives up."""

log = logging.getLogger("pyvirtio")


class IoThread:
    """An I/O thread: waits for the kicks of the queues it was given and serves them.

    The thread is Python's, its loop the core's: it holds the interpreter only while a handler written in Python
    runs. After a kick it looks for more work for up to `poll_max_ns` before it sleeps (adaptive, off on one CPU).
    """

    named_by: ClassVar[str] = "an --object iothread"

    def __init__(
        self,
        name: str = "iothread",
        *,
        poll_max_ns: Annotated[int, "longest busy wait for more work, ns; 0 = none", Range(0, 10**9)] = 32768,
        poll_grow: Annotated[int, "factor by which a busy wait grows; 0 = 2", Range(0, 1024)] = 0,
        poll_shrink: Annotated[int, "divisor by which it shrinks; 0 = back to none", Range(0, 1024)] = 0,
    ) -> None:
        self.name = name
        self.loop = _core.IoThread(poll_max_ns=poll_max_ns, poll_grow=poll_grow, poll_shrink=poll_shrink)
        self._thread = threading.Thread(target=self.loop.run, name=f"pyvirtio {name}", daemon=True)
        self._thread.start()

    def poll(self, vq: VirtQueue) -> Undo:
        """Serve the queue from now on whenever its eventfd is signalled; return how to stop that."""
        self.loop.add(vq)
        # A kick may have arrived while nobody polled.
        vq.signal()
        return lambda: self.loop.remove(vq)

    def poll_kick(self, vq: VirtQueue, fd: int) -> Undo:
        """Serve a queue that is polled also whenever `fd` is signalled; it is duplicated and never read."""
        return self.loop.add_kick(vq, fd).close

    def close(self) -> None:
        self.loop.close()
        self._thread.join()


@dataclass
class QueueSetup:
    """What a driver wrote about one queue; addresses are guest-physical."""

    size: int
    desc: int = 0
    avail: int = 0
    used: int = 0
    enabled: bool = False
    reset: bool = False
    """It was reset by itself, so that it may be set up anew while the driver is up (2.6.1)."""


def declared_queues(device: Device, most: int = MAX_QUEUES) -> list[Queue]:
    """The queues of a device; `ConfigError` for a device that no transport can offer."""
    kind = type(device).__name__
    if not 1 <= device.id <= MAX_DEVICE_ID:
        rule = f"write class {kind}(Device, id=1 to {MAX_DEVICE_ID})"
        raise ConfigError(f"{device.name}: {kind} has the device type {device.id}; {rule}")
    queues = device.queues
    if not queues:
        rule = "declare each with @queue() on the method that serves it"
        raise ConfigError(f"{device.name}: {kind} has no queue; {rule}")
    if len(queues) > most:
        raise ConfigError(f"{device.name}: {kind} has {len(queues)} queues, at most {most} are allowed")
    _check_config(device)
    check_events(device)
    for q in queues:
        if not 2 <= q.size <= MAX_QUEUE_SIZE or q.size & (q.size - 1):
            allowed = f"powers of two from 2 to {MAX_QUEUE_SIZE}"
            raise ConfigError(f"{device.name}: {kind}.{q.name} has size {q.size}; allowed are {allowed}")
    return queues


def _check_config(device: Device) -> None:
    """The driver reads what `config_layout` says: that and `config_bytes` have to agree."""
    if device.config_layout is None:
        return
    size, layout, kind = len(device.config_bytes()), device.config_layout, type(device).__name__
    if size != sizeof(layout):
        raise ConfigError(
            f"{device.name}: {kind}.config_bytes() returns {size} bytes, its layout {layout.__name__} has "
            f"{sizeof(layout)}"
        )


def deal_out(device: Device, queues: int, iothreads: Sequence[IoThread]) -> Iterator[IoThread]:
    """The I/O thread of each queue: those that the device wants together share one."""
    for index in range(queues):
        yield iothreads[index // device.queues_per_iothread % len(iothreads)]


def start_ring(
    vq: VirtQueue,
    memory: GuestMemory,
    handler: Handler,
    setup: QueueSetup,
    features: int,
    *,
    legacy: bool,
    at: tuple[int, int] | None,
    inflight: InflightRegion | None = None,
) -> None:
    """Take a ring into use as the driver has set it up; `GuestError` if it cannot be one.

    `at` is where to go on, as `VirtQueue.stop` returned it; None for a fresh ring.
    """
    packed = bool(features & Feature.RING_PACKED)
    next_avail, next_used = at or ((WRAP_COUNTER, WRAP_COUNTER) if packed else (0, 0))
    vq.start(
        memory,
        handler,
        size=setup.size,
        desc=setup.desc,
        avail=setup.avail,
        used=setup.used,
        packed=packed,
        in_order=bool(features & Feature.IN_ORDER),
        event_idx=bool(features & Feature.EVENT_IDX),
        indirect=bool(features & Feature.INDIRECT_DESC),
        notify_on_empty=legacy and bool(features & Feature.NOTIFY_ON_EMPTY),
        next_avail=next_avail,
        next_used=next_used,
        inflight=inflight,
    )


def owed(vq: VirtQueue) -> str:
    """The chains that the device has taken and not given back, and the rule about them; "" if there are none."""
    if not (count := vq.in_flight):
        return ""
    return f"chains that {vq.handler_name} took and did not complete: {count}; each needs its complete()"


def reset_device(device: Device) -> None:
    """A defect of a user's device must not keep its driver from starting over."""
    try:
        device.reset()
    except Exception:
        log.exception("%s: the device failed to reset", device.name)


@dataclass
class OnBroken:
    """What happens when a device needs a reset. Any thread, also one that serves a queue: it must not wait for one."""

    name: str
    then: Callable[[], object] = lambda: None

    def __call__(self, reason: str) -> None:
        log.error("%s: needs a reset: %s", self.name, reason)
        self.then()


class Dataplane:
    """The queues of one device while a driver uses them.

    `assign_ioeventfd(vq)` registers all notify addresses of a queue and returns how to undo that. Its owner (the
    transport) serialises the calls; `notify` may come from any thread at any time.
    """

    def __init__(
        self,
        device: Device,
        name: str,
        iothread: IoThread,
        assign_ioeventfd: Callable[[VirtQueue], Undo],
        *,
        ioeventfd: bool,
        mapping: Sequence[IoThread] = (),
    ) -> None:
        """With a `mapping` the queues take turns among its I/O threads, else `iothread` serves them all."""
        device.name = name
        self.device = device
        self.iothread = iothread
        self._declared = declared_queues(device)
        self.on_broken = OnBroken(name)
        self.state = DeviceState(name, self.on_broken)
        self.queues = [VirtQueue(self.state, q.name, index, q.size) for index, q in enumerate(self._declared)]
        self.iothreads = list(deal_out(device, len(self.queues), mapping or [iothread]))
        self.notifiers = HostNotifiers(name, self.queues, self._assign, self._poll, ioeventfd=ioeventfd)
        device.loops = [iothread.loop for iothread in self.iothreads]
        self.events = Events(device, self.state, iothread.loop)
        self._assign_ioeventfd = assign_ioeventfd
        self._features = 0
        device.config_changed = self.state.notify_config
        self._active = False
        device.attach(self)

    @property
    def loop(self) -> _core.IoThread:
        return self.iothread.loop

    def renew_handlers(self) -> None:
        """Serve the queues as the device declares them now."""
        self._declared = declared_queues(self.device)
        for vq, q in zip(self.queues, self._declared, strict=True):
            vq.set_handler(self.device.served_by(q, vq.index, self._features))

    def _assign(self, vq: VirtQueue) -> Undo:
        if faults := self.device.active_faults:
            faults.assigning(vq)
        return self._assign_ioeventfd(vq)

    def start_queue(
        self,
        index: int,
        memory: GuestMemory,
        setup: QueueSetup,
        features: int,
        *,
        legacy: bool = False,
        at: tuple[int, int] | None = None,
    ) -> None:
        """Take a ring into use; `GuestError` if it cannot be one. Served from `run` on, or by a legacy `notify`.

        `at` is where to go on after a `pause`: the next avail and used index.
        """
        self._features = features
        handler = self.device.served_by(self._declared[index], index, features)
        start_ring(self.queues[index], memory, handler, setup, features, legacy=legacy, at=at)

    def _poll(self, vq: VirtQueue) -> Undo:
        return self.iothreads[vq.index].poll(vq)

    def stop_queue(self, index: int) -> None:
        """Give one ring up (queue reset, or legacy QUEUE_PFN = 0); the others are served all the time."""
        with self.notifiers.without(index):
            self.queues[index].stop()

    def activate(self, features: int) -> None:
        """Tell the device what was agreed; the first call after a reset does."""
        if not self._active:
            self._active = True
            self.device.activate(features)

    def run(self, features: int) -> None:
        """DRIVER_OK: activate the device first, start the notifiers last. Repeating it changes nothing."""
        self.activate(features)
        self.state.driver_ok = True
        self.events.start()
        self.notifiers.start()

    def pause(self) -> dict[int, tuple[int, int]]:
        """Give all rings up without a reset; return where to go on, by queue index."""
        self.notifiers.stop()
        self.events.stop()
        return {vq.index: vq.stop() for vq in self.queues if vq.ready}

    def stop(self) -> None:
        """Stop the notifiers first, wait for what is in flight, and deactivate the device last."""
        self.notifiers.stop()
        self.events.stop()
        self.state.driver_ok = False
        for vq in self.queues:
            if vq.ready:
                vq.stop()
        if self._active:
            self._active = False
            reset_device(self.device)
        self.state.reset()

    def drain(self, patience: float = DRAIN) -> None:
        """Wait until the device holds no chain of a queue that is held; `ConfigError` if that lasts too long."""
        deadline = time.monotonic() + patience
        for vq in self.queues:
            while late := owed(vq):
                if time.monotonic() > deadline:
                    raise ConfigError(f"{self.state.name}.{vq.name}: {patience:g} s passed with {late}")
                time.sleep(0.001)

    def notify(self, index: int) -> None:
        """A notify that reached userspace; ignored for a queue that does not exist or has no ring."""
        if index < len(self.queues):
            self.queues[index].notify()
