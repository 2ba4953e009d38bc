"""A driver on a vhost-user socket: the protocol is spoken here, the rings are driven by the core."""

import socket
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from pyvirtio._core import DriverQueue, GuestMemory
from pyvirtio.bench.process import Usage
from pyvirtio.errors import ConfigError, ProtocolError
from pyvirtio.serve import wire
from pyvirtio.serve.wire import ProtocolFeature, Request
from pyvirtio.spec import Feature, Status
from pyvirtio.testing.heap import Heap
from pyvirtio.testing.vhost_user import FrontEnd, Hangup, Refused

FIRST_ADDRESS = 0x1000
RUNS = Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK | Status.DRIVER_OK


class Driver:
    """Finds the device behind `path`, and sets it up in memory of its own or in `memory`, of which `heap` is free.

    What the user cannot have is a `ConfigError`; what the back-end does wrong a `ProtocolError`, within `faults`. `pid`
    is the process whose CPU time and memory count, unless given the one that listens.
    """

    def __init__(self, path: Path, memory: GuestMemory, heap: Heap, pid: int | None = None) -> None:
        self.name, self.memory, self.heap = str(path), memory, heap
        try:
            self.vm = FrontEnd(path, memory=memory, heap=heap, name=self.name)
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror or error}") from error
        self.pid = _peer(self.vm.socket) if pid is None else pid

    @contextmanager
    def faults(self) -> Iterator[None]:
        """What goes wrong on a connection is the back-end's fault, in one line that names it."""
        try:
            yield
        except Hangup as error:
            raise ProtocolError(f"{self.name}: the back-end hung up") from error
        except TimeoutError as error:
            raise ProtocolError(f"{self.name}: the back-end does not answer") from error
        except (Refused, ProtocolError) as error:
            raise ProtocolError(f"{self.name}: {error}") from error

    def negotiate(self, wanted: int, num_queues: int, options: Mapping[str, int]) -> None:
        """Agree on what is wanted as far as it is offered, and on the user's options or not at all."""
        vm = self.vm
        vm.negotiate(int(Feature.VERSION_1 | Feature.EVENT_IDX) | wanted | sum(options.values()))
        for option, feature in options.items():
            if not vm.features & feature:
                raise ConfigError(f"{self.name}: {option} is not offered by this back-end")
        offered = vm.get(Request.GET_QUEUE_NUM) if ProtocolFeature.MQ in vm.protocol_features else 1
        if num_queues > offered:
            raise ConfigError(f"{self.name}: --num-queues {num_queues} is more than the back-end has ({offered})")

    def start(self, names: list[str], ring_size: int, buffers: int, *, indirect: bool = False) -> list[DriverQueue]:
        """Let the queues run, each with so many bytes for buffers."""
        vm = self.vm
        vm.set_mem_table()
        for index, name in enumerate(names):
            vm.set_up_queue(index, name, ring_size)
        if ProtocolFeature.STATUS in vm.protocol_features:
            vm.acked(Request.SET_STATUS, wire.U64.pack(RUNS))
        return [
            DriverQueue(
                size=queue.ring.size,
                desc=queue.ring.desc,
                avail=queue.ring.avail,
                used=queue.ring.used,
                kick=vm.kicks[queue.index],
                call=queue.source.fds()[0],
                connection=vm.socket.fileno(),
                err=vm.err.fd,
                buffers=self.heap.allocate(buffers),
                event_idx=bool(vm.features & Feature.EVENT_IDX),
                indirect=indirect,
                packed=bool(vm.features & Feature.RING_PACKED),
            )
            for queue in vm.queues
        ]

    def close(self) -> None:
        self.vm.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def allocate(size: int) -> tuple[GuestMemory, Heap]:
    """Guest memory with room for `size` bytes, however they are cut up, and for rings."""
    rings = 8 << 20
    memory = GuestMemory.allocate([(0, rings + 4 * size)])
    return memory, Heap(FIRST_ADDRESS, rings + 4 * size)


def usage(pids: set[int]) -> Usage | None:
    """What these processes have cost together; None if one of them cannot be seen from here."""
    found = []
    for pid in pids:
        try:
            found.append(Usage.of(pid) if pid else None)
        except OSError as error:
            raise ConfigError(f"process {pid}: {error.strerror}") from error
    known = [each for each in found if each is not None]
    if len(known) < len(found):
        return None
    return Usage(sum(each.cpu for each in known), sum(each.rss for each in known))


def _peer(connection: socket.socket) -> int:
    """The process at the other end; 0 where it cannot be seen from here."""
    credentials = struct.Struct("iII")
    pid: int = credentials.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, credentials.size))[0]
    return pid
