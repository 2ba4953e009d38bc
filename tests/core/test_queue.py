"""Virtqueues and chains from Python."""

import logging
import struct
import threading
from collections.abc import Callable, Iterator

import pytest

from pyvirtio._core import Chain, DeviceState, GuestMemory, IrqLine, Isr, VirtQueue
from pyvirtio.errors import GuestError, StaleChain

SIZE = 8
DESC, AVAIL, USED, BUFFERS = 0x1000, 0x2000, 0x3000, 0x4000


class Ring:
    """A started queue and its driver: requests of one readable and one writable buffer of 16 bytes."""

    def __init__(self) -> None:
        self.memory = GuestMemory.allocate([(0, 1 << 20)])
        self.broken: list[str] = []
        self.state = DeviceState("dev0", self.broken.append)
        self.vq = VirtQueue(self.state, "requestq", 3, 16)
        self.vq.set_interrupt(Isr(IrqLine()), None)
        self.avail_idx = 0

    def start(self, handler: Callable[[VirtQueue], object]) -> None:
        self.vq.start(self.memory, handler, size=SIZE, desc=DESC, avail=AVAIL, used=USED, event_idx=True)

    def add(self, data: bytes = b"sixteen readable") -> int:
        """Make a request available; return the address of its writable buffer."""
        head = 2 * self.avail_idx % SIZE
        address = BUFFERS + 32 * head
        self.memory.write(address, data)
        descs = struct.pack("<QIHHQIHH", address, len(data), 1, head + 1, address + 16, 16, 2, 0)
        self.memory.write(DESC + 16 * head, descs)
        self.memory.store16(AVAIL + 4 + 2 * (self.avail_idx % SIZE), head)
        self.avail_idx += 1
        self.memory.store16(AVAIL + 2, self.avail_idx)
        return address + 16

    def used(self) -> list[tuple[int, int]]:
        count = self.memory.load16(USED + 2)
        return list(struct.iter_unpack("<II", self.memory.read(USED + 4, 8 * count)))


@pytest.fixture
def ring() -> Iterator[Ring]:
    ring = Ring()
    yield ring
    ring.vq.stop()


def shout(vq: VirtQueue) -> None:
    for chain in vq:
        chain.write(chain.read().upper())
        chain.complete()


def test_a_handler_answers_each_chain(ring: Ring) -> None:
    ring.start(shout)
    answers = [ring.add(), ring.add(b"short")]
    ring.vq.notify()
    assert [ring.memory.read(answer, 16) for answer in answers] == [b"SIXTEEN READABLE", b"SHORT".ljust(16, b"\0")]
    assert ring.used() == [(0, 16), (2, 5)]
    assert ring.vq.counters == {
        "notifies": 1, "kicks": 0, "wakeups": 0, "answers": 0, "chains": 2, "interrupts": 1, "suppressed": 0,
    }  # fmt: skip


def test_reading_and_writing_advance(ring: Ring) -> None:
    ring.start(id)
    answer = ring.add(struct.pack("<HI", 7, 9) + b"tail")
    chain = next(ring.vq)
    assert (chain.head, chain.readable, chain.writable) == (0, 10, 16)
    assert chain.unpack("<HI") == (7, 9)
    with pytest.raises(GuestError, match="8 bytes wanted, the chain has 4 left"):
        chain.unpack("<Q")
    assert chain.read(2) == b"ta"
    assert chain.read() == b"il"
    assert chain.read(1) == b""
    assert chain.write(bytearray(b"x" * 15)) == 15
    assert chain.write(b"yz") == 1
    chain.complete()
    assert ring.memory.read(answer, 16) == b"x" * 15 + b"y"
    assert ring.used() == [(0, 16)]


def test_the_handler_gets_the_queue_itself(ring: Ring) -> None:
    got: list[VirtQueue] = []
    ring.start(got.append)
    ring.add()
    ring.vq.notify()
    assert got == [ring.vq]
    assert (ring.vq.name, ring.vq.index, ring.vq.size, ring.vq.max_size) == ("requestq", 3, 8, 16)


def test_a_chain_may_be_completed_later_on_another_thread(ring: Ring) -> None:
    kept: list[Chain] = []
    ring.start(lambda vq: kept.extend(vq))
    ring.add()
    ring.vq.notify()
    assert ring.used() == []
    assert ring.vq.in_flight == 1
    late = threading.Thread(target=kept[0].complete)
    late.start()
    late.join()
    assert ring.used() == [(0, 0)]
    assert ring.vq.in_flight == 0


def test_completing_twice_is_an_error(ring: Ring) -> None:
    ring.start(id)
    ring.add()
    chain = next(ring.vq)
    chain.complete()
    with pytest.raises(RuntimeError, match="completed already"):
        chain.complete()


def test_after_a_reset_every_use_of_a_chain_is_stale(ring: Ring) -> None:
    ring.start(id)
    ring.add()
    chain = next(ring.vq)
    assert ring.vq.stop() == (1, 0)
    ring.state.reset()
    uses: list[Callable[[], object]] = [
        chain.read, chain.complete, lambda: chain.write(b"x"), lambda: chain.readable, lambda: chain.writable,
        lambda: chain.unpack("<H"),
    ]  # fmt: skip
    for use in uses:
        with pytest.raises(StaleChain):
            use()


def test_a_dropped_chain_breaks_the_device(ring: Ring) -> None:
    ring.start(lambda vq: next(vq) and None)
    ring.add()
    ring.vq.notify()
    assert ring.broken == ["requestq: the handler dropped chain 0 without complete(); each has to be completed"]


def test_a_malformed_chain_ends_the_iteration_and_breaks_the_device(ring: Ring) -> None:
    ring.start(shout)
    ring.add()
    ring.memory.write(DESC, struct.pack("<QIHH", 1 << 40, 16, 0, 0))
    ring.vq.notify()
    assert ring.broken == ["requestq: head 0: descriptor 0: 16 bytes at 0x10000000000 are not guest memory"]
    assert ring.used() == []


def test_a_guest_error_of_the_handler_breaks_the_device(ring: Ring, caplog: pytest.LogCaptureFixture) -> None:
    def handler(vq: VirtQueue) -> None:
        for chain in vq:
            chain.unpack("<100s")

    ring.start(handler)
    ring.add()
    ring.vq.notify()
    assert ring.broken == ["requestq: 100 bytes wanted, the chain has 16 left"]
    assert caplog.records == []


def test_any_other_exception_is_logged_and_breaks_the_device(ring: Ring, caplog: pytest.LogCaptureFixture) -> None:
    def handler(vq: VirtQueue) -> None:
        for chain in vq:
            raise ZeroDivisionError(f"head {chain.head}")

    ring.start(handler)
    ring.add()
    ring.vq.notify()
    assert ring.broken == ["requestq: the handler raised ZeroDivisionError: head 0"]
    [record] = caplog.records
    assert (record.name, record.levelno) == ("pyvirtio", logging.ERROR)
    assert record.getMessage() == "dev0: requestq: exception in the handler"
    assert record.exc_info is not None


def test_stale_work_of_a_handler_is_no_error(ring: Ring, caplog: pytest.LogCaptureFixture) -> None:
    def handler(vq: VirtQueue) -> None:
        for chain in vq:
            vq.stop()
            chain.complete()

    ring.start(handler)
    ring.add()
    ring.vq.notify()
    assert (ring.broken, caplog.records) == ([], [])


def test_stop_waits_for_a_handler_in_python(ring: Ring) -> None:
    entered, go_on, order = threading.Event(), threading.Event(), list[str]()

    def handler(vq: VirtQueue) -> None:
        entered.set()
        go_on.wait(10)
        shout(vq)
        order.append("served")

    def stop() -> None:
        ring.vq.stop()
        order.append("stopped")

    ring.start(handler)
    ring.add()
    serving, stopping = threading.Thread(target=ring.vq.notify), threading.Thread(target=stop)
    serving.start()
    assert entered.wait(10)
    stopping.start()
    go_on.set()
    serving.join(10)
    stopping.join(10)
    assert order == ["served", "stopped"]
    assert not ring.vq.ready


def test_while_attached_a_notify_only_signals(ring: Ring) -> None:
    ring.start(shout)
    ring.vq.attach()
    ring.add()
    ring.vq.notify()
    assert ring.vq.attached
    assert ring.used() == []
    ring.vq.detach()
    assert ring.used() == [(0, 16)]


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"size": 12}, r"12 entries \(a power of two up to 16\)"),
        ({"size": 1 << 16}, r"entries \(a power of two up to 16\)"),
        ({"used": DESC}, "overlap"),
        ({"avail": 1 << 40}, "not guest memory"),
    ],
)
def test_a_ring_that_cannot_be_is_the_guests_fault(ring: Ring, wrong: dict[str, int], reason: str) -> None:
    layout = {"size": SIZE, "desc": DESC, "avail": AVAIL, "used": USED} | wrong
    with pytest.raises(GuestError, match=reason):
        ring.vq.start(ring.memory, shout, **layout)  # type: ignore[arg-type]
    assert not ring.vq.ready
