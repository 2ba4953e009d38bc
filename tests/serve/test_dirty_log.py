"""The log of a migration: every page that the device writes is marked, and no other."""

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from serving import Serve, count_up

from pyvirtio.backends.block import Memory
from pyvirtio.devices.blk import Blk
from pyvirtio.devices.rng import Rng
from pyvirtio.serve import wire
from pyvirtio.serve.vhost_user import Rings
from pyvirtio.serve.wire import Request
from pyvirtio.spec import Feature
from pyvirtio.testing.blk import Disk
from pyvirtio.testing.queue import sleep_on
from pyvirtio.testing.serving import serve_in_process
from pyvirtio.testing.vhost_user import MIB, FrontEnd

PAGE = 4096
BYTES = 4 * MIB // PAGE // 8
LOG_ADDRESS = 3 * MIB
"""Where the log is told that the used ring lies."""


class Log:
    """The front-end's side of a log."""

    def __init__(self, vm: FrontEnd) -> None:
        self.vm = vm
        self.fd = os.memfd_create("log")
        os.ftruncate(self.fd, BYTES)
        self.bitmap = mmap.mmap(self.fd, BYTES)

    def start(self, *, used: bool = False) -> None:
        vm = self.vm
        vm.send(Request.SET_LOG_BASE, wire.LOG.pack(BYTES, 0), [self.fd])
        assert vm.reply() == wire.U64.pack(0)
        vm.acked(Request.SET_FEATURES, wire.U64.pack(vm.features | wire.LOG_ALL))
        if used:
            vm.acked(Request.SET_VRING_ADDR, vm.addresses(vm.requestq, LOG_ADDRESS))

    def stop(self) -> None:
        self.vm.acked(Request.SET_FEATURES, wire.U64.pack(self.vm.features & ~wire.LOG_ALL))

    def take(self) -> set[int]:
        """The addresses of the pages that are marked; clears the marks."""
        marks = self.bitmap[:]
        self.bitmap[:] = bytes(BYTES)
        return {page * PAGE for page in range(8 * BYTES) if marks[page // 8] >> page % 8 & 1}


@contextmanager
def logged(vm: FrontEnd) -> Iterator[Log]:
    log = Log(vm)
    yield log
    log.bitmap.close()
    os.close(log.fd)


def pages(address: int, length: int) -> set[int]:
    return set(range(address // PAGE * PAGE, address + length, PAGE))


def test_the_pages_of_a_request_are_marked_while_the_log_is_on(serve: Serve) -> None:
    with FrontEnd(serve(Rng(source=count_up))) as vm, logged(vm.start(features=~int(wire.LOG_ALL))) as log:
        for on in (False, True, False):
            if on:
                log.start()
            buffer = vm.requestq.add(b"question" * 600, [9000, 1])
            vm.requestq.kick()
            buffer.wait()
            written = pages(*buffer.writable[0]) | pages(*buffer.writable[1])
            assert log.take() == (written if on else set())
            if on:
                log.stop()


@pytest.mark.parametrize("event_idx", [False, True], ids=["flags", "event_idx"])
def test_the_used_ring_is_marked_where_the_front_end_says_that_it_lies(serve: Serve, event_idx: bool) -> None:
    features = ~0 if event_idx else ~int(Feature.EVENT_IDX)
    with FrontEnd(serve(Rng(source=count_up))) as vm, logged(vm.start(features=features)) as log:
        log.start(used=True)
        log.take()
        buffer = vm.requestq.add(writable=7)
        vm.requestq.kick()
        buffer.wait()
        vm.stop_ring(vm.requestq)
        assert log.take() == pages(*buffer.writable[0]) | {LOG_ADDRESS}


def test_the_descriptors_of_a_packed_ring_are_marked_where_they_lie(tmp_path: Path) -> None:
    path = tmp_path / "packed.sock"
    with (
        serve_in_process(Rng(source=count_up), path, Rings(packed=True)),
        FrontEnd(path) as vm,
        logged(vm.start(features=~int(wire.LOG_ALL))) as log,
    ):
        log.start(used=True)
        buffer = vm.requestq.add(writable=7)
        vm.requestq.kick()
        buffer.wait()
        vm.stop_ring(vm.requestq)
        ring = {page for range_ in vm.requestq.ring.device_ranges for page in pages(*range_)}
        assert log.take() == pages(*buffer.writable[0]) | ring


def test_a_backend_in_python_that_reads_into_guest_memory_is_marked(serve: Serve) -> None:
    with FrontEnd(serve(Blk(Memory(MIB)))) as vm, logged(vm.start(features=~int(wire.LOG_ALL))) as log:
        log.start()
        request = Disk(vm).submit(0, room=[5000, 5240])
        request.wait()
        assert log.take() == set().union(*(pages(*range_) for range_ in request.buffer.writable))


def test_the_front_end_is_told_of_marks(serve: Serve) -> None:
    event = os.eventfd(0, os.EFD_NONBLOCK)
    with FrontEnd(serve(Rng(source=count_up))) as vm, logged(vm.start()) as log:
        vm.acked(Request.SET_LOG_FD, fds=[event])
        log.start()
        vm.requestq.add(writable=7)
        vm.requestq.kick()
        assert sleep_on([event], 10)
    os.close(event)


def test_a_ring_goes_on_while_its_log_comes_and_goes(serve: Serve) -> None:
    with FrontEnd(serve(Rng(source=count_up))) as vm, logged(vm.start()) as log:
        for _ in range(20):
            buffers = [vm.requestq.add(writable=7) for _ in range(8)]
            vm.requestq.kick()
            log.start(used=True)
            log.stop()
            assert [buffer.wait() for buffer in buffers] == [count_up(7)] * 8


@pytest.mark.parametrize("address", [1 << 40, (1 << 64) - 1])
def test_a_used_ring_outside_the_log_is_not_marked(serve: Serve, address: int) -> None:
    with FrontEnd(serve(Rng(source=count_up))) as vm, logged(vm.start()) as log:
        log.start()
        vm.acked(Request.SET_VRING_ADDR, vm.addresses(vm.requestq, address))
        buffer = vm.requestq.add(writable=7)
        vm.requestq.kick()
        buffer.wait()
        assert log.take() == pages(*buffer.writable[0])


def test_a_log_that_is_truncated_harms_nobody(serve: Serve) -> None:
    with FrontEnd(serve(Rng(source=count_up))) as vm, logged(vm.start()) as log:
        log.start()
        os.ftruncate(log.fd, 0)
        buffer = vm.requestq.add(writable=7)
        vm.requestq.kick()
        assert buffer.wait() == count_up(7)


IMPOSSIBLE = {
    "shorter than the memory": wire.LOG.pack(BYTES - 1, 0),
    "larger than its file": wire.LOG.pack(2 * PAGE, 0),
    "empty": wire.LOG.pack(0, 0),
    "beyond its file": wire.LOG.pack(BYTES, 1 << 63),
    "unaligned": wire.LOG.pack(BYTES, 8),
    "short": wire.LOG.pack(BYTES, 0)[:-1],
}


@pytest.mark.parametrize("payload", IMPOSSIBLE.values(), ids=IMPOSSIBLE.keys())
def test_a_log_that_cannot_be_ends_the_session(serve: Serve, payload: bytes) -> None:
    with FrontEnd(serve(Rng(source=count_up))) as vm:
        file = os.memfd_create("log")
        os.ftruncate(file, PAGE)
        vm.start()
        vm.send(Request.SET_LOG_BASE, payload, [file])
        vm.wait_hangup()
        os.close(file)
