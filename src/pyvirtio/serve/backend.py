"""The device's side of a vhost-user session: its vrings, the guest memory, and whether it is active."""

import logging
import time
from collections.abc import Callable, Sequence

from pyvirtio._core import CallFd, DeviceState, DirtyLog, GuestMemory, VirtQueue
from pyvirtio.dataplane import IoThread, deal_out, declared_queues, owed, reset_device
from pyvirtio.device import Device, Handler
from pyvirtio.errors import GuestError, ProtocolError
from pyvirtio.events import Events
from pyvirtio.serve.memory import MemoryTable
from pyvirtio.serve.vring import Vring, call_fd
from pyvirtio.serve.wire import LOG_ALL, PROTOCOL_FEATURES

BITS_OF_A_PAGE = 8 * 4096
"""Bytes of guest memory for each byte of a log."""
RING_SIZE = 1024
"""Entries that any ring may have, whatever the device says: the protocol does not tell front-ends that."""
MAX_VRINGS = 256
"""The protocol has 8 bits for an index where a file descriptor comes with it."""

Gone = Callable[[float], bool]
"""Waits so many seconds for the front-end to go; whether it has."""
PATIENCE = 1.0
"""Seconds after which a stop says what it waits for."""
LOOK = 0.001
"""Seconds after which it looks again."""

log = logging.getLogger("pyvirtio")


def _broken(name: str, errs: dict[int, CallFd]) -> Callable[[str], None]:
    """What to do when the device breaks, on any thread. No method: the state would keep its session alive."""

    def tell(reason: str) -> None:
        log.error("%s: needs a reset: %s", name, reason)
        for err in list(errs.values()):
            err.signal()

    return tell


class Backend:
    """Runs the rings of a device that are ready. A change sets what it concerns and settles; one thread does so."""

    def __init__(self, device: Device, iothreads: Sequence[IoThread], gone: Gone) -> None:
        self.device = device
        self._gone = gone
        self.features = 0
        self.status = 0
        """What the front-end last said that it is."""
        self.table = MemoryTable()
        self._errs: dict[int, CallFd] = {}
        self.state = DeviceState(device.name, _broken(device.name, self._errs))
        self._queues = declared_queues(device, MAX_VRINGS)
        self.vrings = []
        for index, iothread in enumerate(deal_out(device, len(self._queues), iothreads)):
            q = self._queues[index]
            vq = VirtQueue(self.state, q.name, index, max(q.size, RING_SIZE))
            # The methods of a device all run on one thread.
            self.vrings.append(Vring(vq, q.handler, iothreads[0] if callable(q.handler) else iothread))
        device.loops = [vring.iothread.loop for vring in self.vrings]
        self.events = Events(device, self.state, iothreads[0].loop)
        self._log: GuestMemory | None = None
        self._log_call: CallFd | None = None
        self.loop = iothreads[0].loop
        self._activated: int | None = None
        """The features that the device was activated with."""
        device.attach(self)

    @property
    def queues(self) -> list[VirtQueue]:
        return [vring.vq for vring in self.vrings]

    def renew_handlers(self) -> None:
        """Serve the queues as the device declares them now."""
        self._queues = declared_queues(self.device, MAX_VRINGS)
        for vring in self.vrings:
            vring.handler = self._handler(vring)
            vring.vq.set_handler(vring.handler)

    def _handler(self, vring: Vring) -> Handler:
        index = vring.vq.index
        return self.device.served_by(self._queues[index], index, self._agreed)

    def settle(self) -> None:
        """Run the rings that are ready, and no others. Calling it twice changes nothing."""
        log = self._dirty_log()
        for vring in self.vrings:
            vring.set_log(log)
            if not vring.ready:
                self.stop(vring)
        for vring in self.vrings:
            if vring.ready and not vring.running:
                try:
                    self._activate()
                    vring.handler = self._handler(vring)
                    vring.start(self.table, self.features)
                except GuestError as error:
                    vring.addresses = None
                    self.state.fail(f"{vring.vq.name}: {error}")
                    raise
        self.device.serves([vring.vq.index for vring in self.vrings if vring.running])

    def stop(self, vring: Vring) -> None:
        """Take nothing more, and wait for what the device holds of it, as long as the front-end is there."""
        vring.stop(self._drain)

    def _drain(self, vq: VirtQueue) -> None:
        told, patient_until = False, time.monotonic() + PATIENCE
        while (late := owed(vq)) and not self.state.broken and not self._gone(LOOK):
            if not told and time.monotonic() > patient_until:
                told = True
                log.warning("%s: %s: its stop waits for %s", self.device.name, vq.name, late)
            if told and self.device.active_faults:
                break  # one may be lost on purpose
        if late:
            log.warning("%s: %s: stopped with %s", self.device.name, vq.name, late)

    def memory_changed(self) -> None:
        for vring in self.vrings:
            try:
                vring.set_memory(self.table.memory)
            except GuestError as error:
                self.state.fail(f"{vring.vq.name} lost its memory: {error}")
        self.settle()

    def set_log(self, bitmap: GuestMemory) -> None:
        """Where to mark what is written, while the features say so."""
        ((_, size, _, _),) = bitmap.regions
        if size * BITS_OF_A_PAGE < self.table.end:
            raise ProtocolError(f"a log of {size} bytes ends before the memory does ({self.table.end:#x})")
        self._log = bitmap
        self.settle()

    def set_log_call(self, call: CallFd | None) -> None:
        """What to signal when something was marked."""
        self._log_call = call
        self.settle()

    def _dirty_log(self) -> DirtyLog | None:
        return DirtyLog(self._log, self._log_call) if self._log and self.features & LOG_ALL else None

    def set_err(self, index: int, fd: int | None) -> None:
        """Where to tell that the device is broken; the fd is duplicated."""
        if call := call_fd(fd):
            self._errs[index] = call
        else:
            self._errs.pop(index, None)

    def let_go(self) -> None:
        """The front-end is gone, or is to go: nobody waits until it can be told something. Any thread."""
        for call in (*[vring.call for vring in self.vrings], *self._errs.values(), self._log_call):
            if call:
                call.let_go()

    def recover(self) -> None:
        """A device of which no ring runs any more is whole again: nothing is left of what broke it."""
        if not any(vring.running for vring in self.vrings):
            self.state.reset()

    def reset(self) -> None:
        """The driver has reset the device: nobody waits for what is in flight."""
        for vring in self.vrings:
            vring.stop()
            vring.enabled, vring.base, vring.inflight = False, None, None
            vring.close_kick()
        self._reset_device()

    def close(self) -> None:
        """The front-end is gone: give up all that came from it."""
        for vring in self.vrings:
            vring.close()
        self._reset_device()
        self.device.detach()

    @property
    def _agreed(self) -> int:
        """The features that concern the device."""
        return self.features & ~(PROTOCOL_FEATURES | LOG_ALL)

    def _activate(self) -> None:
        """Tell the device what was agreed, before its first ring runs; anew if a driver agrees on something else."""
        features = self._agreed
        if self._activated == features or any(vring.running for vring in self.vrings):
            return
        self._reset_device()
        self._activated = features
        self.device.activate(features)
        self.events.start()

    def _reset_device(self) -> None:
        """No ring runs."""
        self.events.stop()
        if self._activated is not None:
            self._activated = None
            if faults := self.device.active_faults:
                time.sleep(faults.reset_time())
            reset_device(self.device)
        self.state.reset()
