"""Messages of the vhost-user protocol: numbers, layouts, and how they travel with their file descriptors."""

import os
import socket
import struct
from dataclasses import dataclass, field
from enum import IntEnum, IntFlag

from pyvirtio.errors import ProtocolError


class Request(IntEnum):
    """What a front-end asks; the names are the protocol's without VHOST_USER_."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_LOG_BASE = 6
    SET_LOG_FD = 7
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    SET_BACKEND_REQ_FD = 21
    GET_CONFIG = 24
    SET_CONFIG = 25
    GET_INFLIGHT_FD = 31
    SET_INFLIGHT_FD = 32
    RESET_DEVICE = 34
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38
    SET_STATUS = 39
    GET_STATUS = 40


BACKEND_CONFIG_CHANGE_MSG = 2
"""What a back-end says on its own channel: read the configuration again."""

PROTOCOL_FEATURES = 1 << 30
"""VHOST_USER_F_PROTOCOL_FEATURES, which stands among the virtio features."""
LOG_ALL = 1 << 26
"""VHOST_F_LOG_ALL, likewise: mark what is written to guest memory. It comes and goes while rings run."""
VRING_LOG = 1
"""VHOST_VRING_F_LOG, in the flags of a ring's addresses: mark what is written to its used ring."""


class ProtocolFeature(IntFlag):
    MQ = 1 << 0
    LOG_SHMFD = 1 << 1
    REPLY_ACK = 1 << 3
    BACKEND_REQ = 1 << 5
    CONFIG = 1 << 9
    INFLIGHT_SHMFD = 1 << 12
    RESET_DEVICE = 1 << 13
    CONFIGURE_MEM_SLOTS = 1 << 15
    STATUS = 1 << 16


class Flag(IntFlag):
    """The flags of a header; the lowest two bits are the version."""

    VERSION = 1
    VERSION_MASK = 3
    REPLY = 4
    NEED_REPLY = 8


HEADER = struct.Struct("<III")  # request, flags, bytes of payload
U64 = struct.Struct("<Q")
VRING_STATE = struct.Struct("<II")  # index, number
VRING_ADDR = struct.Struct("<IIQQQQ")  # index, flags, desc, used, avail, log
REGION = struct.Struct("<QQQQ")  # guest address, size, front-end's address, offset in the file
TABLE_HEAD = struct.Struct("<I4x")  # regions that follow
LOG = struct.Struct("<QQ")  # bytes, offset in the file
INFLIGHT = struct.Struct("<QQHH")  # bytes, offset in the file, queues, entries of each
INFLIGHT_REPLY = struct.Struct("<QQHH4x")
CONFIG = struct.Struct("<III")  # offset, size, flags; the bytes follow

INDEX_MASK, NO_FD = 0xFF, 1 << 8
"""The parts of the u64 that comes with a vring's file descriptor."""
MAX_CONFIG = 256
MAX_PAYLOAD = 4096
MAX_FDS = 8
"""As many as SET_MEM_TABLE may bring."""


@dataclass
class Message:
    """One request. Whoever wants an fd of it takes it with `take_fd`; `close` closes the others."""

    request: int
    flags: int
    payload: bytes
    fds: list[int] = field(default_factory=list)

    def take_fd(self) -> int:
        return self.fds.pop(0)

    def close(self) -> None:
        close_all(self.fds)

    def unpack(self, layout: struct.Struct, offset: int = 0) -> tuple[int, ...]:
        """The fields at `offset`; `ProtocolError` if the payload is too short, while a longer one is accepted."""
        if len(self.payload) < offset + layout.size:
            raise ProtocolError(f"{self}: {len(self.payload)} bytes of payload, {offset + layout.size} are needed")
        return layout.unpack_from(self.payload, offset)

    def __str__(self) -> str:
        return Request(self.request).name if self.request in set(Request) else f"request {self.request}"


@dataclass
class Reply:
    """What goes back. The fds are closed once they are sent."""

    payload: bytes
    fds: list[int] = field(default_factory=list)


def u64(value: int) -> Reply:
    return Reply(U64.pack(value))


def close_all(fds: list[int]) -> None:
    while fds:
        os.close(fds.pop())


def pack(request: int, payload: bytes = b"", flags: int = 0) -> bytes:
    return HEADER.pack(request, Flag.VERSION | flags, len(payload)) + payload


def send(connection: socket.socket, request: int, reply: Reply) -> None:
    data = pack(request, reply.payload, Flag.REPLY)
    try:
        sent = socket.send_fds(connection, [data], reply.fds) if reply.fds else 0
        connection.sendall(data[sent:])
    finally:
        close_all(reply.fds)


def receive(connection: socket.socket) -> Message | None:
    """The next request; None when the front-end has hung up, `ProtocolError` for what can be none.

    Whatever fds came are in the message, or closed.
    """
    fds: list[int] = []
    try:
        head = _receive(connection, HEADER.size, fds, "a header")
        if not head:
            return None
        request, flags, size = HEADER.unpack(head)
        message = Message(request, flags, b"", fds)
        if flags & Flag.VERSION_MASK != Flag.VERSION:
            raise ProtocolError(f"{message}: version {flags & Flag.VERSION_MASK}, only {Flag.VERSION:d} is known")
        if flags & Flag.REPLY:
            raise ProtocolError(f"{message}: a reply to no question")
        if size > MAX_PAYLOAD:
            raise ProtocolError(f"{message}: {size} bytes of payload, at most {MAX_PAYLOAD} are allowed")
        message.payload = _receive(connection, size, fds, str(message))
        if len(message.payload) < size:
            raise ProtocolError(f"{message}: the connection ended in the middle of it")
    except BaseException:
        close_all(fds)
        raise
    return message


def _receive(connection: socket.socket, size: int, fds: list[int], what: str) -> bytes:
    """`size` bytes; none at all if the connection ends before the first."""
    data = b""
    while len(data) < size:
        piece, new, flags, _ = socket.recv_fds(connection, size - len(data), MAX_FDS, socket.MSG_CMSG_CLOEXEC)
        fds += new
        if flags & socket.MSG_CTRUNC or len(fds) > MAX_FDS:
            raise ProtocolError(f"{what}: more than {MAX_FDS} file descriptors")
        if not piece:
            if data:
                raise ProtocolError(f"{what}: the connection ended in the middle of it")
            break
        data += piece
    return data
