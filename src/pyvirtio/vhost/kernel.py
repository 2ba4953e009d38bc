"""vhost-net: the kernel serves the queues of a network device (Linux <linux/vhost.h>, drivers/vhost/net.c).

It is given what a `VirtQueue` has - memory, ring, position, kick eventfd - and an eventfd to interrupt with, and gives
the position back. All else that a device does stays here: registers, configuration, control queue.
"""

import ctypes
import errno
import os
import struct
from contextlib import suppress
from dataclasses import dataclass, field
from fcntl import ioctl
from functools import partial
from threading import Lock, Thread

from pyvirtio._core import GuestMemory, VirtQueue, Watch
from pyvirtio.backends.tap import TUNSETVNETHDRSZ, VNET_HEADER
from pyvirtio.dataplane import QueueSetup
from pyvirtio.notifiers import Undo
from pyvirtio.spec import Feature, NetFeature
from pyvirtio.transports.base import DriverState
from pyvirtio.transports.pci_interrupts import Interrupts

SET_OWNER = 0xAF01
GET_FEATURES = 0x8008AF00
SET_FEATURES = 0x4008AF00
SET_MEM_TABLE = 0x4008AF03
SET_VRING_NUM = 0x4008AF10
SET_VRING_ADDR = 0x4028AF11
SET_VRING_BASE = 0x4008AF12
GET_VRING_BASE = 0xC008AF12
SET_VRING_KICK = 0x4008AF20
SET_VRING_CALL = 0x4008AF21
SET_VRING_ERR = 0x4008AF22
SET_VRING_BUSYLOOP_TIMEOUT = 0x4008AF23
NET_SET_BACKEND = 0x4008AF30

NO_FD = -1
PAIR = 2
SHORT_HEADER = 10
RING_FEATURES = (
    NetFeature.MRG_RXBUF
    | Feature.NOTIFY_ON_EMPTY
    | Feature.INDIRECT_DESC
    | Feature.EVENT_IDX
    | Feature.VERSION_1
    | Feature.ACCESS_PLATFORM
    | Feature.RING_PACKED
    | Feature.IN_ORDER
)
"""What concerns whoever serves a ring. Bit 27, ANY_LAYOUT, means something else to vhost."""
LONG_HEADER = NetFeature.MRG_RXBUF | Feature.VERSION_1
"""With one of these `struct virtio_net_hdr` has 12 bytes, else 10 (virtio 1.3, 5.1.6)."""


class HostMemory:
    """Guest memory at the addresses of this process, which is how vhost knows it."""

    def __init__(self, memory: GuestMemory) -> None:
        self._views = [memory.view(start, size) for start, size, _, _ in memory.regions]
        sizes = [(start, size) for start, size, _, _ in memory.regions]
        hosts = [ctypes.addressof(ctypes.c_char.from_buffer(view)) for view in self._views]
        self.regions = [(start, size, host) for (start, size), host in zip(sizes, hosts, strict=True)]

    @property
    def table(self) -> bytes:
        """`struct vhost_memory`."""
        regions = (struct.pack("=QQQQ", *region, 0) for region in self.regions)
        return struct.pack("=II", len(self.regions), 0) + b"".join(regions)

    def at(self, address: int, length: int) -> int:
        """The host's address of a range that lies in one region, as vhost wants its rings."""
        for start, size, host in self.regions:
            if start <= address and address + length <= start + size:
                return host + address - start
        raise OSError(errno.EFAULT, f"a ring at {address:#x} crosses regions of memory")


@dataclass
class Vring:
    """One ring of one `/dev/vhost-net`: 0 receives, 1 transmits."""

    vhost: int
    index: int
    tap: int
    queue: VirtQueue
    call: int
    """Eventfd that vhost signals where there is no irqfd: the I/O thread reads it and interrupts."""
    error: int
    """Eventfd that vhost signals when it gives the ring up."""
    watches: list[Watch] = field(default_factory=list)
    """Of both, while vhost serves the ring."""

    def start(self, base: int, setup: QueueSetup, memory: HostMemory) -> None:
        """Hand the ring over; its interrupts go to `call` at first."""
        desc = memory.at(setup.desc, 16 * setup.size)
        avail = memory.at(setup.avail, 6 + 2 * setup.size)
        used = memory.at(setup.used, 6 + 8 * setup.size)
        self._set(SET_VRING_NUM, setup.size)
        self._set(SET_VRING_BASE, base)
        ioctl(self.vhost, SET_VRING_ADDR, struct.pack("=IIQQQQ", self.index, 0, desc, used, avail, 0))
        self._set(SET_VRING_ERR, self.error)
        self._set(SET_VRING_CALL, self.call)
        self._set(SET_VRING_KICK, self.queue.kick_fd)
        self._set(NET_SET_BACKEND, self.tap)

    def stop(self) -> int:
        """Have vhost finish; return the index at which to go on, of the avail and of the used ring."""
        self._set(NET_SET_BACKEND, NO_FD)
        for request in (SET_VRING_KICK, SET_VRING_CALL, SET_VRING_ERR):
            self._set(request, NO_FD)
        answer = ioctl(self.vhost, GET_VRING_BASE, struct.pack("=II", self.index, 0))
        return int(struct.unpack("=II", answer)[1])

    def set_header(self, length: int) -> None:
        """Bytes in front of each frame of the tap, on all its queues."""
        ioctl(self.tap, TUNSETVNETHDRSZ, struct.pack("=i", length))

    def interrupt_by(self, irqfd: int | None) -> None:
        self._set(SET_VRING_CALL, self.call if irqfd is None else irqfd)

    def _set(self, request: int, value: int) -> None:
        ioctl(self.vhost, request, struct.pack("=Ii", self.index, value))


class VhostNet:
    """Lends the queue pairs of a network device to the kernel while it is `enabled` and the driver is up.

    Which ones is what `Device.vhost` says; at first it has all of them. `OSError` if vhost does not take them.
    `enabled` may be set from any thread, `close` is for the owner, after the last reset.
    """

    def __init__(self, driver: DriverState, interrupts: Interrupts) -> None:
        self._driver = driver
        self._interrupts = interrupts
        self._notifiers = driver.dataplane.notifiers
        self._memory = HostMemory(driver.memory)
        self._features = int(RING_FEATURES)
        self._lock = Lock()  # of the watches and the calls of the rings
        self._rings: list[Vring] = []
        for vhost, tap in driver.dataplane.device.vhost:
            self._add(vhost, tap)
        interrupts.follow(self._connect)
        self._lent = range(0)
        self._enabled = True
        self._lend()
        driver.dataplane.device.vhost_changed = self._lend
        driver.dataplane.on_broken.then = lambda: Thread(target=self._stop_broken, name="pyvirtio vhost").start()

    def _add(self, vhost: int, tap: int) -> None:
        ioctl(vhost, SET_OWNER)
        self._features &= int(struct.unpack("=Q", ioctl(vhost, GET_FEATURES, bytes(8)))[0])
        for index in (0, 1):
            queue = self._driver.dataplane.queues[len(self._rings)]
            if poll_us := self._driver.dataplane.device.vhost_poll_us:
                ioctl(vhost, SET_VRING_BUSYLOOP_TIMEOUT, struct.pack("=II", index, poll_us))
            call, error = (os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(2))
            self._rings.append(Vring(vhost, index, tap, queue, call, error))

    @property
    def enabled(self) -> bool:
        """Whether the kernel is to serve, from now on and at every DRIVER_OK; `OSError` if it refuses now."""
        return self._enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self._enabled = value
        self._lend()

    def _lend(self) -> None:
        """Lend the pairs that the device says, or none."""
        lent, self._lent = self._lent, range(PAIR * len(self._driver.dataplane.device.vhost) if self._enabled else 0)
        self._notifiers.release(set(lent) - set(self._lent))
        self._notifiers.grab(self._lent, self._serve)

    def _stop_broken(self) -> None:
        """The device needs a reset: the kernel, which does not know, stops too."""
        if self._driver.dataplane.state.broken:
            self._notifiers.release(self._lent)

    def close(self) -> None:
        self.enabled = False
        self._driver.dataplane.on_broken.then = lambda: None  # the core knows no cycles
        with self._lock:
            rings, self._rings = self._rings, []
            for ring in rings:
                os.close(ring.call)
                os.close(ring.error)

    def _serve(self, vq: VirtQueue) -> Undo:
        """Lend one queue, which has no ring meanwhile, so that nobody here serves it."""
        ring = self._rings[vq.index]
        next_avail, next_used = vq.stop()
        try:
            self._start(ring, next_avail, next_used)
        except OSError:
            self._stop(ring)
            self._restart(ring, next_avail, next_used)
            raise
        return partial(self._take_back, ring)

    def _start(self, ring: Vring, next_avail: int, next_used: int) -> None:
        features = int(self._driver.features or 0) & int(RING_FEATURES)
        if next_avail != next_used:
            raise OSError(errno.EBUSY, f"{next_avail - next_used & 0xFFFF} buffers are still in use")
        if missing := features & ~self._features:
            raise OSError(errno.EOPNOTSUPP, f"vhost lacks the features {missing:#x}")
        ring.set_header(VNET_HEADER if features & int(LONG_HEADER) else SHORT_HEADER)
        ioctl(ring.vhost, SET_FEATURES, struct.pack("=Q", features))
        ioctl(ring.vhost, SET_MEM_TABLE, self._memory.table)
        ring.start(next_avail, self._driver.setups[ring.queue.index], self._memory)
        loop = self._driver.dataplane.iothreads[ring.queue.index].loop
        with self._lock:
            ring.watches.append(loop.watch(ring.call, partial(self._called, ring)))
            ring.watches.append(loop.watch(ring.error, partial(self._gave_up, ring)))
        self._connect(ring.queue.index)

    def _stop(self, ring: Vring) -> int:
        base = ring.stop()
        self._called(ring)
        with self._lock:
            watches, ring.watches = ring.watches, []
        for watch in watches:
            watch.close()
        if not any(other.watches for other in self._rings):
            ring.set_header(VNET_HEADER)
        return base

    def _take_back(self, ring: Vring) -> None:
        base = self._stop(ring)
        self._restart(ring, base, base)

    def _restart(self, ring: Vring, *at: int) -> None:
        driver, index = self._driver, ring.queue.index
        features, setup = driver.features or 0, driver.setups[ring.queue.index]
        driver.dataplane.start_queue(index, driver.memory, setup, features, legacy=driver.legacy, at=(at[0], at[1]))

    def _connect(self, index: int) -> None:
        """The interrupt of a queue has changed: an irqfd, if there is one, is signalled by vhost itself."""
        if index < len(self._rings):
            ring = self._rings[index]
            with self._lock:
                if ring.watches:
                    ring.interrupt_by(self._interrupts.irqfd(index))
            self._called(ring)  # perhaps while its vector was masked

    def _called(self, ring: Vring) -> None:
        if self._was_signalled(ring, ring.call):
            ring.queue.interrupt()

    def _gave_up(self, ring: Vring) -> None:
        if self._was_signalled(ring, ring.error):
            self._driver.dataplane.state.fail(f"{ring.queue.name}: vhost gave the ring up")

    def _was_signalled(self, ring: Vring, fd: int) -> bool:
        """Any thread, also after the last watch was closed, when the number may be another file's."""
        with self._lock:
            if ring.watches:
                with suppress(BlockingIOError):
                    return os.eventfd_read(fd) > 0
        return False
