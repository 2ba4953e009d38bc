"""Faults between a completed request and the driver: used entries and interrupts."""

import logging
import time
from collections.abc import Iterator

import pytest

from pyvirtio import Device, VirtQueue, queue
from pyvirtio.errors import ConfigError
from pyvirtio.faults import (
    Duplicate,
    Fault,
    Late,
    Length,
    Lost,
    LostInterrupt,
    NeedsReset,
    Reorder,
    RingFault,
    Short,
    Spurious,
)
from pyvirtio.testing import Buffer, Guest, VirtioDriver
from pyvirtio.testing.queue import HANG

LONG = 3600.0


class Echo(Device, id=63):
    """Echoes."""

    @queue(size=64)
    def echoq(self, vq: VirtQueue) -> None:
        for chain in vq:
            chain.write(chain.read())
            chain.complete()


class Rig:
    """An echo device in a machine, and its driver."""

    def __init__(self, guest: Guest) -> None:
        self.device = Echo()
        self.faults = self.device.faults
        self.driver: VirtioDriver = guest.plug(self.device)
        self.queue = self.driver.echoq
        self.vq = self.driver.function.dataplane.queues[0]

    def send(self, *words: bytes) -> list[Buffer]:
        buffers = [self.queue.add(word, 8) for word in words]
        self.queue.kick()
        return buffers

    def ask(self, word: bytes) -> bytes:
        return self.send(word)[0].wait()

    def used_order(self, count: int) -> list[int]:
        return [self.queue.ring.used_element(slot)[0] for slot in range(count)]


@pytest.fixture
def rig(guest: Guest) -> Iterator[Rig]:
    rig = Rig(guest)
    yield rig
    vars(rig).clear()


def test_nothing_goes_wrong_by_itself(rig: Rig) -> None:
    assert list(rig.faults) == []
    assert rig.ask(b"hello") == b"hello"


def test_late_is_late_and_complete(rig: Rig) -> None:
    late = Late("30ms")
    rig.faults.add(late)
    (buffer,) = rig.send(b"hello")
    until(late, 1)
    assert rig.vq.in_flight == 1
    assert buffer.wait() == b"hello"
    assert rig.vq.in_flight == 0


def test_switched_off_gives_back_what_was_held(rig: Rig) -> None:
    late = Late(LONG)
    rig.faults.add(late)
    buffers = rig.send(b"one", b"two")
    until(late, 2)
    rig.faults.remove(late)
    assert [buffer.wait() for buffer in buffers] == [b"one", b"two"]
    assert rig.ask(b"three") == b"three"


def until(fault: Fault, hits: int) -> None:
    """Until it has gone wrong so often, on whichever thread."""
    deadline = time.monotonic() + HANG
    while fault.hits < hits:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_reordered_used_entries_are_all_there(rig: Rig) -> None:
    rig.faults.add(Reorder(chance=0.5), seed=1)
    words = [b"%d" % n for n in range(16)]
    buffers = rig.send(*words)
    assert [buffer.wait() for buffer in buffers] == words
    assert rig.used_order(16) != [buffer.head for buffer in buffers]


def test_a_duplicated_used_entry_is_a_stray(rig: Rig) -> None:
    rig.faults.add(Duplicate())
    assert rig.ask(b"hello") == b"hello"
    rig.queue.collect()
    assert len(rig.queue.strays) == 1


def test_a_lost_used_entry_never_comes(rig: Rig) -> None:
    lost = Lost()
    rig.faults.add(lost)
    buffers = rig.send(b"one", b"two")
    until(lost, 2)
    rig.faults.clear()
    assert rig.ask(b"after") == b"after"
    assert [buffer.done for buffer in buffers] == [False, False]


@pytest.mark.parametrize(("fault", "lengths"), [(Short(), range(5)), (Length(7), [7]), (Length(), [0xFFFFFFFF])])
def test_used_len_is_wrong(rig: Rig, fault: RingFault, lengths: list[int]) -> None:
    rig.faults.add(fault)
    (buffer,) = rig.send(b"hello")
    buffer.wait()
    assert buffer.used_len in lengths


def test_an_interrupt_is_lost_but_not_its_used_entry(rig: Rig) -> None:
    lost = LostInterrupt()
    rig.faults.add(lost)
    (buffer,) = rig.send(b"hello")
    with pytest.raises(TimeoutError):
        buffer.wait(timeout=0.1)
    rig.queue.collect()
    assert buffer.wait() == b"hello"
    assert lost.hits == 1
    assert rig.queue.interrupts == 0


def test_a_spurious_interrupt_follows(rig: Rig) -> None:
    rig.faults.add(Spurious())
    assert rig.ask(b"hello") == b"hello"
    rig.queue.wait_until(lambda: rig.queue.interrupts >= 2, "the second interrupt")


def test_needs_reset_at_the_nth_request_and_then_no_more(rig: Rig) -> None:
    rig.faults.add(NeedsReset(3))
    assert rig.ask(b"one") == b"one"
    assert rig.ask(b"two") == b"two"
    rig.send(b"three")
    assert rig.driver.wait_needs_reset() == "fault: needs-reset=3"
    rig.driver.start()
    rig.queue = rig.driver.echoq
    assert rig.ask(b"four") == b"four"


def test_faults_compose(rig: Rig) -> None:
    rig.faults.add(Short(), Duplicate(), Late("1ms"), seed=1)
    buffers = rig.send(b"one", b"two")
    for buffer in buffers:
        assert len(buffer.wait()) < 3
    rig.queue.wait_until(lambda: len(rig.queue.strays) == 2, "the duplicates")


def decisions(seed: int) -> list[bytes]:
    """Which of 32 requests are cut short, and how."""
    with Guest(ioeventfd=False) as guest:
        rig = Rig(guest)
        rig.faults.add(Short(chance=0.3), seed=seed)
        return [rig.ask(b"12345678") for _ in range(32)]


def test_the_same_seed_makes_the_same_decisions() -> None:
    assert decisions(7) == decisions(7)
    assert decisions(7) != decisions(8)


def test_faults_survive_a_reset_and_hold_nothing_over_it(rig: Rig) -> None:
    late = Late("20ms")
    rig.faults.add(late)
    rig.send(b"old")
    until(late, 1)
    rig.driver.start()
    rig.queue = rig.driver.echoq
    assert rig.ask(b"new") == b"new"
    assert rig.queue.strays == []
    assert late.hits == 2


def test_faults_may_be_there_before_the_device_is_plugged(guest: Guest, caplog: pytest.LogCaptureFixture) -> None:
    device = Echo()
    device.faults.add(Length(3), seed=5)
    driver = guest.plug(device)
    assert "echo0: faults: length=3,seed=5" in caplog.text
    buffer = driver.echoq.add(b"hello", 8)
    driver.echoq.kick()
    assert buffer.wait() == b"hel"


def test_unplugging_leaves_nothing_behind(guest: Guest) -> None:
    device = Echo()
    device.faults.add(Late(LONG))
    driver = guest.plug(device)
    driver.echoq.add(b"hello", 8)
    driver.echoq.kick()
    guest.unplug(driver)


def test_a_seed_is_drawn_and_logged(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        rig.faults.add(Lost(chance=0.001))
    assert f"echo0: faults: lost@0.1%,seed={rig.faults.seed}" in caplog.text


def test_a_chance_is_from_0_to_1() -> None:
    with pytest.raises(ConfigError, match=r"^Lost: chance=5 is not from 0 to 1"):
        Lost(chance=5)


class Two(Device, id=63):
    """Two queues that echo."""

    @queue(size=64, count=2)
    def echoq(self, vq: VirtQueue) -> None:
        for chain in vq:
            chain.write(chain.read())
            chain.complete()


@pytest.mark.parametrize(("name", "lengths"), [("echoq1", [5, 1]), ("echoq", [1, 1]), (None, [1, 1])])
def test_a_fault_may_be_for_some_queues_only(guest: Guest, name: str | None, lengths: list[int]) -> None:
    device, fault = Two(), Length(1)
    fault.queue = name
    device.faults.add(fault)
    driver = guest.plug(device)
    buffers = [vq.add(b"hello", 8) for vq in driver.echoq]
    for vq in driver.echoq:
        vq.kick()
    assert [len(buffer.wait()) for buffer in buffers] == lengths


def test_a_queue_that_is_not_there(guest: Guest) -> None:
    device, fault = Two(), Lost()
    guest.plug(device)
    fault.queue = "ecoq"
    with pytest.raises(ConfigError, match=r"^two0: unknown queue 'ecoq', did you mean echoq"):
        device.faults.add(fault)


@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize("kind", [Duplicate, Lost, Reorder, Short, Late, LostInterrupt, Spurious])
def test_a_packed_ring_survives_its_faults(guest: Guest, kind: type[RingFault], in_order: bool) -> None:
    device = Echo()
    driver = guest.plug(device, packed=True, in_order=in_order)
    fault = kind(chance=1 if kind in (LostInterrupt, Spurious) else 0.5)  # these draw once for a batch
    device.faults.add(fault, seed=1)
    for _ in range(3):
        for _ in range(8):
            driver.echoq.add(b"hello", 8)
        driver.echoq.kick()
    until(fault, 1)
    device.faults.clear()
    driver.may_break = True
    driver.start()
    buffer = driver.echoq.add(b"after", 8)
    driver.echoq.kick()
    assert buffer.wait() == b"after"
