"""One virtqueue as a vhost-user front-end sets it up: its vring with kick, call and err file descriptors."""

import os
import struct
from collections.abc import Callable
from contextlib import ExitStack

from pyvirtio._core import CallFd, DirtyLog, GuestMemory, InflightRegion, VirtQueue
from pyvirtio.dataplane import IoThread, QueueSetup, start_ring
from pyvirtio.device import Handler
from pyvirtio.errors import ProtocolError
from pyvirtio.notifiers import Undo
from pyvirtio.serve.memory import MemoryTable
from pyvirtio.spec import WRAP_COUNTER, Feature

Drain = Callable[[VirtQueue], object]
"""Waits for the chains of a queue that the device still holds."""


class Vring:
    """What the front-end has said about a queue; it runs while all of it is there.

    `start` and `stop` may be called at any time; the session does, after each change. Not thread-safe.
    """

    def __init__(self, vq: VirtQueue, handler: Handler, iothread: IoThread) -> None:
        self.vq = vq
        self.handler = handler
        self.iothread = iothread
        self.size = vq.max_size
        self.base: int | None = None
        """Where to go on, or where it stopped, as SET_VRING_BASE has it: the next avail index. For a packed ring the
        next used index is in the upper half, each with its wrap counter. None: at the start of the ring."""
        self._stopped_at: tuple[int, int] | None = None
        """The next avail and used indexes when it was stopped."""
        self._packed = False
        self.addresses: tuple[int, int, int] | None = None
        """Of descriptor table, avail ring and used ring, in the front-end's process."""
        self.inflight: InflightRegion | None = None
        """Where its requests in flight are noted, from its next start on; then these decide about `base`."""
        self.log_used: int | None = None
        """The guest address for which the used ring is marked in the log, if it is."""
        self._log: DirtyLog | None = None
        self.call: CallFd | None = None
        """What the driver is interrupted through."""
        self.enabled = False
        self.polled = False
        """The front-end sends no kicks: the ring is looked at all the time."""
        self._kick: int | None = None
        self._watch: Undo | None = None
        """Ends the watch over the kick fd."""
        self._polling: ExitStack | None = None

    @property
    def running(self) -> bool:
        return self._polling is not None

    @property
    def ready(self) -> bool:
        """Whether the front-end wants it served."""
        return self.enabled and self.addresses is not None and (self.polled or self._kick is not None)

    def set_kick(self, fd: int | None) -> None:
        """From now on kicks come through `fd`, which is the vring's now; None means that they do not come at all.

        A ring that runs goes on, with what is in flight.
        """
        self.close_kick()
        self._kick = fd
        self.polled = fd is None
        if self.running:
            self._watch_kick()
            self.vq.signal()  # for a kick that neither of the two has brought

    def close_kick(self) -> None:
        """Kicks no longer come from where they came."""
        self.polled = False
        self._leave_kick()
        if self._kick is not None:
            os.close(self._kick)
            self._kick = None

    def _watch_kick(self) -> None:
        try:
            if self._kick is not None:
                self._watch = self.iothread.poll_kick(self.vq, self._kick)
        except OSError as error:
            raise ProtocolError(f"{self.vq.name}: kick fd: {error.strerror}") from error

    def _leave_kick(self) -> None:
        watch, self._watch = self._watch, None
        if watch is not None:
            watch()

    def set_call(self, fd: int | None) -> None:
        """From now on the driver is interrupted through `fd`, which is duplicated."""
        call = call_fd(fd)
        self.vq.set_call(call)
        self.call = call
        if call and self.running:
            call.signal()  # what was meant for the fd before it may have been lost

    def set_memory(self, memory: GuestMemory) -> None:
        """Go on in other memory; `GuestError` if the ring does not lie in it."""
        if self.running:
            self.vq.set_memory(memory)

    def set_log(self, log: DirtyLog | None) -> None:
        """Where to mark what is written to guest memory from now on."""
        self._log = log
        self.vq.set_log(log, self.log_used)

    def start(self, table: MemoryTable, features: int) -> None:
        """Serve it from now on. `GuestError` if there can be no such ring, `ProtocolError` if the kick is none,
        `OSError` if the host cannot."""
        if self.running or self.addresses is None:
            return
        desc, avail, used = map(table.translate, self.addresses)
        setup = QueueSetup(self.size, desc, avail, used)
        legacy = not features & Feature.VERSION_1
        self._packed = bool(features & Feature.RING_PACKED)
        at = self._position(table.memory, used)
        if self.inflight and self._stopped_at not in (None, at):
            self.inflight.clear()  # not the ring that was stopped: the driver has reset the queue
        start_ring(self.vq, table.memory, self.handler, setup, features, legacy=legacy, at=at, inflight=self.inflight)
        self.vq.set_log(self._log, self.log_used)
        try:
            with ExitStack() as undo:
                self.vq.attach()
                undo.callback(self.vq.detach)
                undo.callback(self.iothread.poll(self.vq))
                undo.callback(self._leave_kick)
                self._watch_kick()
                self._polling = undo.pop_all()
        except (OSError, ProtocolError):
            self.vq.stop()
            raise

    def _position(self, memory: GuestMemory, used: int) -> tuple[int, int]:
        """The next avail and used indexes."""
        if not self._packed:
            # The protocol does not tell the used index. What is above the index was meant for a packed ring.
            _flags, next_used = struct.unpack("<HH", memory.read(used, 4))
            return (self.base or 0) & 0xFFFF, next_used
        if self.base is None or self.base == WRAP_COUNTER:  # DPDK leaves the upper half of a fresh ring at 0
            return WRAP_COUNTER, WRAP_COUNTER
        return self.base & 0xFFFF, self.base >> 16

    def stop(self, drain: Drain = lambda _: None) -> None:
        """Take nothing more, and `drain` what the device holds; `base` is where to go on."""
        polling, self._polling = self._polling, None
        if polling is None:
            return
        polling.close()
        drain(self.vq)
        self._stopped_at = avail, used = self.vq.stop()
        self.base = avail | used << 16 if self._packed else avail

    def close(self) -> None:
        """The front-end is gone."""
        self.stop()
        self.close_kick()
        self.vq.set_call(None)
        self.inflight = self._log = None


def call_fd(fd: int | None) -> CallFd | None:
    try:
        return None if fd is None else CallFd(fd)
    except OSError as error:
        raise ProtocolError(f"call fd: {error.strerror}") from error
