"""The Rust core as Python sees it: guest memory, virtqueues, interrupts, I/O threads and KVM."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, Protocol, Self, TypeAlias, final, type_check_only

from typing_extensions import Buffer

from pyvirtio.backends.block import BlockBackend

__all__ = [
    "BlkLoad",
    "BlkPlane",
    "CallFd",
    "Chain",
    "Completed",
    "DeviceState",
    "DirtyLog",
    "DriverQueue",
    "FileIo",
    "GuestMemory",
    "InflightRegion",
    "IoThread",
    "IrqLine",
    "Isr",
    "Kick",
    "MsixVector",
    "NbdLoad",
    "NetLoad",
    "NetPlane",
    "NullIo",
    "Serial",
    "Timer",
    "Vcpu",
    "VirtQueue",
    "Vm",
    "Watch",
    "io_uring_missing",
    "supported",
    "tsc",
]

_Handler: TypeAlias = "Callable[[VirtQueue], object] | BlkPlane | NetPlane"

@final
class GuestMemory:
    """Guest RAM: regions of files that are mapped shared.

    A region is `(guest address, size, fd, file offset)`, all in bytes. The object keeps its own duplicates of the
    fds. Every access is checked against the regions and raises `GuestError` outside them; an access may cross
    from one region into an adjacent one. Safe from any thread. `OSError` or `ValueError` for regions that cannot be
    mapped or overlap.
    """

    def __new__(cls, regions: Sequence[tuple[int, int, int, int]]) -> Self: ...
    @staticmethod
    def allocate(ranges: Sequence[tuple[int, int]]) -> GuestMemory:
        """Fresh zeroed RAM (one memfd) at each `(guest address, size)`."""
    def remap(self, regions: Sequence[tuple[int, int, int, int]]) -> GuestMemory:
        """Other regions in the place of these; those that are the same, fd included, are shared and not mapped anew."""
    @property
    def regions(self) -> list[tuple[int, int, int, int]]: ...
    def read(self, address: int, length: int) -> bytes: ...
    def write(self, address: int, data: Buffer) -> None: ...
    def load16(self, address: int) -> int:
        """One atomic load, sequentially consistent: a driver looks for a wish for kicks after it has published."""
    def store16(self, address: int, value: int) -> None:
        """One atomic store, sequentially consistent."""
    def view(self, address: int, length: int) -> memoryview:
        """Guest memory itself, writable, through Python's own mapping; must lie in one region."""

@final
class IrqLine:
    """A level-triggered interrupt line: KVM's, or one that only remembers its level for the in-process accelerator.

    Several devices may share a line (`IrqLine.share`): it is high while one of them holds it high.
    """

    def __new__(cls) -> Self:
        """A line that only remembers its level; `fd` (an eventfd) is signalled whenever it rises."""
    @property
    def level(self) -> bool: ...
    @property
    def fd(self) -> int:
        """`AttributeError` for a line of KVM."""
    def set(self, level: bool) -> None: ...
    def share(self) -> IrqLine:
        """A further input of the same line, for another device."""

@final
class Isr:
    """The ISR status of one device (virtio 1.3, 4.1.4.5), and its INTx line."""

    def __new__(cls, line: IrqLine) -> Self: ...
    intx_enabled: bool
    def read(self) -> int:
        """Return the bits, clear them and lower the line."""
    def peek(self) -> int: ...
    def post(self, bits: int) -> None:
        """Set bits, and raise the line."""

@final
class MsixVector:
    """One MSI-X vector: an eventfd that KVM takes as irqfd, with its mask and pending bits."""

    def __new__(cls) -> Self: ...
    @property
    def fd(self) -> int: ...
    masked: bool
    pending: bool
    def signal(self) -> None: ...

@final
class CallFd:
    """What a vhost-user front-end is told by: its eventfd, pipe or socket, duplicated and made non-blocking."""

    def __new__(cls, fd: int) -> Self: ...
    def signal(self) -> None:
        """Write to it. Blocks only on an eventfd that the front-end has filled and made blocking, until `let_go`."""

    def let_go(self) -> None:
        """See that no thread waits in `signal` for a front-end that is gone, or is to go. Any thread."""

@final
class DeviceState:
    """What the queues of one device share: its epoch, whether it is broken, and its configuration interrupt.

    `on_broken(reason)` runs on the thread that found the reason, before the driver is interrupted. That thread may be
    serving a queue: it must not wait for anything that waits for a queue to stop.
    """

    def __new__(cls, name: str, on_broken: Callable[[str], object]) -> Self: ...
    @property
    def name(self) -> str: ...
    @property
    def broken(self) -> str | None:
        """Why the device needs a reset, or None."""
    driver_ok: bool
    def fail(self, reason: str) -> None:
        """Break the device: no queue takes a further chain, and a driver that is up gets a configuration interrupt."""
    def set_config_interrupt(self, isr: Isr, vector: MsixVector | None) -> None: ...
    def notify_config(self) -> None:
        """Send the configuration interrupt (ISR bits 0 and 1, as QEMU does)."""
    def reset(self) -> None:
        """Start a new epoch: chains of the old one raise `StaleChain`; forget why the device was broken."""

@final
class DirtyLog:
    """A bitmap of the pages of guest memory that a device has written, which a front-end clears as it likes.

    `bitmap` is the file of the bits, from address 0; `changed` is signalled after some were set. What lies past its end
    is not marked.
    """

    def __new__(cls, bitmap: GuestMemory, changed: CallFd | None) -> Self: ...

@final
class InflightRegion:
    """Where a queue of at most `entries` entries notes its requests in flight: `bytes(entries)` at `at` in `memory`.

    Zeroes are a region that has not been used yet.
    """

    def __new__(cls, memory: GuestMemory, at: int, entries: int) -> Self: ...
    def clear(self) -> None:
        """Forget what it says, while no ring uses it. `GuestError` if it does not lie in the memory."""
    @staticmethod
    def bytes(entries: int) -> int: ...

@final
class Chain:
    """One request of the driver: its device-readable bytes, then its device-writable bytes.

    Reading and writing advance; what was written is counted and reported as the used length. Any thread; every
    method raises `StaleChain` once its queue was stopped or its device reset. A chain that is dropped before that
    without `complete` breaks the device.
    """

    @property
    def head(self) -> int:
        """The descriptor it starts with: tells apart the chains that are out."""
    @property
    def readable(self) -> int:
        """Bytes left to read."""
    @property
    def writable(self) -> int:
        """Bytes left to write."""
    def read(self, length: int | None = None) -> bytes:
        """The next `length` bytes, or all that are left; fewer where the chain ends."""
    def unpack(self, format: str) -> tuple[int | bytes, ...]:
        """Read what `struct.calcsize(format)` asks for and unpack it; `GuestError` if the chain is shorter."""
    def write(self, data: Buffer) -> int:
        """Write as much of `data` as fits; return how many bytes did."""
    def buffers(self) -> tuple[list[memoryview], list[memoryview]]:
        """What is left to read and what is left to write, in place; both are passed over.

        The views are guest memory itself, which the guest may change at any time: copy, then check. They are valid
        until the handler returns; outside of it the call raises `RuntimeError`. `wrote` counts what was written.
        """
    def wrote(self, length: int) -> None:
        """Count `length` bytes that were written through `buffers`; `ValueError` for more than it gave room for."""
    def discard(self, address: int, length: int) -> None:
        """Give the whole pages in a range of guest memory back to the host; they read as zeroes until they are written.

        `GuestError` if it is not all RAM, `OSError` if the host cannot.
        """
    def discard_buffers(self) -> None:
        """The same for the pages of the device-writable buffers."""
    def complete(self) -> None:
        """Give the chain back to the driver, with what was written as the used length.

        In the handler it is published when that returns, elsewhere at once. A second call raises `RuntimeError`.
        """

@final
class Completed:
    """A chain that its handler completed and that a tap keeps from the driver."""

    @property
    def head(self) -> int: ...
    @property
    def length(self) -> int:
        """The used length that the driver is told."""
    def resized(self, length: int) -> Completed:
        """The same chain with another used length."""

@final
class VirtQueue:
    """One virtqueue: iterate over it to take the chains the driver made available.

    A handler never runs twice at once. Chains completed inside the handler are published together with one
    interrupt decision; chains completed later, from any thread, at once. A malformed chain ends the iteration and
    breaks the device, as does an exception of the handler other than `StaleChain`.
    """

    def __new__(cls, state: DeviceState, name: str, index: int, max_size: int) -> Self: ...
    @property
    def name(self) -> str: ...
    @property
    def handler_name(self) -> str:
        """What messages call who serves it, or served it last: `Class.method` of a device."""
    @property
    def index(self) -> int: ...
    @property
    def max_size(self) -> int: ...
    @property
    def size(self) -> int:
        """Entries of the ring, 0 while the queue is not started."""
    @property
    def ready(self) -> bool:
        """Whether the queue has a ring."""
    @property
    def attached(self) -> bool: ...
    @property
    def kick_fd(self) -> int: ...
    def start(
        self,
        memory: GuestMemory,
        handler: _Handler,
        *,
        size: int,
        desc: int,
        avail: int,
        used: int,
        packed: bool = False,
        in_order: bool = False,
        event_idx: bool = False,
        indirect: bool = False,
        notify_on_empty: bool = False,
        next_avail: int = 0,
        next_used: int = 0,
        inflight: InflightRegion | None = None,
    ) -> None:
        """Take a ring into use. `GuestError` if it is unaligned, overlaps itself or lies outside RAM.

        `avail` and `used` are the driver's and the device's area; of a packed ring the event suppression structures.
        Its indexes carry the wrap counter in bit 15: a fresh one starts at 0x8000. With `in_order` chains are
        given back in the order in which they were taken.
        With `inflight`, what it says was in flight is served first, and decides about `next_avail`.
        """
    def stop(self) -> tuple[int, int]:
        """Wait for a running handler, forget the ring; return its next avail and used indexes as `start` takes them.

        A handler may stop its own queue: then nothing is waited for.
        """
    def hold(self) -> None:
        """Wait for a running handler; no chain is taken until `release`. Those that are out may be completed.

        A handler may hold its own queue: then nothing is waited for.
        """
    def release(self) -> None:
        """End one `hold`. Attach or `service` afterwards: who was turned away meanwhile is not called back."""
    @property
    def position(self) -> tuple[int, int] | None:
        """What `stop` would return; None while the queue is not started."""
    def watch(self, callback: Callable[[dict[str, Any] | None], object]) -> None:
        """Call `callback(ring)` after each look at the ring, before anybody can complete what was taken, after each
        publication, and at a start and a stop; set once for good. On the thread that does it, which waits.

        `ring` is what `start` was given, a new one for each start; None while there is none.
        """
    def set_interrupt(self, isr: Isr, vector: MsixVector | None) -> None: ...
    def set_call(self, call: CallFd | None) -> None:
        """Interrupt by writing to a front-end's fd, or not at all."""
    def set_memory(self, memory: GuestMemory) -> None:
        """Go on in other guest memory with the ring at the same addresses; a chain that is out keeps the old one.

        `GuestError` if the ring does not lie in it; then it stays where it is.
        """
    def set_handler(self, handler: _Handler) -> None:
        """Serve by another handler from its next call on; what the old one has taken is its to complete."""
    def set_tap(self, tap: Callable[[list[Completed]], object] | None) -> None:
        """Give every chain that is completed to `tap` instead of the driver; None ends that.

        It runs where the chains would have been published: on the thread that serves the queue, or on the one that
        completed late. Holds for all later starts of the queue. The queue keeps `tap` alive.
        """
    def give_back(self, chains: Sequence[Completed], interrupt: bool | None = None) -> None:
        """Put chains that a tap got into the used ring, in this order, and publish them. Any thread.

        `interrupt` overrides whether the driver is interrupted; with no chains it is for nothing. A chain of before
        the last stop of the queue is dropped.
        """
    def set_log(self, log: DirtyLog | None, used: int | None = None) -> None:
        """Mark from now on, until the ring stops, what is written to guest memory.

        The used ring is marked as if it lay at the guest address `used`, or not at all.
        """
    def service(self) -> bool:
        """Serve what is available, on this thread, or leave it to the thread that serves already.

        True if the budget was used up while attached: the eventfd is signalled for the rest.
        """
    def notify(self) -> None:
        """A notify that reached userspace: serve it here, or signal the eventfd while that is attached."""
    def attach(self) -> None:
        """From here on the eventfd carries the kicks; leaves it signalled."""
    def detach(self) -> None:
        """From here on notifies are served by `notify`; serves a kick that is still in the eventfd."""
    def signal(self) -> None:
        """Signal the eventfd as a kick does."""
    def interrupt(self) -> None:
        """Interrupt the driver, whatever it asked for: who serves the ring instead (kernel vhost) has decided."""
    def __iter__(self) -> Iterator[Chain]: ...
    def __next__(self) -> Chain: ...
    @property
    def in_flight(self) -> int:
        """Chains taken and not given back."""
    @property
    def asked(self) -> int:
        """At how many places of the ring a kick was asked for since the start, which is the first of them."""
    @property
    def kicked(self) -> int:
        """How many kicks of the driver were found since the queue was made: exits, and signals that are not our own."""
    @property
    def counters(self) -> dict[str, int]:
        """notifies (exits), kicks (signals seen), wakeups, answers (of the host, which woke the I/O thread), chains,
        interrupts, suppressed; since the queue was made."""

@final
class Timer:
    """A timer whose fd is readable once it has expired, for `IoThread.watch`; stopped at first."""

    def __new__(cls) -> Self: ...
    @property
    def fd(self) -> int: ...
    def start(self, first: float, interval: float = 0.0) -> None:
        """Expire `first` seconds from now, then every `interval` seconds unless that is 0."""
    def stop(self) -> None: ...
    def take(self) -> int:
        """How often it expired since this was last asked; 0 makes its fd wait for the next time."""

@final
class IoThread:
    """The loop of an I/O thread: waits for kicks and serves the queues. `run` is the target of a Python thread."""

    def __new__(cls, *, poll_max_ns: int = 32768, poll_grow: int = 0, poll_shrink: int = 0) -> Self: ...
    poll_max_ns: int
    def run(self) -> None:
        """Serve until `close`; call it once, on a thread made by Python."""
    def close(self) -> None: ...
    def add(self, vq: VirtQueue) -> None:
        """Poll the queue's eventfd from now on. `OSError` if epoll refuses."""
    def add_kick(self, vq: VirtQueue, fd: int) -> Kick:
        """Serve a queue that was added also whenever `fd` is signalled, which is duplicated and never read."""
    def remove(self, vq: VirtQueue) -> None: ...
    def watch(self, fd: int, callback: Callable[[], object]) -> Watch:
        """Call `callback` on the I/O thread whenever `fd` (duplicated) is readable, again and again while it is.

        Now and then it is not: never block. An exception is logged and disarms the watch. `OSError` if epoll refuses.
        """

@final
class Watch:
    """An fd that an I/O thread waits for, armed at first. Its owner must close it. Any thread, also in the callback."""

    def arm(self) -> None: ...
    def disarm(self) -> None:
        """No call begins from now on; one that runs already is not waited for. The same for `close`."""
    def close(self) -> None: ...

@final
class Kick:
    """Somebody else's kick fd, polled by an I/O thread until it is closed."""

    def close(self) -> None: ...

@final
class FileIo:
    """A raw file (the fd is duplicated), and how the core reads and writes it.

    "threads": the thread that serves the queue does, and waits. "io_uring": many at a time, answered as they come.
    With O_DIRECT, buffers and offsets of the file have to be multiples of `align` bytes; others are copied.
    """

    def __new__(cls, fd: int, *, align: int = 1, aio: str = ...) -> Self: ...
    @property
    def aio(self) -> str: ...

def io_uring_missing() -> str | None:
    """None if this host gives us io_uring, else why not."""

@final
class NullIo:
    """A disk that does nothing: a read leaves the guest's buffers as they are, a write goes nowhere."""

    def __new__(cls) -> Self: ...

@final
class BlkPlane:
    """Serves virtio-blk requests (virtio 1.3, 5.2.6): parses them, and does the I/O natively or through a backend.

    `backend` is an fd of a raw file (duplicated; served without Python), a `FileIo`, a `NullIo` or a `BlockBackend`.
    `capacity` is in bytes. One plane may serve any number of queues.
    """

    def __new__(
        cls,
        backend: int | FileIo | NullIo | BlockBackend,
        *,
        capacity: int,
        readonly: bool = False,
        flush: bool = True,
        discard: bool = False,
        write_zeroes: bool = False,
        serial: bytes = ...,
        block_size: int = 512,
        max_discard_sectors: int = 0,
        max_write_zeroes_sectors: int = 0,
        max_discard_segments: int = 1,
    ) -> Self: ...
    capacity: int
    """Requests that pass its end are refused; may change while others are served."""
    writethrough: bool
    """Flush after every write (the driver did not take VIRTIO_BLK_F_FLUSH, or switched the cache off)."""
    @property
    def counters(self) -> dict[str, int]:
        """reads, writes, flushes, discards, merged, errors, bytes_read, bytes_written.

        `merged` counts requests that were done together with the one before.
        """

@final
class DriverQueue:
    """A queue for a driver that measures: its ring, of `size` descriptors, is fresh and known to the back-end.

    `buffers` is the guest address of memory for what is offered. The socket `connection` and the err fd tell when
    there will be no answer. All file descriptors stay the caller's.
    """

    def __new__(
        cls,
        *,
        size: int,
        desc: int,
        avail: int,
        used: int,
        kick: int,
        call: int,
        connection: int,
        err: int,
        buffers: int,
        event_idx: bool = False,
        indirect: bool = False,
        packed: bool = False,
    ) -> Self: ...

@final
class BlkLoad:
    """The driver's side of a vhost-user-blk device under load, for measuring.

    The buffers of a queue are `iodepth * (block_size + CONTROL_BYTES)` bytes. The queues share the first `blocks` of
    the disk.
    """

    CONTROL_BYTES: int
    def __new__(
        cls,
        memory: GuestMemory,
        queues: Sequence[DriverQueue],
        *,
        block_size: int,
        blocks: int,
        iodepth: int,
    ) -> Self: ...
    def run(
        self,
        *,
        write_percent: int = 0,
        random: bool = True,
        iodepth: int = 1,
        seconds: float = 3600.0,
        requests: int = ...,
        poll: bool = False,
        verify: bool = False,
        seed: int = 1,
    ) -> dict[str, Any]:
        """Keep `iodepth` requests in flight in each queue, for `seconds` or so many `requests` of each.

        `verify`: what is written can be told from anything else, and what is read where it was written before must be
        that. Returns the counts reads, writes, errors, kicks and interrupts, and seconds, p50, p99, p99_9 and max (of
        the latencies) in seconds. `ProtocolError` for what the back-end did wrong. The interpreter is not held.
        """

@final
class NetLoad:
    """The driver's side of vhost-user-net devices under load, for measuring.

    Frames are sent on the queues of `transmit`, a stream each, and taken from those of `receive`. The buffers of a
    queue are `room` bytes for each of its descriptors: a header of 12 bytes and a frame. Sequence numbers begin with
    `first`: a larger one each time tells what a network kept from before.
    """

    def __new__(
        cls,
        memory: GuestMemory,
        *,
        room: int,
        transmit: Sequence[DriverQueue],
        receive: Sequence[DriverQueue],
        first: int,
    ) -> Self: ...
    def run(
        self, *, frame_size: int, seconds: float, burst: int = 32, poll: bool = False, verify: bool = False
    ) -> dict[str, Any]:
        """Send and receive for `seconds`, and until the device has taken what was sent.

        With `verify` the frames can be told from any others, and those that come are looked at. Returns tx_frames,
        rx_frames, tx_bytes, rx_bytes, kicks, interrupts and seconds. `ProtocolError` for what the back-end did wrong.
        The interpreter is not held.
        """
    def settle(self, *, poll: bool = False) -> dict[str, int]:
        """After runs that verify: receive what is under way, and say what became of the frames since the last time.

        lost (sent and not received whole; of a stream that is not ours, what is missing in it), reordered (or received
        twice), damaged, and foreign: those that were not sent here since.
        """

@final
class NetPlane:
    """Moves the frames of a virtio-net device (virtio 1.3, 5.1): queue 2n receives for queue pair n, 2n + 1 sends.

    `fds` are duplicated, made non-blocking and served without Python, one for each queue pair; `NetBackend` says what
    `framing` and `vnet_header` mean. Without any, frames of the guest go to `send`, or nowhere, and those for it come
    from `inject`. `pcap` is the fd of an empty file, which is duplicated and gets every frame that passes.
    """

    def __new__(
        cls,
        fds: Sequence[int] = ...,
        *,
        framing: Literal["tap", "datagram", "stream"] = "tap",
        vnet_header: bool = False,
        send: Callable[[bytes], object] | None = None,
        queue_pairs: int = 1,
        pcap: int | None = None,
    ) -> Self: ...
    def open(self, features: int, loops: Sequence[IoThread]) -> None:
        """A driver is there and agreed to `features`; `loops` wait for frames, one for each queue pair."""
    def close(self) -> None:
        """The driver is gone: every loop is left, the filter passes everything, one queue pair is in use."""
    def disconnect(self) -> None:
        """Close the duplicates of `fds`; after `close`, for good."""
    def set_features(self, features: int) -> None:
        """The driver changed the offloads it takes."""
    def set_filter(
        self,
        *,
        promiscuous: bool = True,
        all_multicast: bool = False,
        all_unicast: bool = False,
        no_multicast: bool = False,
        no_unicast: bool = False,
        no_broadcast: bool = False,
        macs: Sequence[Buffer] = ...,
        vlans: Buffer | None = None,
    ) -> None:
        """Which frames the driver receives. `macs` holds its own address, too; `vlans` has a bit for each id."""
    def set_link(self, up: bool) -> None:
        """While the link is down every frame is dropped."""
    def set_queue_pairs(self, count: int) -> None:
        """Receive for the first `count` queue pairs only."""
    def inject(self, frames: Iterable[Buffer]) -> int:
        """Queue frames for the driver; return how many. The others are dropped, as all are while none is there."""
    @property
    def counters(self) -> dict[str, int]:
        """tx_frames, tx_bytes, rx_frames, rx_bytes; tx_dropped_ and rx_dropped_ with each reason; pcap_missed."""

@final
class NbdLoad:
    """The client of an NBD server under load, for measuring: a socket (duplicated) on which requests may follow."""

    def __new__(cls, fd: int, *, block_size: int, blocks: int) -> Self: ...
    def run(
        self,
        *,
        write_percent: int = 0,
        random: bool = True,
        iodepth: int = 1,
        seconds: float = 3600.0,
        requests: int = ...,
        seed: int = 1,
    ) -> dict[str, Any]:
        """As `BlkLoad.run`."""

@type_check_only
class Bus(Protocol):
    """Where the accesses of a vCPU go that KVM does not handle."""

    def pio_read(self, port: int, size: int) -> int: ...
    def pio_write(self, port: int, size: int, value: int) -> None: ...
    def mmio_read(self, address: int, size: int) -> int: ...
    def mmio_write(self, address: int, size: int, value: int) -> None: ...

@final
class Serial:
    """A 16550 serial port whose output goes to a file descriptor (duplicated).

    A reader that takes nothing for 100 ms loses bytes until it reads again: the vCPU never waits longer.
    """

    def __new__(cls, line: IrqLine, out_fd: int) -> Self: ...
    def receive(self, data: Buffer) -> int:
        """Queue what somebody typed; return how many bytes the FIFO took."""
    def save(self) -> bytes:
        """The registers and the FIFO, for `restore` in another process."""
    def restore(self, state: bytes) -> None:
        """Go on from `save`; a pending interrupt is sent. `RuntimeError` for what is no such state."""

@final
class Vm:
    """A virtual machine of `/dev/kvm`. Errors are `OSError`, whose `filename` is the call that failed."""

    def __new__(cls, device: str = "/dev/kvm") -> Self: ...
    def set_memory(self, memory: GuestMemory) -> None: ...
    def add_rom(self, address: int, data: bytes) -> None:
        """A read-only slot; the guest's writes to it become MMIO exits."""
    def create_irqchip(self) -> None:
        """The interrupt controllers and the PIT, in the kernel; before any vCPU.

        GSI n reaches pin n of the IOAPIC, but the PIT (GSI 0) reaches pin 2: ACPI's override 0 -> 2.
        """
    def reset(self) -> None:
        """The interrupt controllers and the PIT go back to what they were at first. No vCPU may run."""
    def irq_line(self, gsi: int) -> IrqLine: ...
    def assign_ioeventfd(
        self, fd: int, space: Literal["pio", "mmio"], address: int, length: int, datamatch: int | None
    ) -> None: ...
    def deassign_ioeventfd(
        self, fd: int, space: Literal["pio", "mmio"], address: int, length: int, datamatch: int | None
    ) -> None: ...
    def assign_irqfd(self, fd: int, gsi: int) -> None: ...
    def deassign_irqfd(self, fd: int, gsi: int) -> None: ...
    def set_msi_routes(self, routes: Sequence[tuple[int, int, int]]) -> None:
        """All MSI routes, `(gsi, address, data)`; the irqchip's pins keep theirs."""
    def attach_serial(self, serial: Serial, port: int) -> None:
        """Answer 8 ports from `port` on in the core."""
    def save(self) -> dict[str, bytes]:
        """The interrupt controllers, the PIT and kvmclock, for `restore` in another process. No vCPU may run."""
    def restore(self, state: dict[str, bytes]) -> None:
        """Go on from `save`, after the vCPUs: what is pending here goes to them. `RuntimeError` for no such state."""
    def create_vcpu(self, index: int) -> Vcpu: ...

@final
class Vcpu:
    """One virtual CPU. While one thread runs it, all but `stop` and `exits` raise `RuntimeError`."""

    def set_cpuid(self, cpus: int) -> None:
        """What the host supports, with the APIC id, the topology of `cpus` CPUs and the hypervisor bits."""
    def reset(self) -> None:
        """Go back to the state after `set_cpuid`. Not while it runs."""
    def set_linux_entry(self, entry: int, boot_params: int) -> None:
        """64-bit boot protocol: long mode, rsi = boot_params, LINT0 and LINT1 of the APIC as firmware leaves them.

        Writes a GDT (0x8000) and identity page tables of the first 4 GiB (0x9000 to 0xf000) to guest memory.
        """
    def set_linux_secondary(self) -> None:
        """For the CPUs that Linux starts itself: the memory types that firmware would have set up."""
    def set_registers(self, mode: Literal["real", "protected", "long"], **registers: int) -> None:
        """For freestanding guests: flat segments of that mode, then the named registers; the others are 0.

        "protected" writes the GDT of `set_linux_entry` to guest memory (code 0x10, data 0x18), "long" also the page
        tables.
        """
    def get_registers(self) -> dict[str, int]: ...
    def save(self) -> dict[str, bytes]:
        """All of its state, for `restore` in another process."""
    def restore(self, state: dict[str, bytes]) -> list[int]:
        """Go on from `save`, after `set_cpuid`; return the MSRs that could not be given their value.

        `RuntimeError` for what is no such state, and on a host whose CPU has other features.
        """
    def kvmclock_ctrl(self) -> None:
        """Tell the guest that it stood still, so that it does not take a pause for a lockup. Not while it runs."""
    def run(self, bus: Bus) -> str:
        """Run until `stop` ("stopped"), a triple fault ("shutdown"), a reset asked of KVM ("reset"), or HLT without
        an irqchip ("hlt"); after "stopped" a further call goes on. What KVM cannot run is a `RuntimeError`.

        An exception in `bus` is logged and reads as all ones.
        """
    def stop(self) -> None:
        """Make `run` return soon, or the next one at once if none is active; from any thread."""
    @property
    def exits(self) -> dict[str, int]:
        """Userspace exits by kind: pio_read, pio_write, mmio_read, mmio_write, serial, other."""

def supported(device: str = "/dev/kvm") -> str | None:
    """None if this KVM offers what pyvirtio needs, else what is missing."""

def tsc() -> int:
    """The time stamp counter of the CPU this runs on."""
