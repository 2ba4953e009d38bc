"""What becomes of a served device: its configuration, its memory, and who may start it over."""

import errno
import os
import socket
import struct
import threading
import time
from collections.abc import Callable
from ctypes import LittleEndianStructure, c_uint32
from pathlib import Path

import pytest
from serving import Serve, count_up

from pyvirtio import Chain, Device, VirtQueue, queue
from pyvirtio._core import GuestMemory
from pyvirtio.backends.block import BlockBackend
from pyvirtio.dataplane import IoThread
from pyvirtio.devices.blk import Blk
from pyvirtio.devices.rng import Rng
from pyvirtio.serve import wire
from pyvirtio.serve.server import Server, listen
from pyvirtio.serve.vhost_user import Rings
from pyvirtio.serve.wire import Request
from pyvirtio.spec import WRAP_COUNTER, Feature, Status
from pyvirtio.testing.blk import Disk
from pyvirtio.testing.queue import HANG
from pyvirtio.testing.ring import WRITE, Desc
from pyvirtio.testing.serving import serve_in_process
from pyvirtio.testing.vhost_user import MIB, USER, FrontEnd


class KnobConfig(LittleEndianStructure):
    _fields_ = (("value", c_uint32),)


class Knob(Device, id=63, config=KnobConfig):
    """Has a configuration that both sides change, keeps its chains, and notes what happens to it."""

    def __init__(self) -> None:
        self.kept: list[Chain] = []
        self.events: list[str] = []

    @queue(size=64)
    def requestq(self, vq: VirtQueue) -> None:
        self.kept += vq

    def activate(self, features: int) -> None:
        self.events.append("activate")

    def reset(self) -> None:
        self.events.append("reset")
        self.kept.clear()

    def write_config(self, offset: int, data: bytes) -> None:
        if data == b"boom":
            raise RuntimeError("boom")
        self.config.value = int.from_bytes(data, "little")


def test_the_configuration_is_read_and_written(serve: Serve) -> None:
    knob = Knob()
    with FrontEnd(serve(knob)) as vm:
        vm.negotiate()
        vm.acked(Request.SET_CONFIG, wire.CONFIG.pack(0, 4, 0) + struct.pack("<I", 77))
        assert knob.config.value == 77
        assert vm.read_config(8) == struct.pack("<II", 77, 0)


def test_the_front_end_is_told_of_a_new_configuration(serve: Serve) -> None:
    knob = Knob()
    ours, theirs = socket.socketpair()
    with FrontEnd(serve(knob)) as vm, ours, theirs:
        vm.negotiate()
        vm.acked(Request.SET_BACKEND_REQ_FD, fds=[theirs.fileno()])
        with knob.update_config() as config:
            config.value = 5
        assert ours.recv(100) == wire.pack(wire.BACKEND_CONFIG_CHANGE_MSG)
        assert vm.read_config(4) == struct.pack("<I", 5)


def test_a_device_is_activated_once_and_reset_when_the_front_end_says_so(serve: Serve) -> None:
    knob = Knob()
    with FrontEnd(serve(knob)) as vm:
        vm.start()
        vm.start_ring(vm.requestq, vm.stop_ring(vm.requestq))
        assert knob.events == ["activate"]
        vm.acked(Request.RESET_DEVICE)
        assert knob.events == ["activate", "reset"]
        vm.start_ring(vm.requestq)
        assert knob.events == ["activate", "reset", "activate"]


def test_a_front_end_that_goes_resets_the_device(serve: Serve) -> None:
    knob = Knob()
    path = serve(knob)
    with FrontEnd(path) as vm:
        vm.start()
    with FrontEnd(path) as vm:
        vm.start()
        assert knob.events == ["activate", "reset", "activate"]


def test_stopping_a_ring_waits_for_what_the_device_holds(serve: Serve) -> None:
    knob = Knob()
    with FrontEnd(serve(knob)) as vm:
        vm.start()
        buffer = vm.requestq.add(writable=4)
        vm.requestq.kick()
        wait_for(lambda: len(knob.kept) == 1)
        vm.send(Request.GET_VRING_BASE, wire.VRING_STATE.pack(0, 0))
        knob.kept[0].write(b"late")
        knob.kept[0].complete()
        assert wire.VRING_STATE.unpack(vm.reply()) == (0, 1)
        assert buffer.wait() == b"late"


def test_a_new_kick_fd_disturbs_nothing_that_is_in_flight(serve: Serve) -> None:
    knob = Knob()
    with FrontEnd(serve(knob)) as vm:
        vm.start()
        buffers = []
        for count in (1, 2, 3):
            old, vm.kicks[0] = vm.kicks[0], os.eventfd(0, os.EFD_NONBLOCK)
            vm.acked(Request.SET_VRING_KICK, wire.U64.pack(0), vm.kicks)
            os.close(old)
            buffers.append(vm.requestq.add(writable=4))
            vm.requestq.kick()
            wait_for(lambda held=count: len(knob.kept) == held)  # type: ignore[misc]
        for chain in knob.kept:
            chain.write(b"done")
            chain.complete()
        assert [buffer.wait() for buffer in buffers] == [b"done"] * 3


def test_memory_comes_and_goes_while_a_ring_runs(serve: Serve) -> None:
    """A buffer in a new region, before and after the region is given up; a request in flight goes on."""
    knob = Knob()
    with FrontEnd(serve(knob)) as vm:
        vm.start()
        early = vm.requestq.add(writable=4)
        vm.requestq.kick()
        extra = GuestMemory.allocate([(1 << 32, MIB)])
        ((guest, size, fd, offset),) = extra.regions
        region = bytes(8) + wire.REGION.pack(guest, size, USER + guest, offset)
        vm.acked(Request.ADD_MEM_REG, region, [fd])
        wait_for(lambda: len(knob.kept) == 1)
        vm.requestq.ring.add([Desc(guest + 16, 4, WRITE)])
        vm.requestq.kick()
        wait_for(lambda: len(knob.kept) == 2)
        vm.acked(Request.REM_MEM_REG, region, [fd])
        for chain, data in zip(knob.kept, (b"1st!", b"2nd!"), strict=True):
            chain.write(data)
            chain.complete()
        assert early.wait() == b"1st!"
        assert extra.read(guest + 16, 4) == b"2nd!"
        vm.requestq.ring.add([Desc(guest + 16, 4, WRITE)])
        vm.requestq.kick()
        vm.wait_broken()


def test_a_region_that_is_added_twice_stays_until_it_is_removed_twice(serve: Serve) -> None:
    """QEMU 7.2 adds and removes each of them once for every queue pair of a network card."""
    with FrontEnd(serve(Rng(source=count_up))) as vm:
        vm.start()
        ((region, fd),) = vm.regions()
        vm.acked(Request.ADD_MEM_REG, bytes(8) + region, [fd])
        vm.acked(Request.REM_MEM_REG, bytes(8) + region, [fd])
        buffer = vm.requestq.add(writable=7)
        vm.requestq.kick()
        assert buffer.wait() == count_up(7)
        vm.acked(Request.REM_MEM_REG, bytes(8) + region, [fd])
        vm.wait_broken()


def test_another_file_where_there_is_memory_already_ends_the_session(serve: Serve) -> None:
    other = GuestMemory.allocate([(0, 4 * MIB)])
    ((_, _, fd, _),) = other.regions
    with FrontEnd(serve(Rng(source=count_up))) as vm:
        vm.start()
        ((region, _),) = vm.regions()
        vm.send(Request.ADD_MEM_REG, bytes(8) + region, [fd])
        vm.wait_hangup()


def test_a_new_memory_table_while_a_ring_runs(serve: Serve) -> None:
    with FrontEnd(serve(Rng(source=count_up))) as vm:
        vm.start()
        for _ in range(5):
            vm.set_mem_table()
            buffer = vm.requestq.add(writable=7)
            vm.requestq.kick()
            assert buffer.wait() == count_up(7)


def test_a_ring_that_loses_its_memory_breaks_the_device(serve: Serve) -> None:
    with FrontEnd(serve(Rng(source=count_up))) as vm:
        vm.start()
        ((region, _),) = vm.regions()
        vm.acked(Request.REM_MEM_REG, bytes(8) + region)
        vm.wait_broken()


@pytest.mark.parametrize("recovery", ["reset", "stop", "reconnect"])
def test_a_guest_that_breaks_the_rules_breaks_the_device_until_the_front_end_starts_over(
    serve: Serve, recovery: str
) -> None:
    path = serve(Rng(source=count_up))
    vm = FrontEnd(path).start()
    vm.requestq.ring.offer(99)  # no such descriptor
    vm.requestq.kick()
    vm.wait_broken()
    vm.requestq.ring.offer(0)
    vm.requestq.kick()
    assert vm.get(Request.GET_QUEUE_NUM) == 1
    if recovery == "reconnect":
        vm.close()
        vm = FrontEnd(path)
    elif recovery == "reset":
        vm.acked(Request.RESET_DEVICE)
    else:
        vm.stop_ring(vm.requestq)
    with vm:
        vm.drop_queues()
        vm.start()
        buffer = vm.requestq.add(writable=7)
        vm.requestq.kick()
        assert buffer.wait() == count_up(7)


def test_a_device_that_raises_breaks_and_the_session_goes_on(serve: Serve) -> None:
    with FrontEnd(serve(Knob())) as vm:
        vm.start()
        assert vm.tell(Request.SET_CONFIG, wire.CONFIG.pack(0, 4, 0) + b"boom")
        vm.wait_broken()
        assert vm.get(Request.GET_QUEUE_NUM) == 1


class Whose(BlockBackend):
    """Fills a request with the number of the thread that serves it."""

    capacity = MIB

    def __init__(self) -> None:
        self.threads: list[int] = []

    def pread(self, length: int, offset: int) -> bytes:
        thread = threading.get_ident()
        if thread not in self.threads:
            self.threads.append(thread)
        return bytes([self.threads.index(thread)]) * length


def test_the_queues_of_a_disk_are_dealt_out_to_the_io_threads(tmp_path: Path) -> None:
    iothreads = [IoThread(f"test{n}") for n in range(3)]
    with (
        Server(Blk(Whose(), num_queues=6), "served", listen(tmp_path / "s"), iothreads),
        FrontEnd(tmp_path / "s") as vm,
    ):
        disk = Disk(vm.start([f"requestq{n}" for n in range(6)]))
        assert b"".join(disk.read(0, 512, queue=n)[:1] for n in range(6)) == bytes([0, 1, 2, 0, 1, 2])
    for iothread in iothreads:
        iothread.close()


def test_a_second_front_end_is_turned_away(serve: Serve) -> None:
    path = serve(Rng(source=count_up))
    with FrontEnd(path) as vm:
        vm.start()
        with FrontEnd(path) as second:
            second.wait_hangup()
        buffer = vm.requestq.add(writable=7)
        vm.requestq.kick()
        assert buffer.wait() == count_up(7)


def test_a_base_of_a_packed_ring_is_no_harm_to_a_split_one(tmp_path: Path) -> None:
    """The front-end changes its mind about the features in between."""
    with serve_in_process(Rng(source=count_up), tmp_path / "s", Rings(packed=True)), FrontEnd(tmp_path / "s") as vm:
        vm.start(features=~int(Feature.RING_PACKED))
        vm.stop_ring(vm.requestq)
        vm.acked(Request.SET_FEATURES, wire.U64.pack(vm.features | Feature.RING_PACKED))
        vm.acked(Request.SET_VRING_BASE, wire.VRING_STATE.pack(0, WRAP_COUNTER << 16))
        vm.acked(Request.SET_FEATURES, wire.U64.pack(vm.features))
        vm.acked(Request.SET_VRING_KICK, wire.U64.pack(0), [vm.kicks[0]])
        buffer = vm.requestq.add(writable=7)
        vm.requestq.kick()
        assert buffer.wait() == count_up(7)


def test_a_ring_that_the_host_could_not_poll_can_be_started_again(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: IoThread, vq: VirtQueue) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with FrontEnd(serve(Rng(source=count_up))) as vm:
        vm.start()
        base = vm.stop_ring(vm.requestq)
        with monkeypatch.context() as host:
            host.setattr(IoThread, "poll", full)
            assert vm.tell(Request.SET_VRING_KICK, wire.U64.pack(0), [vm.kicks[0]]) == 1
            vm.wait_broken()
        vm.stop_ring(vm.requestq)
        vm.start_ring(vm.requestq, base)
        buffer = vm.requestq.add(writable=7)
        vm.requestq.kick()
        assert buffer.wait() == count_up(7)


def test_an_inherited_connection_may_be_non_blocking() -> None:
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    iothread = IoThread("test")
    with Server(Rng(source=count_up), "served", theirs, [iothread]), FrontEnd(ours) as vm:
        vm.start()
        buffer = vm.requestq.add(writable=7)
        vm.requestq.kick()
        assert buffer.wait() == count_up(7)
    iothread.close()


def wait_for(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + HANG
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_the_status_is_kept_and_says_when_the_device_is_broken(serve: Serve) -> None:
    with FrontEnd(serve(Rng(source=count_up))) as vm:
        vm.start()
        vm.acked(Request.SET_STATUS, wire.U64.pack(Status.DRIVER | Status.DRIVER_OK))
        assert vm.get(Request.GET_STATUS) == Status.DRIVER | Status.DRIVER_OK
        vm.requestq.ring.offer(99)
        vm.requestq.kick()
        vm.wait_broken()
        assert vm.get(Request.GET_STATUS) == Status.DRIVER | Status.DRIVER_OK | Status.NEEDS_RESET


def test_a_status_of_zero_stops_no_ring(serve: Serve) -> None:
    """QEMU 7.2 sends it when its machine pauses, before it asks the rings where they are."""
    with FrontEnd(serve(Rng(source=count_up))) as vm:
        vm.start()
        vm.requestq.add(writable=7)
        vm.requestq.kick()
        vm.acked(Request.SET_STATUS, wire.U64.pack(0))
        assert vm.stop_ring(vm.requestq) == 1
