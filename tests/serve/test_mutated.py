"""Messages that are damaged in transit, and front-ends without end: nothing grows, and nothing stays open."""

import logging
import os
import random
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import Serve, count_up

from pyvirtio.dataplane import IoThread
from pyvirtio.devices.rng import Rng
from pyvirtio.serve import vhost_user, wire
from pyvirtio.serve.vhost_user import Session
from pyvirtio.serve.wire import Flag, Message, Request
from pyvirtio.testing.plugin import nothing_left_behind
from pyvirtio.testing.vhost_user import MIB, USER, FrontEnd

MESSAGES = 100_000
AT_ONCE = 24
GROWTH = 8 * MIB
"""Bytes by which memory may differ from one moment to another; a message that leaks a page makes 400 MiB."""
U64 = wire.U64.pack
STATE = wire.VRING_STATE.pack
REGION = wire.REGION.pack(0, MIB, USER, 0)
INFLIGHT = wire.INFLIGHT.pack(0, 0, 1, 64)
SCRIPT: list[tuple[int, bytes, str]] = [
    (Request.SET_PROTOCOL_FEATURES, U64(vhost_user.OFFERED), ""),
    (Request.SET_FEATURES, U64(1 << 32 | wire.PROTOCOL_FEATURES | wire.LOG_ALL), ""),
    (Request.SET_MEM_TABLE, wire.TABLE_HEAD.pack(1) + REGION, "file"),
    (Request.SET_LOG_BASE, wire.LOG.pack(4096, 0), "file"),
    (Request.SET_INFLIGHT_FD, wire.INFLIGHT.pack(MIB, 0, 1, 64), "file"),
    (Request.SET_VRING_NUM, STATE(0, 64), ""),
    (Request.SET_VRING_BASE, STATE(0, 0), ""),
    (Request.SET_VRING_ADDR, wire.VRING_ADDR.pack(0, 1, USER, USER + 0x2000, USER + 0x1000, 0), ""),
    (Request.SET_VRING_CALL, U64(0), "event"),
    (Request.SET_VRING_ERR, U64(0), "event"),
    (Request.SET_VRING_KICK, U64(0), "event"),
    (Request.SET_VRING_ENABLE, STATE(0, 1), ""),
]
"""What starts a ring; told in this order, with others in between."""
OTHERS: list[tuple[int, bytes, str]] = [
    (Request.ADD_MEM_REG, bytes(8) + REGION, "file"),
    (Request.REM_MEM_REG, bytes(8) + REGION, ""),
    (Request.GET_CONFIG, wire.CONFIG.pack(0, 8, 0) + bytes(8), ""),
    (Request.SET_CONFIG, wire.CONFIG.pack(0, 8, 0) + bytes(8), ""),
    (Request.SET_LOG_FD, b"", "event"),
    (Request.SET_BACKEND_REQ_FD, b"", "socket"),
    (Request.GET_INFLIGHT_FD, INFLIGHT, ""),
    (Request.SET_STATUS, U64(15), ""),
    *((request, STATE(0, 1), "") for request in (1, 3, 4, 11, 15, 17, 18, 34, 36, 40)),
]


class Sender:
    """One front-end after another, each of which says something of the above; one message in eight is damaged."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.fds = {
            "file": os.memfd_create("fuzz"),
            "event": os.eventfd(0, os.EFD_NONBLOCK),
            "socket": socket.socket(socket.AF_UNIX).detach(),
        }
        os.ftruncate(self.fds["file"], MIB)

    def send(self, connection: socket.socket) -> None:
        """All that one front-end says. Whoever listens may have hung up in the middle of it."""
        script = iter(SCRIPT[self.random.choice([0, 0, 1, 5]) :])
        for _ in range(AT_ONCE):
            other = self.random.choice(OTHERS)
            request, payload, fd = next(script, other) if self.random.random() < 0.8 else other
            data = wire.pack(request, payload, self.random.choice([0, Flag.NEED_REPLY]))
            fds = [self.fds[fd]] if fd else []
            if self.random.random() < 0.12:
                data, fds = self.damage(data, fds)
            socket.send_fds(connection, [data], fds)
        connection.shutdown(socket.SHUT_WR)

    def damage(self, data: bytes, fds: list[int]) -> tuple[bytes, list[int]]:
        damaged = bytearray(data)
        for _ in range(self.random.randint(0, 2)):
            value = self.random.choice([0, 1, 0x7F, 0x80, 0xFF, self.random.randrange(256)])
            damaged[self.random.randrange(len(data))] = value
        if self.random.random() < 0.05:
            damaged = damaged[: self.random.randint(1, len(data))]
        return bytes(damaged), self.random.choice([fds, fds, [], [self.fds["event"]], list(self.fds.values()), fds * 3])

    def close(self) -> None:
        for fd in self.fds.values():
            os.close(fd)


@pytest.fixture
def received(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How often each request has been received whole."""
    counts = [0] * 256
    receive = wire.receive

    def counting(connection: socket.socket) -> Message | None:
        message = receive(connection)
        if message:
            counts[message.request & 0xFF] += 1
        return message

    monkeypatch.setattr(wire, "receive", counting)
    logging.getLogger("pyvirtio").setLevel(logging.CRITICAL)
    yield counts
    logging.getLogger("pyvirtio").setLevel(logging.NOTSET)


def resident() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * 4096


def test_a_hundred_thousand_messages_of_which_some_are_damaged(received: list[int]) -> None:
    with nothing_left_behind():
        grown = talk(received)
    assert grown < GROWTH
    assert min(received[request] for request in Request) > MESSAGES // 200


def talk(received: list[int]) -> int:
    """Send until all have been received; return how much memory grew once it was warm."""
    sender, device = Sender(4), Rng(source=count_up)
    iothread = IoThread("fuzz", poll_max_ns=0)
    memory = 0
    while sum(received) < MESSAGES:
        if not memory and sum(received) > MESSAGES / 4:
            memory = resident()
        ours, theirs = socket.socketpair()
        sender.send(theirs)
        session = Session(device, ours, [iothread])
        session.run()
        session.close()
        theirs.close()
    sender.close()
    iothread.close()
    return resident() - memory


def test_a_thousand_front_ends_one_after_another(serve: Serve) -> None:
    path = serve(Rng(source=count_up))
    memory = 0
    for n in range(1000):
        answered(path)
        if n == 250:
            memory = resident()
    assert resident() - memory < GROWTH


def answered(path: Path) -> None:
    """A front-end comes, is served, and goes."""
    with FrontEnd(path, memory=MIB) as vm:
        vm.start(size=8)
        buffer = vm.requestq.add(writable=7)
        vm.requestq.kick()
        assert buffer.wait() == count_up(7)
