"""The tap between completed chains and the used ring."""

from collections.abc import Callable
from queue import Queue

import pytest

from pyvirtio import Chain, Device, VirtQueue, queue
from pyvirtio._core import Completed, Timer
from pyvirtio.testing import Guest
from pyvirtio.testing.queue import HANG, sleep_on


class Echo(Device, id=63):
    """Echoes, at once or when `kept` is taken."""

    def __init__(self, *, late: bool = False) -> None:
        self.late = late
        self.kept: Queue[Chain] = Queue()

    @queue(size=8)
    def echoq(self, vq: VirtQueue) -> None:
        for chain in vq:
            chain.write(chain.read())
            if self.late:
                self.kept.put(chain)
            else:
                chain.complete()


class Tapped:
    """An echo device with a tap that hands out what it gets."""

    def __init__(self, guest: Guest, *, late: bool = False) -> None:
        self.device = Echo(late=late)
        self.driver = guest.plug(self.device)
        self.vq = self.driver.function.dataplane.queues[0]
        self.seen: Queue[list[Completed]] = Queue()
        self.vq.set_tap(self.seen.put)

    def send(self, *words: bytes) -> list[Callable[[], bytes]]:
        buffers = [self.driver.echoq.add(word, 8) for word in words]
        self.driver.echoq.kick()
        return [buffer.wait for buffer in buffers]

    def take(self) -> list[Completed]:
        return self.seen.get(timeout=HANG)

    def close(self) -> None:
        self.vq.set_tap(None)


@pytest.fixture(params=["at once", "late"])
def tapped(guest: Guest, request: pytest.FixtureRequest) -> Tapped:
    return Tapped(guest, late=request.param == "late")


def test_what_is_completed_goes_to_the_tap_and_back(tapped: Tapped) -> None:
    (answer,) = tapped.send(b"hello")
    if tapped.device.late:
        tapped.device.kept.get(timeout=HANG).complete()
    (chain,) = tapped.take()
    assert chain.length == 5
    assert tapped.driver.echoq.ring.used_idx == 0
    assert tapped.vq.in_flight == 1
    tapped.vq.give_back([chain.resized(2)])
    assert answer() == b"he"
    assert tapped.vq.in_flight == 0
    tapped.close()


def test_a_batch_goes_back_in_any_order_with_one_interrupt(guest: Guest) -> None:
    tapped = Tapped(guest)
    answers = tapped.send(b"one", b"two", b"three")
    chains: list[Completed] = []
    while len(chains) < 3:
        chains += tapped.take()
    tapped.vq.give_back(chains[::-1])
    assert [answer() for answer in answers] == [b"one", b"two", b"three"]
    assert tapped.driver.echoq.ring.used_element(0)[0] == chains[-1].head
    assert tapped.driver.echoq.interrupts == 1
    tapped.close()


def test_the_interrupt_may_be_lost_or_for_nothing(guest: Guest) -> None:
    tapped = Tapped(guest)
    tapped.send(b"x")
    tapped.vq.give_back(tapped.take(), False)
    assert tapped.driver.echoq.ring.used_idx == 1
    assert tapped.driver.echoq.interrupts == 0
    tapped.vq.give_back([], True)
    assert tapped.driver.echoq.interrupts == 1
    tapped.close()


def test_a_chain_of_before_the_reset_is_dropped(guest: Guest) -> None:
    tapped = Tapped(guest)
    tapped.send(b"old")
    old = tapped.take()
    tapped.driver.start()
    tapped.vq.give_back(old)
    (answer,) = tapped.send(b"new")
    assert tapped.driver.echoq.ring.used_idx == 0
    tapped.vq.give_back(tapped.take())
    assert answer() == b"new"
    tapped.close()


def test_without_its_tap_the_queue_goes_on_as_before(guest: Guest) -> None:
    tapped = Tapped(guest)
    (held,) = tapped.send(b"held")
    chains = tapped.take()
    tapped.vq.set_tap(None)
    (answer,) = tapped.send(b"free")
    assert answer() == b"free"
    tapped.vq.give_back(chains)
    assert held() == b"held"


def test_a_defect_in_a_tap_is_logged(guest: Guest, caplog: pytest.LogCaptureFixture) -> None:
    def fail(chains: list[Completed]) -> None:
        seen.put(chains)
        raise IndexError("no such chain")

    tapped = Tapped(guest)
    seen = tapped.seen
    tapped.vq.set_tap(fail)
    tapped.send(b"x")
    tapped.take()
    tapped.driver.reset()  # waits for the handler's call, and so for the tap's
    assert "exception in a tap" in caplog.text
    assert "IndexError" in caplog.text
    tapped.close()


def test_another_handler_takes_over(guest: Guest) -> None:
    def shout(vq: VirtQueue) -> None:
        for chain in vq:
            chain.write(chain.read().upper())
            chain.complete()

    driver = guest.plug(Echo())
    driver.function.dataplane.queues[0].set_handler(shout)
    buffer = driver.echoq.add(b"hello", 8)
    driver.echoq.kick()
    assert buffer.wait() == b"HELLO"


def test_a_timer_is_readable_once_it_has_expired() -> None:
    timer = Timer()
    assert timer.take() == 0
    timer.start(0)
    assert sleep_on([timer.fd], HANG)
    assert timer.take() == 1
    assert timer.take() == 0
    timer.start(0, 0.0001)
    for _ in range(3):
        assert sleep_on([timer.fd], HANG)
        assert timer.take() >= 1
    timer.stop()
    with pytest.raises(ValueError, match=r"^-1 s"):
        timer.start(-1)
