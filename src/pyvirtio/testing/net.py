"""What a network driver does with its queues (virtio 1.3, 5.1.6)."""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from pyvirtio.spec import Feature, NetFeature
from pyvirtio.testing.queue import Buffer, Driver, Queue

NEEDS_CSUM, DATA_VALID = 1, 2
TCPV4, UDP, TCPV6, UDP_L4, ECN = 1, 3, 4, 5, 0x80
OK, ERR = 0, 1
HEADER = "<BBHHHHH"


class Header(NamedTuple):
    """`struct virtio_net_hdr`; without `num_buffers` for an old driver."""

    flags: int = 0
    gso_type: int = 0
    hdr_len: int = 0
    gso_size: int = 0
    csum_start: int = 0
    csum_offset: int = 0
    num_buffers: int = 0

    def pack(self, length: int = 12) -> bytes:
        return struct.pack(HEADER, *self)[:length]

    @classmethod
    def unpack(cls, data: bytes, length: int = 12) -> Header:
        return cls(*struct.unpack(HEADER, data[:length].ljust(12, b"\0")))


class Received(NamedTuple):
    """A frame from the device, and how many buffers it came in."""

    header: Header
    frame: bytes
    buffers: int


class Nic:
    """A network card as its driver sees it."""

    def __init__(self, driver: Driver, features: int) -> None:
        """`features` are those that were agreed."""
        self.driver = driver
        self.merges = bool(features & NetFeature.MRG_RXBUF)
        self.header_bytes = 12 if self.merges or features & Feature.VERSION_1 else 10
        queues = {queue.index: queue for queue in driver.queues}
        last = len(queues) - 1 if features & NetFeature.MQ else 2
        self.control: Queue | None = queues.get(last) if features & NetFeature.CTRL_VQ else None
        self.rx = [queues[index] for index in range(0, last, 2)]
        self.tx = [queues[index] for index in range(1, last, 2)]
        self._posted: dict[int, deque[Buffer]] = {queue.index: deque() for queue in self.rx}

    def send(
        self,
        frame: bytes | Sequence[bytes],
        header: Header | bytes | None = None,
        *,
        queue: int = 0,
        kick: bool = True,
    ) -> Buffer:
        """Send a frame, each part of it in a descriptor of its own, behind a header in one of its own."""
        parts = [frame] if isinstance(frame, (bytes, bytearray)) else list(frame)
        raw = header if isinstance(header, bytes) else (header or Header()).pack(self.header_bytes)
        buffer: Buffer = self.tx[queue].add([raw, *parts])
        if kick:
            self.tx[queue].kick()
        return buffer

    def post(self, size: int | Sequence[int] = 2048, count: int = 1, *, queue: int = 0, kick: bool = True) -> None:
        """Give the device `count` receive buffers of `size` bytes, header included."""
        rx = self.rx[queue]
        self._posted[rx.index].extend(rx.add(writable=size) for _ in range(count))
        if kick:
            rx.kick()

    def receive(self, *, queue: int = 0) -> Received:
        """Wait for the next frame."""
        rx, posted = self.rx[queue], self._posted[self.rx[queue].index]
        first = posted.popleft()
        data = first.wait()
        header = Header.unpack(data, self.header_bytes)
        more = [posted.popleft() for _ in range(header.num_buffers - 1)] if self.merges else []
        rx.wait_until(lambda: all(buffer.done for buffer in more), "the rest of a frame")
        frame = data[self.header_bytes :] + b"".join(buffer.data for buffer in more)
        return Received(header, frame, 1 + len(more))

    @property
    def received(self) -> int:
        """Buffers of the first receive queue that the device has used and nobody has taken."""
        self.driver.take_interrupts()
        return sum(buffer.done for buffer in self._posted[self.rx[0].index])

    def command(self, class_: int, command: int, data: bytes = b"") -> int:
        """Execute a command through the control queue; return the acknowledgement."""
        assert self.control is not None
        buffer = self.control.add([bytes([class_, command]), data], 1)
        self.control.kick()
        return buffer.wait()[0]


def frame(number: int, length: int = 60, to: bytes = b"\xff" * 6) -> bytes:
    """A frame that says its number, and whose bytes follow from it."""
    body = struct.pack("<Q", number) * (length // 8 + 1)
    return (to + b"\x52\x54\0\0\0\1" + b"\x88\xb5" + body)[:length]
