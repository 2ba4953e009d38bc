"""Networks to measure: `pyvirtio serve pyvirtio.bench.networks:NativeEcho --socket-path net.sock`."""

import os
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterable
from typing import Annotated

from pyvirtio.backends.net import NetBackend
from pyvirtio.devices.net import Net
from pyvirtio.properties import Range

QUEUE_SIZE = 1024
ETHERNET = bytes.fromhex("525400000002 525400000001 88b5")
NUMBER = struct.Struct("<HQ")
LEAST = 60
BATCH = 256
FULL = 200e-6
"""Seconds to wait where there was no room for a frame."""
FOREIGN_STREAM = 0x8000
"""What tells frames of a source from those that a driver sent."""
Queues = Annotated[int, "queue pairs"]


class Nobody(NetBackend):
    """Nobody is there; frames go nowhere, without Python."""

    def __init__(self, queue_pairs: int) -> None:
        self._queue_pairs = queue_pairs

    @property
    def queue_pairs(self) -> int:
        return self._queue_pairs


class NativeSink(Net):
    """Swallows frames, without Python."""

    def __init__(self, num_queues: Queues = 1) -> None:
        super().__init__(Nobody(num_queues), rx_queue_size=QUEUE_SIZE, tx_queue_size=QUEUE_SIZE)


class Swallowing(Nobody):
    """Swallows frames, by a method for each."""

    def send(self, frame: bytes) -> None:
        """Nothing is done with the frame."""


class PythonSink(Net):
    """Swallows frames, in Python."""

    def __init__(self, num_queues: Queues = 1) -> None:
        super().__init__(Swallowing(num_queues), rx_queue_size=QUEUE_SIZE, tx_queue_size=QUEUE_SIZE)


class Mirror(NetBackend):
    """What is sent comes back on the same queue pair: sockets that are connected to themselves, served by the core."""

    framing = "datagram"

    def __init__(self, queue_pairs: int) -> None:
        sockets = [socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) for _ in range(queue_pairs)]
        for each in sockets:
            each.bind("")  # an abstract name
            each.connect(each.getsockname())
            each.setblocking(False)
        self.fds = [each.detach() for each in sockets]

    def close(self) -> None:
        fds, self.fds = self.fds, ()
        for fd in fds:
            os.close(fd)


class NativeEcho(Net):
    """Returns frames, without Python."""

    def __init__(self, num_queues: Queues = 1) -> None:
        super().__init__(Mirror(num_queues), rx_queue_size=QUEUE_SIZE, tx_queue_size=QUEUE_SIZE)


class Returning(Nobody):
    """What is sent comes back on the first queue pair, by a method for each frame; what does not fit is lost."""

    def send(self, frame: bytes) -> None:
        self.inject((frame,))


class PythonEcho(Net):
    """Returns frames, in Python."""

    def __init__(self, num_queues: Queues = 1) -> None:
        super().__init__(Returning(num_queues), rx_queue_size=QUEUE_SIZE, tx_queue_size=QUEUE_SIZE)


class Sending(Nobody):
    """Sends numbered frames, as fast as the driver takes them."""

    def __init__(self, frame_size: int, queue_pairs: int = 1) -> None:
        super().__init__(queue_pairs)
        self._payload = bytes(frame_size - len(numbered(0, 0, b"")))
        self._sequence = time.time_ns()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="source")

    def connect(self, inject: Callable[[Iterable[bytes]], int]) -> None:
        super().connect(inject)
        self._thread.start()

    def _run(self) -> None:
        while not self._end.is_set():
            numbers = range(self._sequence, self._sequence + BATCH)
            taken = self.inject([numbered(FOREIGN_STREAM, number, self._payload) for number in numbers])
            self._sequence += taken
            if taken < BATCH:
                self._end.wait(FULL)

    def close(self) -> None:
        self._end.set()
        if self._thread.is_alive():
            self._thread.join()


class PythonSource(Net):
    """Sends frames on the first queue pair; they are made in Python, and moved without it."""

    def __init__(
        self, frame_size: Annotated[int, "bytes of a frame", Range(LEAST, 65535)] = 64, num_queues: Queues = 1
    ) -> None:
        super().__init__(Sending(frame_size, num_queues), rx_queue_size=QUEUE_SIZE, tx_queue_size=QUEUE_SIZE)


def numbered(stream: int, sequence: int, payload: bytes) -> bytes:
    """A frame as `pyvirtio bench net --verify` knows it: stream, number and checksum, then what the checksum covers
    as well.
    """
    number = NUMBER.pack(stream, sequence)
    checksum = zlib.adler32(payload, zlib.adler32(number))
    return b"".join((ETHERNET, number, checksum.to_bytes(4, "little"), payload))
