"""Requests in flight outlive the back-end: what was taken and not answered is answered by the next one."""

import mmap
import os
import random
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from serving import Serve, count_up, programs

from pyvirtio import Chain, Device, VirtQueue, queue
from pyvirtio.devices.rng import Rng
from pyvirtio.serve import wire
from pyvirtio.serve.vhost_user import Rings
from pyvirtio.serve.wire import Request
from pyvirtio.testing.blk import Disk, Kind, Verdict
from pyvirtio.testing.queue import HANG
from pyvirtio.testing.serving import serve_in_process
from pyvirtio.testing.vhost_user import MIB, FrontEnd

PAGE = 4096
U64 = wire.U64.pack


class Keeper(Device, id=63):
    """Answers a request, with what was asked, when the test says so."""

    def __init__(self) -> None:
        self.kept: dict[bytes, Chain] = {}

    @queue(size=64)
    def requestq(self, vq: VirtQueue) -> None:
        for chain in vq:
            self.kept[chain.read(1)] = chain

    def answer(self, question: bytes) -> None:
        wait_for(lambda: question in self.kept)
        chain = self.kept.pop(question)
        chain.write(question)
        chain.complete()

    def reset(self) -> None:
        self.kept.clear()


def wait_for(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + HANG
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def tracked(path: Path) -> FrontEnd:
    vm = FrontEnd(path)
    vm.negotiate()
    vm.set_mem_table()
    vm.get_inflight(1, 64)
    vm.set_up_queue(0, "requestq", 64)
    return vm


@pytest.mark.parametrize("rings", [Rings(), Rings(packed=True)], ids=["split", "packed"])
def test_the_next_session_answers_what_the_last_one_had_taken(tmp_path: Path, rings: Rings) -> None:
    keeper, path = Keeper(), tmp_path / "s"
    with serve_in_process(keeper, path, rings), tracked(path) as vm:
        asked = {letter: vm.requestq.add(letter, 1) for letter in (b"a", b"b", b"c", b"d")}
        vm.requestq.kick()
        keeper.answer(b"c")
        assert asked[b"c"].wait() == b"c"
        asked[b"e"] = vm.requestq.add(b"e", 1)
        vm.requestq.publish()
        vm.reconnect(path)
        wait_for(lambda: len(keeper.kept) == 4)
        assert list(keeper.kept) == [b"a", b"b", b"d", b"e"]
        for letter in (b"d", b"a", b"e", b"b"):
            keeper.answer(letter)
            assert asked[letter].wait() == letter
        assert vm.requestq.strays == []


def test_what_a_stop_waited_for_when_its_front_end_went_is_answered_by_the_next_session(serve: Serve) -> None:
    keeper = Keeper()
    path = serve(keeper)
    with tracked(path) as vm:
        buffer = vm.requestq.add(b"x", 1)
        vm.requestq.kick()
        wait_for(lambda: b"x" in keeper.kept)
        vm.send(Request.GET_VRING_BASE, wire.VRING_STATE.pack(0, 0))
        vm.reconnect(path)
        keeper.answer(b"x")
        assert buffer.wait() == b"x"
        assert vm.requestq.strays == []


def test_a_device_reset_forgets_what_was_in_flight(serve: Serve) -> None:
    keeper = Keeper()
    with tracked(serve(keeper)) as vm:
        vm.requestq.add(b"x", 1)
        vm.requestq.kick()
        wait_for(lambda: b"x" in keeper.kept)
        vm.acked(Request.RESET_DEVICE)
        vm.drop_queues()
        vm.set_up_queue(0, "requestq", 64)
        buffer = vm.requestq.add(b"y", 1)
        vm.requestq.kick()
        keeper.answer(b"y")
        assert buffer.wait() == b"y"
        assert not keeper.kept


@pytest.mark.parametrize("offset", [0, 16], ids=["all of it", "the states"])
def test_garbage_in_the_region_is_a_verdict_and_no_more(serve: Serve, offset: int) -> None:
    path = serve(Rng(source=count_up))
    for seed in range(30):
        with tracked(path) as vm:
            assert vm.inflight is not None
            with mmap.mmap(vm.inflight[1], 0) as notes:
                notes[offset:] = random.Random(seed).randbytes(len(notes) - offset)
            vm.requestq.add(writable=7)
            vm.requestq.publish()
            vm.stop_ring(vm.requestq)
            vm.send(Request.SET_VRING_KICK, U64(0), vm.kicks)
            assert vm.get(Request.GET_QUEUE_NUM) == 1
    with FrontEnd(path) as vm:
        vm.start()
        buffer = vm.requestq.add(writable=7)
        vm.requestq.kick()
        assert buffer.wait() == count_up(7)


def test_a_region_that_is_truncated_harms_nobody(serve: Serve) -> None:
    path = serve(Rng(source=count_up))
    with tracked(path) as vm:
        assert vm.inflight is not None
        os.ftruncate(vm.inflight[1], 0)
        buffer = vm.requestq.add(writable=7)
        vm.requestq.kick()
        assert buffer.wait() == count_up(7)


IMPOSSIBLE = {
    "no queues": wire.INFLIGHT.pack(PAGE, 0, 0, 64),
    "more queues than there are": wire.INFLIGHT.pack(PAGE, 0, 2, 64),
    "no entries": wire.INFLIGHT.pack(PAGE, 0, 1, 0),
    "too many entries": wire.INFLIGHT.pack(PAGE, 0, 1, 0xFFFF),
    "too small": wire.INFLIGHT.pack(64, 0, 1, 64),
    "larger than its file": wire.INFLIGHT.pack(2 * PAGE, 0, 1, 64),
    "beyond its file": wire.INFLIGHT.pack(PAGE, PAGE, 1, 64),
    "unaligned": wire.INFLIGHT.pack(PAGE, 8, 1, 32),
    "wrapping": wire.INFLIGHT.pack(PAGE, (1 << 64) - PAGE, 1, 64),
    "short": wire.INFLIGHT.pack(PAGE, 0, 1, 64)[:-1],
}


@pytest.mark.parametrize("payload", IMPOSSIBLE.values(), ids=IMPOSSIBLE.keys())
def test_a_region_that_cannot_be_ends_the_session(serve: Serve, payload: bytes) -> None:
    path = serve(Rng(source=count_up))
    file = os.memfd_create("notes")
    os.ftruncate(file, PAGE)
    with FrontEnd(path) as vm:
        vm.negotiate()
        vm.send(Request.SET_INFLIGHT_FD, payload, [file])
        vm.wait_hangup()
    os.close(file)


@pytest.mark.parametrize(("queues", "entries"), [(0, 64), (2, 64), (1, 0), (1, 0x8001)])
def test_a_region_that_nobody_can_want_is_not_made(serve: Serve, queues: int, entries: int) -> None:
    with FrontEnd(serve(Rng(source=count_up))) as vm:
        vm.negotiate()
        vm.send(Request.GET_INFLIGHT_FD, wire.INFLIGHT.pack(0, 0, queues, entries))
        vm.wait_hangup()


@pytest.mark.parametrize("options", ["", ",packed=on", ",packed=on,in-order=on"], ids=["split", "packed", "in-order"])
def test_no_write_that_was_acknowledged_is_lost_when_the_server_is_killed(tmp_path: Path, options: str) -> None:
    """Killed again and again amid writes: all of them end well, also those that nobody was left to answer."""
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(4 * MIB))
    expected = bytearray(4 * MIB)
    random_ = random.Random(6)
    serve = (f"blk{options}", "--blk-file", "disk.img", "--socket-path", "s")
    with programs(tmp_path) as start:
        server = start(*serve)
        with FrontEnd(tmp_path / "s", memory=8 * MIB) as vm:
            vm.negotiate()
            vm.set_mem_table()
            vm.get_inflight(1, 256)
            vm.set_up_queue(0, "requestq", 256)
            disk = Disk(vm)
            for round_ in range(4):
                sectors = random_.sample(range(0, 8192, 128), 60)
                requests = []
                for sector in sectors:
                    data = struct.pack("<I", round_ << 16 | sector) * (16384 * 4)
                    expected[sector * 512 : sector * 512 + 65536] = data[:65536]
                    requests.append(disk.submit(Kind.WRITE, sector, data[:65536]))
                requests[random_.randrange(60)].wait()
                server.kill()
                server.wait()
                server = start(*serve)
                vm.reconnect(tmp_path / "s")
                assert [request.wait() for request in requests] == [Verdict.OK] * 60
            assert vm.requestq.strays == []
            assert disk.read(0, 65536) == expected[:65536]
    assert image.read_bytes() == expected
