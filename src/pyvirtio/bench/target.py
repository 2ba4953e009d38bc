"""A driver on a vhost-user-blk socket: the protocol is spoken here, the rings are driven by the core."""

import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Self

from pyvirtio._core import BlkLoad
from pyvirtio.bench.load import Load, Sample, measured
from pyvirtio.bench.process import Usage
from pyvirtio.errors import ConfigError, ProtocolError
from pyvirtio.serve.wire import ProtocolFeature, Request
from pyvirtio.spec import SECTOR, BlkFeature, Feature
from pyvirtio.testing.vhost_user import MIB, FrontEnd, Hangup, Refused

DEVICE_FEATURES = (1 << 24) - 1
CONFIG = struct.Struct("<Q12xI")  # the parts of virtio_blk_config that matter: capacity and blk_size


class Target:
    """A disk behind `path`, set up for loads of up to `iodepth` requests in each queue.

    What the user cannot have is a `ConfigError`; what the back-end does wrong a `ProtocolError`. `pid` is the process
    whose CPU time and memory count, unless given the one that listens.
    """

    def __init__(self, path: Path, load: Load, iodepth: int, pid: int | None = None) -> None:
        self.load, self.iodepth = load, iodepth
        room = load.num_queues * iodepth * (load.block_size + BlkLoad.CONTROL_BYTES)
        try:
            self._vm = FrontEnd(path, memory=8 * MIB + 4 * room, name=str(path))
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror or error}") from error
        try:
            with _faults(path):
                self.pid = _peer(self._vm.socket) if pid is None else pid
                self._driver = self._set_up()
                self._fill()
        except BaseException:
            self._vm.close()
            raise

    def measure(self, iodepth: int, seconds: float, seed: int = 1) -> Sample:
        """Load the disk for some seconds, after a moment that does not count."""
        run = partial(self._driver.run, poll=self.load.poll, verify=self.load.verify)
        with _faults(Path(self._vm.name)):
            return measured(run, self.load, iodepth, seconds, seed, self._usage)

    def check(self) -> None:
        """With `verify`: read all of the disk that is in use, and compare it with what was written."""
        if self.load.verify:
            with _faults(Path(self._vm.name)):
                self._sweep(write_percent=0)

    def close(self) -> None:
        self._vm.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _sweep(self, write_percent: int) -> None:
        """Go through all blocks once, verified."""
        each = self._blocks // self.load.num_queues
        figures = self._driver.run(
            write_percent=write_percent, random=False, iodepth=self.iodepth, requests=each, poll=self.load.poll,
            verify=True,
        )  # fmt: skip
        if figures["errors"]:
            raise ProtocolError(f"{figures['errors']} of {each * self.load.num_queues} requests failed")

    def _fill(self) -> None:
        """With `verify`: write each block, so that whatever is read can be checked."""
        if self.load.verify:
            self._sweep(write_percent=100)

    def _usage(self) -> Usage | None:
        try:
            return Usage.of(self.pid) if self.pid else None
        except OSError as error:
            raise ConfigError(f"process {self.pid}: {error.strerror}") from error

    def _set_up(self) -> BlkLoad:
        vm, load = self._vm, self.load
        wanted = DEVICE_FEATURES | Feature.VERSION_1 | Feature.EVENT_IDX
        wanted |= Feature.INDIRECT_DESC if load.indirect else 0
        wanted |= Feature.RING_PACKED if load.packed else 0
        vm.negotiate(int(wanted))
        self._check_features(vm.features)
        self._blocks = self._usable_blocks(vm.read_config(32), vm.features)
        vm.set_mem_table()
        for index in range(load.num_queues):
            vm.set_up_queue(index, f"requestq{index}", self._ring_size())
        buffers = [vm.heap.allocate(self.iodepth * (load.block_size + BlkLoad.CONTROL_BYTES)) for _ in vm.queues]
        rings = [queue.ring for queue in vm.queues]
        return BlkLoad(
            vm.memory,
            [
                (ring.size, ring.desc, ring.avail, ring.used, kick, queue.source.fds()[0], buffer)
                for queue, ring, kick, buffer in zip(vm.queues, rings, vm.kicks, buffers, strict=True)
            ],
            connection=vm.socket.fileno(),
            err=vm.err.fd,
            block_size=load.block_size,
            blocks=self._blocks,
            iodepth=self.iodepth,
            event_idx=bool(vm.features & Feature.EVENT_IDX),
            indirect=load.indirect,
            packed=load.packed,
        )

    def _ring_size(self) -> int:
        """Header, data and status take a descriptor each, unless they are in a table of their own."""
        needed = self.iodepth * (1 if self.load.indirect else 3)
        return max(16, 1 << (needed - 1).bit_length())

    def _check_features(self, features: int) -> None:
        load, name = self.load, self._vm.name
        for wanted, feature, option in (
            (load.indirect, Feature.INDIRECT_DESC, "--indirect"),
            (load.packed, Feature.RING_PACKED, "--packed"),
        ):
            if wanted and not features & feature:
                raise ConfigError(f"{name}: {option} is not offered by this back-end")
        if features & BlkFeature.RO and (load.write_percent or load.verify):
            raise ConfigError(f"{name}: the disk is read-only, and --rw {load.rw} or --verify writes")
        queues = self._vm.get(Request.GET_QUEUE_NUM) if ProtocolFeature.MQ in self._vm.protocol_features else 1
        if load.num_queues > queues:
            raise ConfigError(f"{name}: --num-queues {load.num_queues} is more than the back-end has ({queues})")

    def _usable_blocks(self, config: bytes, features: int) -> int:
        sectors, block_size = CONFIG.unpack_from(config.ljust(CONFIG.size, b"\0"))
        if not sectors:
            raise ProtocolError("there is no disk, or an empty one")
        load = self.load
        if features & BlkFeature.BLK_SIZE and block_size and load.block_size % block_size:
            raise ConfigError(f"{self._vm.name}: --bs {load.block_size} is no multiple of the disk's {block_size}")
        blocks: int = min(sectors * SECTOR, load.size) // load.block_size
        least = load.num_queues * (self.iodepth + 1)
        if blocks < least:
            raise ConfigError(
                f"{self._vm.name}: {blocks} blocks of {load.block_size} bytes are too few for this load ({least})"
            )
        return blocks


@contextmanager
def _faults(path: Path) -> Iterator[None]:
    """What goes wrong on a connection is the back-end's fault, in one line that names it."""
    try:
        yield
    except Hangup as error:
        raise ProtocolError(f"{path}: the back-end hung up") from error
    except TimeoutError as error:
        raise ProtocolError(f"{path}: the back-end does not answer") from error
    except (Refused, ProtocolError) as error:
        raise ProtocolError(f"{path}: {error}") from error


def _peer(connection: socket.socket) -> int:
    """The process at the other end; 0 where it cannot be seen from here."""
    credentials = struct.Struct("iII")
    pid: int = credentials.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, credentials.size))[0]
    return pid
