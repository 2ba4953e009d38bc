"""Devices behind a vhost-user socket, driven by a front-end in the same process."""

import os
import socket
import struct
from contextlib import suppress
from pathlib import Path

import pytest
from serving import Serve, count_up

from pyvirtio.backends.block import File, Memory
from pyvirtio.devices.blk import Blk
from pyvirtio.devices.rng import Rng
from pyvirtio.serve import wire
from pyvirtio.serve.wire import ProtocolFeature, Request
from pyvirtio.spec import Feature
from pyvirtio.testing.blk import Disk
from pyvirtio.testing.vhost_user import MIB, FrontEnd


def test_the_message_that_agrees_on_acknowledgements_is_acknowledged(serve: Serve) -> None:
    with FrontEnd(serve(Rng(source=count_up))) as vm:
        assert vm.tell(Request.SET_PROTOCOL_FEATURES, wire.U64.pack(ProtocolFeature.REPLY_ACK)) == 0


@pytest.mark.parametrize("indirect", [False, True], ids=["direct", "indirect"])
@pytest.mark.parametrize("event_idx", [False, True], ids=["flags", "event_idx"])
def test_rng_is_served(serve: Serve, indirect: bool, event_idx: bool) -> None:
    features = ~0 if event_idx else ~int(Feature.EVENT_IDX)
    with FrontEnd(serve(Rng(source=count_up))) as vm:
        vm.start(features=features, indirect=indirect)
        for length in range(1, 200):
            buffer = vm.requestq.add(writable=[length, 3])
            vm.requestq.kick()
            assert buffer.wait() == count_up(length + 3)


def test_a_disk_in_a_file_is_served_on_all_its_queues(serve: Serve, tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(os.urandom(MIB))
    with FrontEnd(serve(Blk(File(image), num_queues=4, serial="mine"))) as vm:
        assert struct.unpack_from("<Q", vm.read_config()) == (MIB // 512,)
        assert vm.get(Request.GET_QUEUE_NUM) == 4
        vm.start([f"requestq{index}" for index in range(4)], indirect=True)
        disk = Disk(vm)
        assert disk.get_id() == "mine"
        for index in range(4):
            data = os.urandom(8192)
            disk.write(16 * index, data, queue=index)
            assert disk.read(16 * index, 8192, queue=3 - index) == data
        disk.flush()
        assert image.read_bytes()[: 64 * 512] == disk.read(0, 64 * 512)


def test_a_backend_in_python_is_served(serve: Serve) -> None:
    with FrontEnd(serve(Blk(Memory(MIB)))) as vm:
        disk = Disk(vm.start())
        disk.write(5, b"x" * 512)
        assert disk.read(4, 1024) == bytes(512) + b"x" * 512


def test_a_ring_may_be_larger_than_the_device_says(serve: Serve) -> None:
    """The front-end cannot know; User-mode Linux gives every queue 256 entries."""
    with FrontEnd(serve(Rng(source=count_up))) as vm:
        vm.start(size=1024)
        buffer = vm.requestq.add(writable=7)
        vm.requestq.kick()
        assert buffer.wait() == count_up(7)


def test_the_ring_wraps(serve: Serve) -> None:
    with FrontEnd(serve(Rng(source=count_up))) as vm:
        vm.start(size=4)
        for _ in range(20):
            buffers = [vm.requestq.add(writable=5) for _ in range(4)]
            vm.requestq.kick()
            assert [buffer.wait() for buffer in buffers] == [count_up(5)] * 4


def test_buffers_made_available_before_the_ring_starts_are_served(serve: Serve) -> None:
    with FrontEnd(serve(Rng(source=count_up))) as vm:
        vm.start()
        base = vm.stop_ring(vm.requestq)
        buffer = vm.requestq.add(writable=7)
        vm.requestq.publish()
        vm.start_ring(vm.requestq, base)
        assert buffer.wait() == count_up(7)


def test_a_stopped_ring_is_left_alone_and_goes_on_where_it_was(serve: Serve) -> None:
    with FrontEnd(serve(Rng(source=count_up))) as vm:
        vm.start()
        for _ in range(3):
            buffer = vm.requestq.add(writable=7)
            vm.requestq.kick()
            buffer.wait()
        assert vm.stop_ring(vm.requestq) == 3
        late = vm.requestq.add(writable=9)
        vm.requestq.kick()
        assert vm.get(Request.GET_QUEUE_NUM) == 1
        assert not late.done
        assert vm.requestq.ring.used_idx == 3
        vm.start_ring(vm.requestq, 3)
        assert late.wait() == count_up(9)


@pytest.mark.parametrize("first", ["kick", "enable", "address"])
def test_the_order_in_which_a_ring_is_set_up_does_not_matter(serve: Serve, first: str) -> None:
    with FrontEnd(serve(Rng(source=count_up))) as vm:
        vm.start()
        q = vm.requestq
        vm.stop_ring(q)
        vm.acked(Request.SET_VRING_ENABLE, wire.VRING_STATE.pack(0, 0))
        buffer = q.add(writable=7)
        q.publish()
        steps = {
            "kick": lambda: vm.acked(Request.SET_VRING_KICK, wire.U64.pack(0), vm.kicks),
            "enable": lambda: vm.acked(Request.SET_VRING_ENABLE, wire.VRING_STATE.pack(0, 1)),
            "address": lambda: vm.acked(Request.SET_VRING_ADDR, vm.addresses(q)),
        }
        for name in sorted(steps, key=lambda name: name != first):
            steps[name]()
        assert buffer.wait() == count_up(7)


def test_a_disabled_ring_is_left_alone(serve: Serve) -> None:
    with FrontEnd(serve(Rng(source=count_up))) as vm:
        vm.start()
        vm.acked(Request.SET_VRING_ENABLE, wire.VRING_STATE.pack(0, 0))
        buffer = vm.requestq.add(writable=7)
        vm.requestq.kick()
        assert vm.get(Request.GET_QUEUE_NUM) == 1
        assert vm.requestq.ring.used_idx == 0
        vm.acked(Request.SET_VRING_ENABLE, wire.VRING_STATE.pack(0, 1))
        assert buffer.wait() == count_up(7)


def test_without_protocol_features_rings_need_no_enable(serve: Serve) -> None:
    with FrontEnd(serve(Rng(source=count_up))) as vm:
        vm.start()
        vm.acked(Request.SET_VRING_ENABLE, wire.VRING_STATE.pack(0, 0))
        vm.acked(Request.SET_FEATURES, wire.U64.pack(vm.features & ~wire.PROTOCOL_FEATURES))
        buffer = vm.requestq.add(writable=7)
        vm.requestq.kick()
        assert buffer.wait() == count_up(7)


def test_a_second_kick_fd_closes_the_first(serve: Serve) -> None:
    with FrontEnd(serve(Rng(source=count_up))) as vm:
        vm.start()
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(20):
            vm.acked(Request.SET_VRING_KICK, wire.U64.pack(0), vm.kicks)
            buffer = vm.requestq.add(writable=7)
            vm.requestq.kick()
            assert buffer.wait() == count_up(7)
        assert len(os.listdir("/proc/self/fd")) == before


def test_a_ring_without_kicks_is_polled(serve: Serve) -> None:
    with FrontEnd(serve(Rng(source=count_up))) as vm:
        vm.start()
        vm.acked(Request.SET_VRING_KICK, wire.U64.pack(wire.NO_FD))
        for _ in range(3):
            buffer = vm.requestq.add(writable=7)
            vm.requestq.publish()
            assert buffer.wait() == count_up(7)


def test_a_ring_without_calls_sends_none(serve: Serve) -> None:
    with FrontEnd(serve(Rng(source=count_up))) as vm:
        vm.start()
        vm.acked(Request.SET_VRING_CALL, wire.U64.pack(wire.NO_FD))
        vm.requestq.polling = True
        vm.requestq.source.take()
        before = vm.requestq.source.count
        buffer = vm.requestq.add(writable=7)
        vm.requestq.kick()
        assert buffer.wait() == count_up(7)
        assert vm.requestq.interrupts == before


@pytest.mark.parametrize("kind", ["pipe", "socket"])
def test_a_full_call_fd_that_is_no_eventfd_does_not_block(serve: Serve, kind: str) -> None:
    with FrontEnd(serve(Rng(source=count_up))) as vm:
        vm.start(features=~int(Feature.EVENT_IDX))
        read, write = os.pipe() if kind == "pipe" else (end.detach() for end in socket.socketpair())
        vm.acked(Request.SET_VRING_CALL, wire.U64.pack(0), [write])
        fill(write)
        vm.requestq.polling = True
        for _ in range(3):
            buffer = vm.requestq.add(writable=7)
            vm.requestq.kick()
            assert buffer.wait() == count_up(7)
        os.close(read)
        os.close(write)


def fill(fd: int) -> None:
    """Write until there is no room."""
    os.set_blocking(fd, False)
    with suppress(BlockingIOError):
        while True:
            os.write(fd, bytes(4096))
