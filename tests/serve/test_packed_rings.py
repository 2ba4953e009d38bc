"""Packed rings over vhost-user: what is offered, and where a ring goes on (base with the wrap counters)."""

import pytest
from serving import count_up

from pyvirtio.devices.rng import Rng
from pyvirtio.serve import wire
from pyvirtio.serve.wire import Request
from pyvirtio.spec import WRAP_COUNTER, Feature
from pyvirtio.testing import Guest
from pyvirtio.testing.packed import PackedRing
from pyvirtio.testing.served import VhostUserDriver

FRESH = WRAP_COUNTER << 16 | WRAP_COUNTER


def packed_rng(guest: Guest, *, queue_size: int = 4, in_order: bool = False) -> VhostUserDriver:
    device = Rng(source=count_up)
    driver = guest.plug(device, transport="vhost-user", packed=True, in_order=in_order, queue_size=queue_size)
    assert isinstance(driver, VhostUserDriver)
    assert isinstance(driver.requestq.ring, PackedRing)
    return driver


def serve_some(vm: VhostUserDriver, count: int) -> None:
    for length in range(1, count + 1):
        buffer = vm.requestq.add(writable=length)
        vm.requestq.kick()
        assert buffer.wait() == count_up(length)


def test_packed_rings_are_offered_only_if_asked_for(guest: Guest) -> None:
    vm = guest.plug(Rng(), transport="vhost-user")
    assert isinstance(vm, VhostUserDriver)
    assert not vm.get(Request.GET_FEATURES) & (Feature.RING_PACKED | Feature.IN_ORDER)


@pytest.mark.parametrize("in_order", [False, True], ids=["any-order", "in-order"])
@pytest.mark.parametrize("queue_size", [1, 4, 5])
def test_a_packed_ring_wraps(guest: Guest, queue_size: int, in_order: bool) -> None:
    vm = packed_rng(guest, queue_size=queue_size, in_order=in_order)
    for _ in range(20):
        buffers = [vm.requestq.add(writable=5) for _ in range(queue_size)]
        vm.requestq.kick()
        assert [buffer.wait() for buffer in buffers] == [count_up(5)] * queue_size


def test_a_stopped_ring_says_both_indexes_with_their_wrap_counters(guest: Guest) -> None:
    vm = packed_rng(guest)
    assert vm.stop_ring(vm.requestq) == FRESH
    vm.start_ring(vm.requestq)
    for n in range(1, 12):
        serve_some(vm, 1)
        base = vm.stop_ring(vm.requestq)
        place = n % 4 | (0 if n // 4 % 2 else WRAP_COUNTER)
        assert base == place << 16 | place
        vm.start_ring(vm.requestq, base)
    serve_some(vm, 9)


def test_dpdk_tells_only_where_the_avail_side_of_a_fresh_ring_is(guest: Guest) -> None:
    vm = packed_rng(guest)
    vm.stop_ring(vm.requestq)
    vm.start_ring(vm.requestq, WRAP_COUNTER)
    serve_some(vm, 9)


def test_a_base_past_the_ring_breaks_the_device_until_a_better_one(guest: Guest) -> None:
    vm = packed_rng(guest)
    vm.may_break = True
    vm.stop_ring(vm.requestq)
    bad = WRAP_COUNTER | 4
    assert vm.tell(Request.SET_VRING_BASE, wire.VRING_STATE.pack(0, bad << 16 | bad)) == 0
    assert vm.tell(Request.SET_VRING_KICK, wire.U64.pack(0), [vm.kicks[0]])
    assert "index 4 is past the ring (4 entries)" in vm.wait_needs_reset()
    vm.start()
    serve_some(vm, 9)
