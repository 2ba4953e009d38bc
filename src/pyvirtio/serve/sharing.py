"""What a front-end shares with us beside the rings' file descriptors: guest memory, the log of what we write there, and
the notes about requests in flight, which outlive us."""

import os

from pyvirtio._core import InflightRegion
from pyvirtio.errors import ProtocolError
from pyvirtio.serve import wire
from pyvirtio.serve.backend import Backend
from pyvirtio.serve.memory import MAX_SLOTS, Region, map_shared
from pyvirtio.serve.requests import handles
from pyvirtio.serve.vring import call_fd
from pyvirtio.serve.wire import Message, Reply, Request
from pyvirtio.spec import MAX_QUEUE_SIZE

PAGE = 4096


class Sharing:
    """The part of a session that maps memory."""

    backend: Backend

    @handles(Request.SET_MEM_TABLE, fds=range(1, wire.MAX_FDS + 1))
    def _set_mem_table(self, message: Message) -> None:
        (count,) = message.unpack(wire.TABLE_HEAD)
        if count != len(message.fds):
            raise ProtocolError(f"{message}: {count} regions with {len(message.fds)} file descriptors")
        at = range(wire.TABLE_HEAD.size, wire.TABLE_HEAD.size + count * wire.REGION.size, wire.REGION.size)
        self.backend.table.replace([_region(message, offset) for offset in at], message.fds)
        self.backend.memory_changed()

    @handles(Request.ADD_MEM_REG, fds=range(1, 2))
    def _add_mem_reg(self, message: Message) -> None:
        self.backend.table.add(_region(message, wire.U64.size), message.fds[0])
        self.backend.memory_changed()

    @handles(Request.REM_MEM_REG, fds=range(2))
    def _rem_mem_reg(self, message: Message) -> None:
        region = _region(message, wire.U64.size)
        self.backend.table.remove(region.guest, region.size, region.user)
        self.backend.memory_changed()

    @handles(Request.GET_MAX_MEM_SLOTS)
    def _get_max_mem_slots(self, message: Message) -> Reply:
        return wire.u64(MAX_SLOTS)

    @handles(Request.SET_LOG_BASE, fds=range(1, 2))
    def _set_log_base(self, message: Message) -> Reply:
        """A front-end waits for the reply, whether it asked for one or not."""
        size, offset = message.unpack(wire.LOG)
        self.backend.set_log(map_shared(f"{message}: log", size, offset, message.fds[0]))
        return wire.u64(0)

    @handles(Request.SET_LOG_FD, fds=range(1, 2))
    def _set_log_fd(self, message: Message) -> None:
        self.backend.set_log_call(call_fd(message.fds[0]))

    @handles(Request.GET_INFLIGHT_FD)
    def _get_inflight_fd(self, message: Message) -> Reply:
        """The front-end keeps the file, whatever becomes of us."""
        _, _, queues, entries = message.unpack(wire.INFLIGHT)
        size = self._inflight_size(message, queues, entries)
        fd = os.memfd_create("inflight", os.MFD_CLOEXEC)
        os.ftruncate(fd, size)
        return Reply(wire.INFLIGHT_REPLY.pack(size, 0, queues, entries), [fd])

    @handles(Request.SET_INFLIGHT_FD, fds=range(1, 2))
    def _set_inflight_fd(self, message: Message) -> None:
        size, offset, queues, entries = message.unpack(wire.INFLIGHT)
        if size < (needed := self._inflight_size(message, queues, entries)):
            raise ProtocolError(f"{message}: {size} bytes for {queues} queues of {entries}, {needed} are needed")
        memory = map_shared(f"{message}: region", size, offset, message.fds[0])
        for index, vring in enumerate(self.backend.vrings[:queues]):
            vring.inflight = InflightRegion(memory, index * InflightRegion.bytes(entries), entries)

    def _inflight_size(self, message: Message, queues: int, entries: int) -> int:
        if not 1 <= queues <= len(self.backend.vrings):
            raise ProtocolError(f"{message}: {queues} queues of {len(self.backend.vrings)}")
        if not 1 <= entries <= MAX_QUEUE_SIZE:
            raise ProtocolError(f"{message}: {entries} entries; up to {MAX_QUEUE_SIZE}")
        return -(-queues * InflightRegion.bytes(entries) // PAGE) * PAGE


def _region(message: Message, offset: int) -> Region:
    guest, size, user, at = message.unpack(wire.REGION, offset)
    return Region(guest, size, user, at)
