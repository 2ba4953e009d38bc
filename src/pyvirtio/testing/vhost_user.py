"""The front-end of vhost-user in a test: what a VMM and the driver in its guest do, over the real socket."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from pyvirtio._core import GuestMemory
from pyvirtio.serve import wire
from pyvirtio.serve.wire import Flag, ProtocolFeature, Request
from pyvirtio.testing.heap import Heap
from pyvirtio.testing.queue import HANG, DeviceNeedsReset, Interrupts, Queue, make_ring, queue_named, sleep_on

MIB = 1 << 20
USER = 0x7F00_0000_0000
"""Where the front-end says that it has mapped guest address 0."""


class Hangup(Exception):
    """The back-end closed the connection."""


class Refused(AssertionError):
    """The back-end acknowledged a request with an error."""


class Eventfd:
    """The call or err fd of a vring."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_NONBLOCK)
        self.count = self.config_count = 0

    def fds(self) -> list[int]:
        return [self.fd]

    def take(self) -> bool:
        taken = os.eventfd_read(self.fd) if sleep_on([self.fd], 0) else 0
        self.count += taken
        return taken > 0


class Connection:
    """One message after another, well-formed or not."""

    def __init__(self, where: Path | socket.socket) -> None:
        self.connect(where)

    def connect(self, where: Path | socket.socket) -> None:
        self.socket = socket.socket(socket.AF_UNIX) if isinstance(where, Path) else where
        self.socket.settimeout(HANG)
        if isinstance(where, Path):
            self.socket.connect(str(where))

    def send(self, request: int, payload: bytes = b"", fds: Sequence[int] = (), flags: int = 0) -> None:
        self.send_bytes(wire.pack(request, payload, flags), fds)

    def send_bytes(self, data: bytes, fds: Sequence[int] = ()) -> None:
        try:
            sent = socket.send_fds(self.socket, [data], fds)
            if sent < len(data):
                self.socket.sendall(data[sent:])
        except ConnectionError as error:
            raise Hangup from error

    def reply(self) -> bytes:
        """The payload of the next reply."""
        head = self._read(wire.HEADER.size)
        return self._read(wire.HEADER.unpack(head)[2])

    def _read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            try:
                piece = self.socket.recv(size - len(data))
            except ConnectionError as error:
                raise Hangup from error
            if not piece:
                raise Hangup
            data += piece
        return data

    def ask(self, request: int, payload: bytes = b"") -> bytes:
        """Send a request that has a reply of its own; return it."""
        self.send(request, payload)
        return self.reply()

    def ask_for_fd(self, request: int, payload: bytes) -> tuple[bytes, int]:
        """Send a request whose reply brings a file descriptor, which is the caller's."""
        self.send(request, payload)
        head, (fd,), _, _ = socket.recv_fds(self.socket, wire.HEADER.size, 1)
        return self._read(wire.HEADER.unpack(head)[2]), fd

    def get(self, request: int) -> int:
        value: int = wire.U64.unpack(self.ask(request))[0]
        return value

    def tell(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> int:
        """Send a request and wait until it has been acted upon; return the acknowledgement, 0 for success."""
        self.send(request, payload, fds, Flag.NEED_REPLY)
        value: int = wire.U64.unpack(self.reply())[0]
        return value

    def close(self) -> None:
        self.socket.close()


class FrontEnd(Connection):
    """A VMM with `memory` of RAM, bytes from guest address 0 on or what is given, and a driver: one attribute for each
    queue of the device.

    `start` does what a VMM does until the queues run; `features` masks what the driver accepts.
    """

    def __init__(
        self,
        where: Path | socket.socket,
        *,
        memory: int | GuestMemory = 4 * MIB,
        heap: Heap | None = None,
        name: str = "front-end",
    ) -> None:
        super().__init__(where)
        self.name = name
        self.memory = GuestMemory.allocate([(0, memory)]) if isinstance(memory, int) else memory
        self.heap = heap or Heap(0x1000, self.memory.regions[0][1])
        self.features = 0
        self.protocol_features = ProtocolFeature(0)
        self.queues: list[Queue] = []
        self.kicks: list[int] = []
        self.err = Eventfd()
        self.inflight: tuple[bytes, int] | None = None
        """What the back-end notes its requests in flight in: its description and its fd."""

    @property
    def config_source(self) -> Interrupts:
        return self.err

    def __getattr__(self, name: str) -> Any:
        return queue_named(self.__dict__.get("queues", []), name)

    def start(
        self, names: Sequence[str] = ("requestq",), *, features: int = ~0, size: int = 64, indirect: bool = False
    ) -> Self:
        self.negotiate(features)
        self.set_mem_table()
        for index, name in enumerate(names):
            self.set_up_queue(index, name, size).indirect = indirect
        return self

    def negotiate(self, features: int = ~0) -> None:
        self.send(Request.SET_OWNER)
        offered = self.get(Request.GET_FEATURES)
        if offered & wire.PROTOCOL_FEATURES:
            known = self.get(Request.GET_PROTOCOL_FEATURES) & sum(ProtocolFeature)
            self.protocol_features = ProtocolFeature(known)
            self.send(Request.SET_PROTOCOL_FEATURES, wire.U64.pack(known))
        self.features = offered & (features | wire.PROTOCOL_FEATURES)
        self.acked(Request.SET_FEATURES, wire.U64.pack(self.features))

    def acked(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> None:
        """Send a request that must succeed; not every back-end says whether it did."""
        if ProtocolFeature.REPLY_ACK not in self.protocol_features:
            self.send(request, payload, fds)
        elif self.tell(request, payload, fds):
            raise Refused(f"{Request(request).name} was refused")

    def regions(self) -> list[tuple[bytes, int]]:
        """Each region of guest memory as the protocol describes it, with its fd."""
        return [
            (wire.REGION.pack(guest, size, USER + guest, offset), fd) for guest, size, fd, offset in self.memory.regions
        ]

    def set_mem_table(self) -> None:
        regions = self.regions()
        table = wire.TABLE_HEAD.pack(len(regions)) + b"".join(region for region, _ in regions)
        self.acked(Request.SET_MEM_TABLE, table, [fd for _, fd in regions])

    def get_inflight(self, queues: int, entries: int) -> None:
        """Let the back-end note its requests in flight from the next ring on."""
        self.drop_inflight()
        self.inflight = self.ask_for_fd(Request.GET_INFLIGHT_FD, wire.INFLIGHT.pack(0, 0, queues, entries))
        self.set_inflight()

    def set_inflight(self) -> None:
        assert self.inflight is not None
        description, fd = self.inflight
        self.acked(Request.SET_INFLIGHT_FD, description, [fd])

    def reconnect(self, where: Path | socket.socket) -> None:
        """Go on with another back-end, as QEMU does: with the memory, the rings and the notes that are there."""
        self.socket.close()
        self.connect(where)
        self.negotiate(self.features)
        self.set_mem_table()
        if self.inflight:
            self.set_inflight()
        for queue in self.queues:
            self.start_ring(queue)

    def set_up_queue(self, index: int, name: str, size: int) -> Queue:
        ring = make_ring(self.memory, self.heap, size, self.features)
        queue = Queue(self, index, name, ring, Eventfd())
        self.queues.append(queue)
        self.kicks.append(os.eventfd(0, os.EFD_NONBLOCK))
        self.start_ring(queue)
        return queue

    def start_ring(self, queue: Queue, base: int | None = None) -> None:
        """All that a vring needs, in QEMU's order; it goes on behind what was used unless `base` says where."""
        index, ring = queue.index, queue.ring
        base = ring.base if base is None else base
        self.acked(Request.SET_VRING_ERR, wire.U64.pack(index), [self.err.fd])
        self.acked(Request.SET_VRING_CALL, wire.U64.pack(index), queue.source.fds())
        self.acked(Request.SET_VRING_ENABLE, wire.VRING_STATE.pack(index, 1))
        self.acked(Request.SET_VRING_NUM, wire.VRING_STATE.pack(index, ring.size))
        self.acked(Request.SET_VRING_BASE, wire.VRING_STATE.pack(index, base))
        self.acked(Request.SET_VRING_ADDR, self.addresses(queue))
        self.acked(Request.SET_VRING_KICK, wire.U64.pack(index), [self.kicks[index]])

    def addresses(self, queue: Queue, log: int | None = None) -> bytes:
        """`log` is the guest address for which the used ring is marked in the log."""
        ring, flags = queue.ring, 0 if log is None else wire.VRING_LOG
        where = (USER + ring.desc, USER + ring.used, USER + ring.avail)
        return wire.VRING_ADDR.pack(queue.index, flags, *where, log or 0)

    def stop_ring(self, queue: Queue) -> int:
        """GET_VRING_BASE: the ring stops; return where it is to go on."""
        index, base = wire.VRING_STATE.unpack(self.ask(Request.GET_VRING_BASE, wire.VRING_STATE.pack(queue.index, 0)))
        assert index == queue.index
        return int(base)

    def read_config(self, size: int = 60, offset: int = 0) -> bytes:
        reply = self.ask(Request.GET_CONFIG, wire.CONFIG.pack(offset, size, 0) + bytes(size))
        return reply[wire.CONFIG.size :]

    def write_config(self, offset: int, data: bytes) -> None:
        self.acked(Request.SET_CONFIG, wire.CONFIG.pack(offset, len(data), 0) + data)

    def notify(self, index: int, size: int) -> None:
        os.eventfd_write(self.kicks[index], 1)

    def owed(self, index: int) -> str:
        return ""  # the protocol does not tell

    def take_interrupts(self, only: Interrupts | None = None) -> bool:
        taken = [queue for queue in self.queues if only in (None, queue.source) and queue.source.take()]
        for queue in taken:
            queue.collect()
        return bool(taken)

    def check(self) -> None:
        if self.err.take():
            raise DeviceNeedsReset(f"{self.name}: the err fd was signalled")

    def wait_broken(self) -> None:
        """Sleep until the err fd is signalled."""
        if not sleep_on([self.err.fd], HANG):
            raise TimeoutError(f"{self.name}: the device did not break")
        self.err.take()

    def wait_hangup(self) -> None:
        """Sleep until the back-end closes the connection."""
        deadline = time.monotonic() + HANG
        try:
            while time.monotonic() < deadline:
                self._read(1)
        except Hangup:
            return
        raise TimeoutError(f"{self.name}: the connection was not closed")

    def drop_queues(self) -> None:
        """Forget the queues; `start` makes new ones."""
        for fd in (*self.kicks, *(fd for queue in self.queues for fd in queue.source.fds())):
            os.close(fd)
        self.kicks, self.queues = [], []

    def drop_inflight(self) -> None:
        if self.inflight:
            os.close(self.inflight[1])
            self.inflight = None

    def close(self) -> None:
        super().close()
        self.drop_queues()
        self.drop_inflight()
        os.close(self.err.fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
