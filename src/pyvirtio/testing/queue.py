"""A virtqueue in the hands of a test driver: buffers to add, kicks, interrupts to wait for."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from pyvirtio._core import GuestMemory, IrqLine
from pyvirtio.accel.inproc import InProcess
from pyvirtio.spec import Feature
from pyvirtio.testing.heap import Heap
from pyvirtio.testing.packed import PackedRing
from pyvirtio.testing.ring import INDIRECT, WRITE, Entry, SplitRing

HANG = 10.0
"""Seconds after which a wait counts as a hang; nothing that works takes a hundredth of it."""

SOON = 0.001
"""Seconds that a queue's interrupt has to come before its driver looks elsewhere for the reason."""
LOOK = 0.02
"""Seconds between two looks at something that comes without an interrupt."""

Range = tuple[int, int]  # guest address, bytes
Ring = SplitRing | PackedRing


class DeviceNeedsReset(Exception):
    """The device set DEVICE_NEEDS_RESET while the driver waited for a buffer."""


class Interrupts(Protocol):
    """A source of interrupts: what to poll, and how many were taken for queues and for the configuration."""

    count: int
    config_count: int

    def fds(self) -> list[int]: ...
    def take(self) -> bool:
        """Take what has arrived; return whether there was anything."""


class Driver(Protocol):
    """What a queue needs of its driver. The attributes that it does not name are its queues."""

    name: str

    @property
    def memory(self) -> GuestMemory: ...
    @property
    def heap(self) -> Heap: ...
    @property
    def config_source(self) -> Interrupts: ...
    def notify(self, index: int, size: int) -> None: ...
    def take_interrupts(self, only: Interrupts | None = None) -> bool: ...
    def check(self) -> None: ...
    def owed(self, index: int) -> str:
        """What the device has taken of a queue and not completed, in words, as far as the driver can know."""

    def __getattr__(self, name: str) -> Any: ...


class Msi:
    """The interrupts of one MSI message."""

    def __init__(self, accel: InProcess, address: int, data: int) -> None:
        self.accel, self.message = accel, (address, data)
        self.count = self.config_count = 0
        self._fds: list[int] = []
        self._routed = -1

    def fds(self) -> list[int]:
        if self._routed != self.accel.routed:
            self._routed = self.accel.routed
            routes = list(self.accel.routes.items())
            self._fds = [vector.fd for vector, message in routes if message == self.message]
        return self._fds

    def take(self) -> bool:
        taken = sum(map(_drain, self.fds()))
        self.count += taken
        self.config_count += taken
        return taken > 0


class Intx:
    """The INTx line of a function; its ISR register tells what an interrupt was for (virtio 1.3, 4.1.4.5)."""

    def __init__(self, line: IrqLine, read_isr: Callable[[], int]) -> None:
        self.line, self.read_isr = line, read_isr
        self.count = self.config_count = 0

    def fds(self) -> list[int]:
        return [self.line.fd]

    def take(self) -> bool:
        if not _drain(self.line.fd):
            return False
        isr = self.read_isr()
        self.count += isr & 1
        self.config_count += isr >> 1 & 1
        return True


def make_ring(memory: GuestMemory, heap: Heap, size: int, features: int) -> Ring:
    """A ring in fresh memory, of the kind that was agreed."""
    event_idx, in_order = bool(features & Feature.EVENT_IDX), bool(features & Feature.IN_ORDER)
    if features & Feature.RING_PACKED:
        return PackedRing.allocate(memory, heap, size, event_idx=event_idx, in_order=in_order)
    return SplitRing.allocate(memory, heap, size, event_idx=event_idx)


def queue_named(queues: Sequence[Queue], name: str) -> Queue | list[Queue]:
    """The queue with this name in the specification, or the list of those that are numbered."""
    named = {queue.name: queue for queue in queues}
    if name in named:
        return named[name]
    numbered = [queue for queue in queues if queue.name.rstrip("0123456789") == name]
    if not numbered:
        raise AttributeError(name)
    return numbered


def sleep_on(fds: Iterable[int], seconds: float) -> bool:
    """Sleep until one of the eventfds is signalled; return whether one is."""
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    return bool(poll.poll(max(0.0, seconds) * 1000))


def _drain(fd: int) -> int:
    """How often an eventfd was signalled since it was last read; does not block."""
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0


class Buffer:
    """A request on its way: its descriptors as they stand in the chain, and the table if it has one of its own."""

    used_len: int | None = None
    data = b""
    """What the device wrote, `used_len` bytes at most; the guest memory is free again once it is here."""
    room = b""
    """The whole device-writable part as the device left it, also what it did not count."""

    def __init__(self, queue: Queue, descs: list[Entry], table: Range | None, head: int) -> None:
        self.queue, self.descs, self.table, self.head = queue, descs, table, head

    def __str__(self) -> str:
        return f"buffer {self.head} is used"

    @property
    def readable(self) -> list[Range]:
        """The ranges of guest memory that the device reads, in the order of the chain."""
        return [(address, length) for address, length, flags, _ in self.descs if not flags & WRITE]

    @property
    def writable(self) -> list[Range]:
        """Those that it writes."""
        return [(address, length) for address, length, flags, _ in self.descs if flags & WRITE]

    @property
    def done(self) -> bool:
        return self.used_len is not None

    def is_done(self) -> bool:
        return self.used_len is not None

    def wait(self, timeout: float = HANG) -> bytes:
        """Sleep until an interrupt shows that the device has used the buffer; return what it wrote."""
        if self.used_len is None:
            self.queue.wait_until(self.is_done, self, timeout)
        return self.data

    def finish(self, used_len: int | None) -> None:
        """None stands for all of the room: what IN_ORDER skips was used whole."""
        pieces = []
        for address, length, flags, _ in self.descs:
            if flags & WRITE:
                pieces.append(self.queue.memory.read(address, length))
        self.room = b"".join(pieces)
        self.used_len = len(self.room) if used_len is None else used_len
        self.data = self.room[: self.used_len]
        self.free()

    def free(self) -> None:
        """Give the guest memory of the request back."""
        for address, length, _, _ in self.descs:
            self.queue.heap.free(address, length)
        if self.table:
            self.queue.heap.free(*self.table)


class Queue:
    """One virtqueue of a device, driven by the rules; `ring` is there to break them.

    `add` prepares buffers, `kick` shows them to the device and notifies it if it asked for that. The used ring is
    looked at after an interrupt only, so a lost interrupt is a hang, unless `polling`.
    """

    def __init__(self, driver: Driver, index: int, name: str, ring: Ring, interrupts: Interrupts) -> None:
        self.driver, self.index, self.name = driver, index, name
        self.ring: Any = ring
        """A `SplitRing` or a `PackedRing`; what only one of them has is for tests that know which it is."""
        self.source = interrupts
        self.memory: GuestMemory = driver.memory
        self.heap: Heap = driver.heap
        self.indirect = False
        self.polling = False
        self.pending: dict[int, Buffer] = {}
        self.strays: list[tuple[int, int]] = []
        """Used elements (id, len) of no buffer that was added."""

    def add(
        self,
        readable: bytes | Sequence[bytes] = b"",
        writable: int | Sequence[int] = 0,
        *,
        indirect: bool | None = None,
    ) -> Buffer:
        """Prepare a request: device-readable bytes, then room for the device; a list makes one descriptor of each."""
        parts = (readable,) if isinstance(readable, (bytes, bytearray)) else readable
        sizes = (writable,) if isinstance(writable, int) else writable
        descs: list[Entry] = []
        for part in parts:
            if part:
                descs.append((*self._place(part), 0, 0))
        for size in sizes:
            if size:
                descs.append((self.heap.allocate(size), size, WRITE, 0))
        if self.indirect if indirect is None else indirect:
            table = self.place_table(self.ring.linked(descs))
            head = self.ring.add([(*table, INDIRECT, 0)])
        else:
            table, head = None, self.ring.add(descs)
        buffer = self.pending[head] = Buffer(self, descs, table, head)
        return buffer

    def _place(self, data: bytes) -> Range:
        address = self.heap.allocate(len(data))
        self.memory.write(address, data)
        return address, len(data)

    def place_table(self, descs: Sequence[Entry]) -> Range:
        """Put an indirect table somewhere, as it is given."""
        return self._place(self.ring.table(descs))

    def publish(self) -> bool:
        """Show what was added to the device without telling it; return whether it wants to be told."""
        return bool(self.ring.publish())

    def kick(self) -> None:
        """Publish, and notify unless the device asked not to."""
        if self.publish():
            self.notify()

    def notify(self, size: int = 2) -> None:
        """Write the queue's number to its notify register, as a vCPU does; with another width, or at any time."""
        self.driver.notify(self.index, size)

    @property
    def interrupts(self) -> int:
        """Interrupts received so far; of several queues, where they share a vector or the INTx line."""
        self.driver.take_interrupts()
        return self.source.count

    def wait_until(self, done: Callable[[], bool], what: object, timeout: float = HANG) -> None:
        """Sleep on the queue's interrupts until `done`. `DeviceNeedsReset` if the device breaks, `TimeoutError`."""
        deadline = time.monotonic() + timeout
        while not done():
            if self.polling:
                self.collect()
                time.sleep(0.0002)
            elif not self.driver.take_interrupts(self.source) and not sleep_on(self.source.fds(), SOON):
                self._look_around(min(LOOK, deadline - time.monotonic()))
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.driver.name}.{self.name}: {timeout} s passed before {what}{self._owed()}")

    def _look_around(self, seconds: float) -> None:
        """What is waited for need not interrupt: take what came from elsewhere, or ask the device and sleep."""
        if not self.driver.take_interrupts():
            self.driver.check()
            sleep_on(self.source.fds() + self.driver.config_source.fds(), seconds)

    def _owed(self) -> str:
        owed = self.driver.owed(self.index)
        return f"; {owed}" if owed else ""

    def collect(self) -> None:
        """Take every buffer that the device has used, and ask for an interrupt for the next."""
        while True:
            for head, length in self.ring.take_used():
                if buffer := self.pending.pop(head, None):
                    buffer.finish(length)
                else:
                    self.strays.append((head, length))
            self.ring.expect_interrupt()
            if not self.ring.has_used:
                return

    def free(self) -> None:
        """The device was reset: nothing of the queue is in use any more."""
        for buffer in self.pending.values():
            buffer.free()
        self.pending.clear()
        self.heap.free(self.ring.desc, self.ring.span)
