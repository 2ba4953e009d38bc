"""A device whose first two queues the kernel can serve, and a `/dev/vhost-net` that runs in this process."""

import errno
import os
import select
import struct
import threading
from dataclasses import dataclass
from typing import Any

from pyvirtio import Device, VirtQueue, queue
from pyvirtio._core import CallFd, DeviceState
from pyvirtio._core import VirtQueue as CoreQueue
from pyvirtio.spec import Feature, NetFeature
from pyvirtio.testing import Guest
from pyvirtio.vhost import kernel

NAMES = {value: name for name, value in vars(kernel).items() if isinstance(value, int) and value > 0xFFFF}
NAMES[kernel.SET_OWNER] = "SET_OWNER"
FEATURES = int(kernel.RING_FEATURES & ~(Feature.RING_PACKED | Feature.IN_ORDER | Feature.ACCESS_PLATFORM))


class Pairs(Device, id=1):
    """Pairs of queues and a control queue, all of which answer `own`; `vhost` answers on the pairs if it has them."""

    ioeventfd = True

    def __init__(self, pairs: int = 1, size: int = 16) -> None:
        self.rings, self.size = 2 * pairs, size
        self.device_features = int(NetFeature.MQ)
        self.vhost = self.fds = [(os.eventfd(0), os.eventfd(0)) for _ in range(pairs)]
        self.threads: set[int] = set()

    @queue(size="size", count="rings")
    def pairq(self, vq: VirtQueue) -> None:
        self.answer(vq)

    @queue(size="size")
    def ctrlq(self, vq: VirtQueue) -> None:
        self.answer(vq)

    def answer(self, vq: VirtQueue) -> None:
        for chain in vq:
            chain.read()
            chain.write(b"own")
            chain.complete()

    def activate(self, features: int) -> None:
        self.vhost = self.fds if features & NetFeature.MQ else self.fds[:1]
        self.vhost_changed()

    def close(self) -> None:
        for fds in self.fds:
            for fd in fds:
                os.close(fd)


@dataclass
class FakeRing:
    """What was set for one ring, and the thread that serves it once it has a backend."""

    number: int = 0
    base: int = 0
    poll_us: int = 0
    addresses: tuple[int, ...] = ()
    kick: int = -1
    call: int = -1
    error: int = -1
    backend: int = -1
    served: int = 0
    own: CoreQueue | None = None
    stopped: int = -1
    thread: threading.Thread | None = None


class FakeVhost:
    """Plays the kernel's side of `<linux/vhost.h>`: `ioctl` stands in for the system call.

    As the kernel it knows memory by the addresses of this process, wakes by the kick eventfd without reading it, and
    writes to the call eventfd. It answers each buffer with `vhost`.
    """

    guest: Guest

    def __init__(self) -> None:
        self.features = FEATURES
        self.rings: dict[tuple[int, int], FakeRing] = {}
        self.acked: dict[int, int] = {}
        self.tables: dict[int, list[tuple[int, int, int]]] = {}
        self.header = 12
        self.headers: list[int] = []
        self.requests: list[str] = []
        self.fail_at = -1
        """The number of the request that fails, from 0 since `requests` was last cleared."""

    def ioctl(self, fd: int, request: int, data: Any = b"") -> Any:
        name = NAMES[request]
        self.requests.append(name)
        if len(self.requests) == self.fail_at + 1:
            raise OSError(errno.EFAULT, os.strerror(errno.EFAULT))
        return getattr(self, name.lower())(fd, data)

    @property
    def serving(self) -> list[FakeRing]:
        return [ring for ring in self.rings.values() if ring.thread is not None]

    def set_owner(self, fd: int, _: bytes) -> None:
        for index in (0, 1):
            self.rings[fd, index] = FakeRing()

    def get_features(self, fd: int, _: bytes) -> bytes:
        return struct.pack("=Q", self.features)

    def set_features(self, fd: int, data: bytes) -> None:
        (self.acked[fd],) = struct.unpack("=Q", data)
        assert not self.acked[fd] & ~self.features

    def set_mem_table(self, fd: int, data: bytes) -> None:
        count, _ = struct.unpack_from("=II", data)
        regions = [struct.unpack_from("=QQQQ", data, 8 + 32 * region) for region in range(count)]
        self.tables[fd] = [(start, size, host) for start, size, host, _ in regions]

    def set_vring_num(self, fd: int, data: bytes) -> None:
        self._idle(fd, data).number = struct.unpack("=Ii", data)[1]

    def set_vring_base(self, fd: int, data: bytes) -> None:
        self._idle(fd, data).base = struct.unpack("=Ii", data)[1]

    def set_vring_busyloop_timeout(self, fd: int, data: bytes) -> None:
        self._idle(fd, data).poll_us = struct.unpack("=Ii", data)[1]

    def set_vring_addr(self, fd: int, data: bytes) -> None:
        index, flags, desc, used, avail, _ = struct.unpack("=IIQQQQ", data)
        assert flags == 0
        self.rings[fd, index].addresses = tuple(self._guest(fd, host) for host in (desc, avail, used))

    def set_vring_kick(self, fd: int, data: bytes) -> None:
        self._ring(fd, data).kick = struct.unpack("=Ii", data)[1]

    def set_vring_call(self, fd: int, data: bytes) -> None:
        ring = self._ring(fd, data)
        ring.call = struct.unpack("=Ii", data)[1]
        if ring.own is not None:
            ring.own.set_call(CallFd(ring.call))

    def set_vring_err(self, fd: int, data: bytes) -> None:
        self._ring(fd, data).error = struct.unpack("=Ii", data)[1]

    def net_set_backend(self, fd: int, data: bytes) -> None:
        ring = self._ring(fd, data)
        ring.backend = struct.unpack("=Ii", data)[1]
        self._start(fd, ring) if ring.backend >= 0 else self._stop(ring)

    def get_vring_base(self, fd: int, data: bytes) -> bytes:
        return struct.pack("=II", struct.unpack("=II", data)[0], self._idle(fd, data).base)

    def tunsetvnethdrsz(self, fd: int, data: bytes) -> None:
        (self.header,) = struct.unpack("=i", data)
        if self.header not in self.headers[-1:]:
            self.headers.append(self.header)

    def _ring(self, fd: int, data: bytes) -> FakeRing:
        return self.rings[fd, struct.unpack_from("=I", data)[0]]

    def _idle(self, fd: int, data: bytes) -> FakeRing:
        ring = self._ring(fd, data)
        assert ring.thread is None, "the kernel says EBUSY"
        return ring

    def _guest(self, fd: int, host: int) -> int:
        [start] = [at + host - base for at, size, base in self.tables[fd] if base <= host < base + size]
        return start

    def _start(self, fd: int, ring: FakeRing) -> None:
        desc, avail, used = ring.addresses
        features = self.acked[fd]
        ring.own = CoreQueue(DeviceState("vhost", print), "ring", 0, 1024)
        ring.own.set_call(CallFd(ring.call))
        ring.own.start(
            self.guest.memory,
            lambda vq: self._handle(ring, vq),
            size=ring.number,
            desc=desc,
            avail=avail,
            used=used,
            event_idx=bool(features & Feature.EVENT_IDX),
            indirect=bool(features & Feature.INDIRECT_DESC),
            next_avail=ring.base,
            next_used=self.guest.memory.load16(used + 2),
        )
        ring.stopped = os.eventfd(0)
        ring.thread = threading.Thread(target=self._run, args=(ring.own, os.dup(ring.kick), ring.stopped))
        ring.thread.start()

    def _stop(self, ring: FakeRing) -> None:
        if ring.thread is not None and ring.own is not None:
            os.eventfd_write(ring.stopped, 1)
            ring.thread.join()
            os.close(ring.stopped)
            ring.thread = None
            ring.base, used = ring.own.stop()
            assert ring.base == used
            ring.own = None

    def _run(self, own: CoreQueue, kick: int, stopped: int) -> None:
        poll = select.epoll()
        poll.register(kick, select.EPOLLIN | select.EPOLLET)  # the counter is left alone
        poll.register(stopped, select.EPOLLIN)
        while stopped not in [fd for fd, _ in poll.poll()]:
            own.service()
        poll.close()
        os.close(kick)

    def _handle(self, ring: FakeRing, vq: CoreQueue) -> None:
        for chain in vq:
            chain.read()
            chain.write(b"vhost")
            chain.complete()
            ring.served += 1
