"""The loop of an I/O thread: kicks, the busy wait after them, and queues that come and go."""

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from pyvirtio._core import DeviceState, GuestMemory, IoThread, VirtQueue
from pyvirtio.testing.ring import NO_NOTIFY, WRITE, Desc, SplitRing

HANG = 10.0
SECONDS_NS = 10**9
SIZE = 8


class Polled:
    """A queue whose handler completes everything, and the driver's ring."""

    def __init__(self) -> None:
        self.memory = GuestMemory.allocate([(0, 1 << 20)])
        self.broken: list[str] = []
        self.state = DeviceState("dev0", self.broken.append)
        self.vq = VirtQueue(self.state, "requestq", 0, SIZE)
        self.ring = SplitRing(self.memory, SIZE, 0x1000, 0x2000, 0x3000)
        self.ring.write_desc(0, Desc(0x4000, 16, WRITE))
        self.vq.start(self.memory, self.complete_all, size=SIZE, desc=0x1000, avail=0x2000, used=0x3000)
        self.vq.attach()

    def complete_all(self, vq: VirtQueue) -> None:
        for chain in vq:
            chain.complete()

    def add(self) -> None:
        """Make a request available, without a kick."""
        self.ring.offer(0)
        self.ring.publish()

    def wait(self) -> None:
        """Until the device has used everything."""
        wait_until(lambda: self.ring.used_idx == self.ring.avail_idx)

    def serve_one(self) -> None:
        self.add()
        self.vq.signal()
        self.wait()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + HANG
    while not condition():
        assert time.monotonic() < deadline, "hangs"
        time.sleep(0.0005)


@pytest.fixture
def polled() -> Iterator[Polled]:
    polled = Polled()
    yield polled
    polled.vq.stop()


class Running:
    """A loop on its thread."""

    def __init__(self, **window: int) -> None:
        self.loop = IoThread(**window)
        self.thread = threading.Thread(target=self.loop.run)
        self.thread.start()

    def close(self) -> None:
        self.loop.close()
        self.thread.join(HANG)
        assert not self.thread.is_alive()


@pytest.fixture
def sleeping() -> Iterator[IoThread]:
    """A loop that sleeps as soon as there is nothing to do."""
    running = Running(poll_max_ns=0)
    yield running.loop
    running.close()


@pytest.fixture
def looking() -> Iterator[IoThread]:
    """A loop whose window grows to 100 s with the third kick."""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one CPU: the loop never looks")
    running = Running(poll_max_ns=100 * SECONDS_NS, poll_grow=1 << 14)
    yield running.loop
    running.close()


def widen_window(polled: Polled) -> None:
    wait_until(lambda: polled.vq.counters["wakeups"] == 1)  # what attaching left
    for _ in range(2):
        wait_until(lambda: not polled.ring.used_flags & NO_NOTIFY)
        polled.serve_one()


def test_a_kick_is_served_and_counted(sleeping: IoThread, polled: Polled) -> None:
    sleeping.add(polled.vq)
    polled.serve_one()
    polled.serve_one()
    counters = polled.vq.counters
    assert counters["chains"] == 2
    assert counters["kicks"] == 3, "attaching leaves a signal"
    assert 2 <= counters["wakeups"] <= 3


def test_a_signal_from_before_the_queue_was_added_is_not_lost(sleeping: IoThread, polled: Polled) -> None:
    polled.add()
    sleeping.add(polled.vq)
    polled.wait()


def test_a_queue_that_was_removed_is_left_alone(sleeping: IoThread, polled: Polled) -> None:
    other = Polled()
    sleeping.add(polled.vq)
    sleeping.add(other.vq)
    polled.serve_one()
    sleeping.remove(polled.vq)
    before = polled.vq.counters["wakeups"]
    polled.add()
    polled.vq.signal()
    other.serve_one()
    assert polled.vq.counters["wakeups"] == before
    assert polled.ring.used_idx == 1
    sleeping.add(polled.vq)
    polled.wait()
    other.vq.stop()


def test_a_queue_is_added_once(sleeping: IoThread, polled: Polled) -> None:
    sleeping.add(polled.vq)
    with pytest.raises(OSError, match="File exists") as refused:
        sleeping.add(polled.vq)
    assert refused.value.errno == errno.EEXIST
    sleeping.remove(polled.vq)
    sleeping.remove(polled.vq)
    sleeping.add(polled.vq)


def test_a_loop_that_was_closed_first_returns_at_once() -> None:
    loop = IoThread()
    loop.close()
    loop.run()


def test_an_exception_of_a_handler_does_not_end_the_thread(sleeping: IoThread, polled: Polled) -> None:
    other = Polled()
    other.vq.stop()
    other.vq.start(other.memory, lambda vq: 1 // 0, size=SIZE, desc=0x1000, avail=0x2000, used=0x3000)
    sleeping.add(other.vq)
    sleeping.add(polled.vq)
    other.add()
    other.vq.signal()
    wait_until(lambda: bool(other.broken))
    polled.serve_one()
    other.vq.stop()


def test_work_that_follows_soon_needs_no_kick(looking: IoThread, polled: Polled) -> None:
    looking.add(polled.vq)
    widen_window(polled)
    assert polled.ring.used_flags & NO_NOTIFY, "the driver is told not to kick"
    before = polled.vq.counters["kicks"]
    polled.add()
    polled.wait()
    assert polled.vq.counters["kicks"] == before


def test_other_queues_are_served_while_the_loop_looks_at_one(looking: IoThread, polled: Polled) -> None:
    other = Polled()
    looking.add(polled.vq)
    widen_window(polled)
    assert polled.ring.used_flags & NO_NOTIFY
    looking.add(other.vq)
    other.serve_one()
    assert polled.ring.used_flags & NO_NOTIFY, "it was still looking"
    other.vq.stop()


def test_kicks_are_asked_for_again_when_a_queue_is_removed(looking: IoThread, polled: Polled) -> None:
    looking.add(polled.vq)
    widen_window(polled)
    assert polled.ring.used_flags & NO_NOTIFY
    looking.remove(polled.vq)
    wait_until(lambda: not polled.ring.used_flags & NO_NOTIFY)


def test_kicks_are_asked_for_again_when_the_loop_ends(polled: Polled) -> None:
    running = Running(poll_max_ns=100 * SECONDS_NS)
    running.loop.add(polled.vq)
    polled.serve_one()
    running.close()
    assert not polled.ring.used_flags & NO_NOTIFY
