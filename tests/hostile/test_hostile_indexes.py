"""Nonsense in the indexes, the event fields and the used ring."""

import os

import pytest
from attack import RING, Attack, echo

from pyvirtio.testing.ring import WRITE, Desc

pytestmark = pytest.mark.guest(transport=("modern", "vhost-user"))


@pytest.mark.parametrize("jump", [RING + 1, RING + 2, 0x8000, 0xFFFF])
def test_avail_jumps_further_than_the_queue(direct: Attack, jump: int) -> None:
    """0xffff is one step backwards."""
    direct.place(Desc(direct.buffer, 8, WRITE))
    direct.ring.next_avail = jump
    direct.breaks("entries ahead")


def test_avail_goes_backwards_later(direct: Attack) -> None:
    for _ in range(5):
        echo(direct.queue)
    served = direct.ring.used_idx
    direct.ring.next_avail = 3
    with direct.harmless():
        direct.send()
        assert "entries ahead" in direct.driver.wait_needs_reset()
    assert direct.ring.used_idx == served
    direct.recovers()


def test_avail_ahead_by_the_whole_queue_is_served(direct: Attack) -> None:
    direct.ring.write_desc(0, Desc(direct.buffer, 8, WRITE))
    for _ in range(RING):
        direct.ring.offer(0)
    assert direct.is_served(times=RING, writable=[(direct.buffer, 8)]) == [8] * RING


def test_the_indexes_wrap_at_65535(direct: Attack) -> None:
    direct.ring.write_desc(0, Desc(direct.buffer, 8, WRITE))
    for slot in range(RING):
        direct.ring.write_avail(slot, 0)
    for total in range(RING, 65536 + 4 * RING, RING):
        direct.ring.next_avail = total & 0xFFFF
        direct.send()
        direct.queue.wait_until(lambda: direct.ring.used_idx == direct.ring.next_avail, "the batch is served")
    direct.recovers()


@pytest.mark.parametrize("value", [0, 1, 0x7FFF, 0x8000, 0xFFFF])
def test_garbage_in_the_event_fields_costs_at_most_interrupts(direct: Attack, value: int) -> None:
    for round_ in range(3 * RING):
        direct.ring.used_event = (value + round_) & 0xFFFF
        direct.ring.avail_event = (value * 3) & 0xFFFF
        buffer = direct.queue.add(b"x", 1)
        direct.send()
        assert buffer.wait() == b"x"
    assert direct.queue.interrupts <= 3 * RING
    direct.recovers()


@pytest.mark.parametrize("value", [0, 1, 0x7FFF, 0xFFFF])
def test_garbage_in_the_used_ring_changes_nothing(direct: Attack, value: int) -> None:
    """The device keeps its own index."""
    for n in range(3):
        echo(direct.queue, b"%d" % n)
    start, length = direct.ring.used_range
    direct.guest.memory.write(start, value.to_bytes(2, "little") * (length // 2))
    head = direct.ring.add([Desc(direct.buffer, 8, WRITE)])
    direct.send()
    direct.queue.wait_until(lambda: direct.ring.used_idx == 4, "the device writes its own index")
    assert direct.ring.used_element(3) == (head, 8)
    direct.recovers()


@pytest.mark.guest(transport="modern")
def test_a_kick_with_nothing_new_does_nothing(direct: Attack) -> None:
    echo(direct.queue)
    used, chains = direct.ring.used_idx, direct.driver.function.dataplane.queues[0].counters["chains"]
    with direct.harmless():
        for _ in range(100):
            direct.queue.notify()
    assert direct.ring.used_idx == used
    assert direct.driver.function.dataplane.queues[0].counters["chains"] == chains
    assert echo(direct.queue) == b"hello"


def test_a_kick_storm_grows_nothing(direct: Attack) -> None:
    def held() -> tuple[int, int]:
        with open("/proc/self/statm") as statm:
            return len(os.listdir("/proc/self/fd")), int(statm.read().split()[1]) * os.sysconf("SC_PAGESIZE")

    fds, resident = held()
    for _ in range(10_000):
        direct.queue.notify()
    fds_after, resident_after = held()
    assert fds_after <= fds
    assert resident_after - resident <= 16 << 20
    assert echo(direct.queue) == b"hello"
    direct.recovers()


@pytest.mark.parametrize("flags", [1, 2, 0xFFFE, 0xFFFF])
def test_garbage_in_the_avail_flags_is_no_crash(direct: Attack, flags: int) -> None:
    direct.ring.avail_flags = flags
    for _ in range(2 * RING):
        assert echo(direct.queue, b"abc") == b"abc"
    direct.recovers()
