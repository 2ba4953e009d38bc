"""What a front-end gets that does not speak vhost-user, or speaks it badly: the server serves the next."""

import logging
import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pytest
from serving import Serve, count_up

from pyvirtio.devices.rng import Rng
from pyvirtio.serve import wire
from pyvirtio.serve.memory import MAX_SLOTS
from pyvirtio.serve.wire import Flag, Request
from pyvirtio.testing.vhost_user import MIB, USER, Connection, FrontEnd

PAGE = 4096


@pytest.fixture
def path(serve: Serve) -> Path:
    return serve(Rng(source=count_up))


def works(path: Path) -> None:
    """A well-behaved front-end is served."""
    with FrontEnd(path, memory=MIB) as vm:
        vm.start()
        buffer = vm.requestq.add(writable=7)
        vm.requestq.kick()
        assert buffer.wait() == count_up(7)


def header(request: int, size: int, flags: int = Flag.VERSION) -> bytes:
    return wire.HEADER.pack(request, flags, size)


U64 = wire.U64.pack
STATE = wire.VRING_STATE.pack
NOBODY: Sequence[int] = ()

CLOSED = {
    "size above the limit": header(Request.SET_OWNER, wire.MAX_PAYLOAD + 1),
    "size of all ones": header(Request.SET_OWNER, 0xFFFFFFFF),
    "wrong version": header(Request.SET_OWNER, 0, 2),
    "reply flag in a request": header(Request.SET_OWNER, 0, Flag.VERSION | Flag.REPLY),
    "short payload of 8": header(Request.SET_FEATURES, 4) + bytes(4),
    "no payload": header(Request.SET_VRING_NUM, 0),
    "unoffered features": wire.pack(Request.SET_FEATURES, U64(1 << 63)),
    "unoffered packed ring": wire.pack(Request.SET_FEATURES, U64(1 << 34)),
    "unoffered protocol features": wire.pack(Request.SET_PROTOCOL_FEATURES, U64(1 << 2)),
    "vring number": wire.pack(Request.SET_VRING_NUM, STATE(1, 64)),
    "vring number of all ones": wire.pack(Request.SET_VRING_ENABLE, STATE(0xFFFFFFFF, 1)),
    "vring number with an address": wire.pack(Request.SET_VRING_ADDR, wire.VRING_ADDR.pack(7, 0, 0, 0, 0, 0)),
    "vring number without an fd": wire.pack(Request.SET_VRING_KICK, U64(1 | wire.NO_FD)),
    "vring number of a base": wire.pack(Request.GET_VRING_BASE, STATE(9, 0)),
    "ring size 0": wire.pack(Request.SET_VRING_NUM, STATE(0, 0)),
    "ring size above the maximum": wire.pack(Request.SET_VRING_NUM, STATE(0, 2048)),
    "ring size not a power of two": wire.pack(Request.SET_VRING_NUM, STATE(0, 63)),
    "base above 16 bits": wire.pack(Request.SET_VRING_BASE, STATE(0, 0x10000)),
    "kick fd missing": wire.pack(Request.SET_VRING_KICK, U64(0)),
    "call fd missing": wire.pack(Request.SET_VRING_CALL, U64(0)),
    "memory without fds": wire.pack(Request.SET_MEM_TABLE, wire.TABLE_HEAD.pack(1) + wire.REGION.pack(0, PAGE, 0, 0)),
    "no memory regions": wire.pack(Request.SET_MEM_TABLE, wire.TABLE_HEAD.pack(0)),
    "memory to remove that is not there": wire.pack(Request.REM_MEM_REG, bytes(8) + wire.REGION.pack(0, PAGE, 0, 0)),
    "short configuration": wire.pack(Request.SET_CONFIG, wire.CONFIG.pack(0, 8, 0)),
    "back-end channel without an fd": wire.pack(Request.SET_BACKEND_REQ_FD),
}


@pytest.mark.parametrize("data", CLOSED.values(), ids=CLOSED.keys())
def test_the_connection_is_closed(path: Path, data: bytes, caplog: pytest.LogCaptureFixture) -> None:
    with FrontEnd(path) as vm:
        vm.negotiate()
        vm.socket.sendall(data)
        vm.wait_hangup()
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert record.message.startswith("served: front-end: ")
    works(path)


REGIONS = {
    "size 0": [(0, 0, USER, 0)],
    "larger than the file": [(0, 5 * PAGE, USER, 0)],
    "beyond the end of the file": [(0, PAGE, USER, 4 * PAGE)],
    "offset that is no multiple of a page": [(0, PAGE, USER, 512)],
    "guest address that wraps": [(-PAGE % (1 << 64), 2 * PAGE, USER, 0)],
    "front-end's address that wraps": [(0, 2 * PAGE, -PAGE % (1 << 64), 0)],
    "offset that wraps": [(0, 2 * PAGE, USER, -PAGE % (1 << 64))],
    "overlap in the guest": [(0, 2 * PAGE, USER, 0), (PAGE, PAGE, USER + 4 * PAGE, 0)],
    "overlap in the front-end": [(0, 2 * PAGE, USER, 0), (8 * PAGE, PAGE, USER + PAGE, 0)],
}


@pytest.mark.parametrize("regions", REGIONS.values(), ids=REGIONS.keys())
@pytest.mark.parametrize("how", ["table", "one by one"])
def test_memory_that_cannot_be(path: Path, regions: list[tuple[int, int, int, int]], how: str) -> None:
    file = os.memfd_create("small")
    os.ftruncate(file, 4 * PAGE)
    packed = [wire.REGION.pack(*region) for region in regions]
    with FrontEnd(path) as vm:
        vm.negotiate()
        if how == "table":
            table = wire.TABLE_HEAD.pack(len(regions)) + b"".join(packed)
            vm.send(Request.SET_MEM_TABLE, table, [file] * len(regions))
        else:
            for region in packed:
                vm.send(Request.ADD_MEM_REG, bytes(8) + region, [file])
        vm.wait_hangup()
    os.close(file)
    works(path)


@pytest.mark.parametrize("kind", ["pipe", "eventfd", "socket", "directory", "read-only"])
def test_memory_that_is_no_file(path: Path, tmp_path: Path, kind: str) -> None:
    small = tmp_path / "small"
    small.write_bytes(bytes(PAGE))
    read, write = os.pipe()
    fd = {
        "pipe": lambda: os.dup(read),
        "eventfd": lambda: os.eventfd(0),
        "socket": lambda: socket.socket().detach(),
        "directory": lambda: os.open(tmp_path, os.O_RDONLY),
        "read-only": lambda: os.open(small, os.O_RDONLY),
    }[kind]()
    with FrontEnd(path) as vm:
        vm.negotiate()
        vm.send(Request.ADD_MEM_REG, bytes(8) + wire.REGION.pack(0, PAGE, USER, 0), [fd])
        vm.wait_hangup()
    for open_fd in (read, write, fd):
        os.close(open_fd)
    works(path)


def test_too_many_memory_slots(path: Path) -> None:
    file = os.memfd_create("small")
    os.ftruncate(file, PAGE)
    with FrontEnd(path) as vm:
        vm.negotiate()
        assert vm.get(Request.GET_MAX_MEM_SLOTS) == MAX_SLOTS
        for slot in range(MAX_SLOTS):
            region = wire.REGION.pack(slot * PAGE, PAGE, USER + slot * PAGE, 0)
            vm.acked(Request.ADD_MEM_REG, bytes(8) + region, [file])
        vm.send(Request.ADD_MEM_REG, bytes(8) + wire.REGION.pack(1 << 40, PAGE, 1 << 40, 0), [file])
        vm.wait_hangup()
    os.close(file)
    works(path)


ASKS_FOR_NO_FD = [Request.SET_OWNER, Request.GET_FEATURES, Request.SET_VRING_ENABLE, Request.SET_MEM_TABLE]


@pytest.mark.parametrize("count", [1, 8, 9, 200])
@pytest.mark.parametrize("request_", ASKS_FOR_NO_FD)
def test_fds_that_nobody_asked_for_are_closed(path: Path, request_: Request, count: int) -> None:
    event = os.eventfd(0)
    with FrontEnd(path) as vm:
        vm.negotiate()
        vm.send(request_, U64(0), [event] * count)
        vm.wait_hangup()
    os.close(event)
    works(path)


def test_a_kick_fd_that_cannot_be_polled(path: Path, tmp_path: Path) -> None:
    file = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    with FrontEnd(path) as vm:
        vm.start()
        vm.send(Request.SET_VRING_KICK, U64(0), [file])
        vm.wait_hangup()
    os.close(file)
    works(path)


def test_longer_than_needed_is_accepted(path: Path) -> None:
    with FrontEnd(path) as vm:
        vm.negotiate()
        ((region, fd),) = vm.regions()
        vm.acked(Request.SET_MEM_TABLE, (wire.TABLE_HEAD.pack(1) + region).ljust(72, b"\0"), [fd])
        vm.acked(Request.SET_VRING_NUM, STATE(0, 64) + bytes(100))


def test_an_unknown_request_is_refused_and_the_session_goes_on(path: Path) -> None:
    with FrontEnd(path) as vm:
        vm.negotiate()
        assert vm.tell(999, bytes(8)) == 1
        vm.send(998)
        assert vm.get(Request.GET_QUEUE_NUM) == 1


@pytest.mark.parametrize("offset", [0, 8, 1 << 31, USER - 1, USER + 4 * MIB, (1 << 64) - 8])
def test_a_ring_outside_all_regions_is_an_error(path: Path, offset: int) -> None:
    with FrontEnd(path) as vm:
        vm.start()
        vm.stop_ring(vm.requestq)
        assert vm.tell(Request.SET_VRING_ADDR, wire.VRING_ADDR.pack(0, 0, offset, offset, offset, 0)) == 1
        assert vm.get(Request.GET_QUEUE_NUM) == 1


@pytest.mark.parametrize("shift", [1, 4 * MIB - 16], ids=["unaligned", "across the end"])
def test_a_ring_that_cannot_be_one_breaks_the_device(path: Path, shift: int) -> None:
    with FrontEnd(path) as vm:
        vm.start()
        at = USER + shift
        assert vm.tell(Request.SET_VRING_ADDR, wire.VRING_ADDR.pack(0, 0, at, at, at, 0)) == 1
        vm.wait_broken()
        vm.stop_ring(vm.requestq)
        vm.start_ring(vm.requestq)


def test_a_used_ring_at_the_end_of_the_address_space_breaks_the_device(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with FrontEnd(path) as vm:
        vm.start()
        guest, size, user = (1 << 64) - 0x1000, 0xFFF, USER + 4 * MIB
        ((_, fd),) = vm.regions()
        vm.acked(Request.ADD_MEM_REG, bytes(8) + wire.REGION.pack(guest, size, user, 0), [fd])
        at = user + size - 1
        assert vm.tell(Request.SET_VRING_ADDR, wire.VRING_ADDR.pack(0, 0, USER, at, USER, 0)) == 1
        vm.wait_broken()
        vm.stop_ring(vm.requestq)
        vm.start_ring(vm.requestq)
    assert "4 bytes at 0xfffffffffffffffe are not guest memory" in caplog.text
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize(("offset", "size"), [(0, 257), (256, 1), (0xFFFFFFFF, 2), (8, 0xFFFFFFFF)])
def test_configuration_out_of_bounds(path: Path, offset: int, size: int) -> None:
    with FrontEnd(path) as vm:
        vm.negotiate()
        assert vm.ask(Request.GET_CONFIG, wire.CONFIG.pack(offset, size, 0)) == b""
        vm.send(Request.SET_CONFIG, wire.CONFIG.pack(offset, size, 0) + bytes(min(size, 256)), flags=Flag.NEED_REPLY)
        assert wire.U64.unpack(vm.reply()) == (1,)


@pytest.mark.parametrize("length", [1, 11, 12, 15])
def test_a_front_end_that_goes_in_the_middle_of_a_message(path: Path, length: int) -> None:
    connection = Connection(path)
    connection.socket.sendall(wire.pack(Request.SET_FEATURES, U64(0))[:length])
    connection.close()
    works(path)


def test_a_message_in_pieces(path: Path) -> None:
    with FrontEnd(path) as vm:
        for byte in wire.pack(Request.GET_QUEUE_NUM):
            vm.socket.sendall(bytes([byte]))
        assert wire.U64.unpack(vm.reply()) == (1,)


def test_a_front_end_that_reads_no_replies_and_goes(path: Path) -> None:
    with FrontEnd(path) as vm:
        vm.socket.settimeout(0.2)
        with suppress(TimeoutError):
            while True:
                vm.send(Request.GET_FEATURES)
    works(path)


def test_a_front_end_that_reads_no_replies_and_says_that_it_asks_no_more(path: Path) -> None:
    """It keeps nobody else out, although its connection is still there."""
    with FrontEnd(path) as vm:
        vm.socket.settimeout(0.2)
        with suppress(TimeoutError):
            while True:
                vm.send(Request.GET_FEATURES)
        vm.socket.shutdown(socket.SHUT_WR)
        works(path)


def test_a_front_end_that_goes_in_the_middle_of_a_request(path: Path) -> None:
    for _ in range(20):
        vm = FrontEnd(path, memory=MIB).start(size=8)
        vm.requestq.add(writable=65536)
        vm.requestq.kick()
        vm.close()
    works(path)
