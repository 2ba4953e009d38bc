"""What the author of a device writes, and what becomes of it."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from pyvirtio import Chain, ConfigError, Device, StaleChain, VirtQueue, queue
from pyvirtio.testing import Guest
from pyvirtio.testing.queue import HANG


class Echo(Device, id=63):
    """Its queues echo what they get; the second one backwards."""

    def __init__(self) -> None:
        self.features: int | None = None
        self.resets = 0

    @queue(size=8)
    def echoq(self, vq: VirtQueue) -> None:
        for chain in vq:
            chain.write(chain.read())
            chain.complete()

    @queue(size=16)
    def backwardsq(self, vq: VirtQueue) -> None:
        for chain in vq:
            chain.write(chain.read()[::-1])
            chain.complete()

    def activate(self, features: int) -> None:
        self.features = features

    def reset(self) -> None:
        self.resets += 1


class Keeper(Device, id=63):
    """Keeps the chains, for somebody else to complete."""

    def __init__(self) -> None:
        self.chains: list[Chain] = []
        self.kept = threading.Semaphore(0)

    @queue(size=16)
    def requestq(self, vq: VirtQueue) -> None:
        for chain in vq:
            self.chains.append(chain)
            self.kept.release()

    def take(self) -> Chain:
        assert self.kept.acquire(timeout=HANG)
        return self.chains.pop(0)


class Broken(Device, id=63):
    """Its handler has a defect, while `defect` is set."""

    defect = True

    @queue(size=16)
    def requestq(self, vq: VirtQueue) -> None:
        for chain in vq:
            if self.defect:
                raise KeyError("no such thing")
            chain.complete()


def ask(driver_queue: object, data: bytes) -> bytes:
    buffer = driver_queue.add(data, len(data))  # type: ignore[attr-defined]
    driver_queue.kick()  # type: ignore[attr-defined]
    answer: bytes = buffer.wait()
    return answer


def test_queues_have_the_order_and_the_sizes_of_the_class(guest: Guest) -> None:
    driver = guest.plug(Echo())
    assert [q.name for q in driver.queues] == ["echoq", "backwardsq"]
    assert [q.ring.size for q in driver.queues] == [8, 16]
    assert driver.common.num_queues == 2


def test_each_queue_has_its_own_handler(guest: Guest) -> None:
    driver = guest.plug(Echo())
    assert ask(driver.echoq, b"abc") == b"abc"
    assert ask(driver.backwardsq, b"abc") == b"cba"


def test_a_subclass_adds_queues_behind_those_of_its_base(guest: Guest) -> None:
    class More(Echo):
        """One more queue."""

        @queue(size=4)
        def extraq(self, vq: VirtQueue) -> None:
            for chain in vq:
                chain.write(b"extra")
                chain.complete()

    driver = guest.plug(More())
    assert [q.name for q in driver.queues] == ["echoq", "backwardsq", "extraq"]
    buffer = driver.extraq.add(writable=8)
    driver.extraq.kick()
    assert buffer.wait() == b"extra"


@pytest.mark.parametrize("size", [0, 1, 3, 2048])
def test_a_queue_size_that_no_ring_can_have_is_refused(size: int) -> None:
    class Odd(Device, id=63):
        """A queue of a size that does not exist."""

        @queue(size=size)
        def oddq(self, vq: VirtQueue) -> None: ...

    with Guest() as guest, pytest.raises(ConfigError, match=rf": \w+\.oddq has size {size}; allowed are powers"):
        guest.plug(Odd())


def test_activate_sees_the_agreed_features_and_reset_the_end(guest: Guest) -> None:
    device = Echo()
    driver = guest.plug(device)
    assert device.features == driver.features
    assert device.resets == 0
    driver.reset()
    assert device.resets == 1
    guest.unplug(driver)
    assert device.resets == 1


def test_completion_in_any_order_and_from_any_thread(guest: Guest) -> None:
    device = Keeper()
    driver = guest.plug(device)
    buffers = [driver.requestq.add(bytes([n]), 8) for n in range(8)]
    driver.requestq.kick()
    chains = [device.take() for _ in buffers]

    def answer(chain: Chain) -> None:
        chain.write(chain.read() * 3)
        chain.complete()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(answer, reversed(chains)))
    assert [buffer.wait() for buffer in buffers] == [bytes([n]) * 3 for n in range(8)]


def test_completion_from_a_pool_the_way_the_guide_shows(guest: Guest) -> None:
    class LookUp(Device, id=63):
        """Answers from a pool of threads."""

        def __init__(self, pool: ThreadPoolExecutor) -> None:
            self.pool = pool

        @queue(size=64)
        def requestq(self, vq: VirtQueue) -> None:
            for chain in vq:
                self.pool.submit(self.answer, chain)

        def answer(self, chain: Chain) -> None:
            chain.write(chain.read().upper())
            chain.complete()

    with ThreadPoolExecutor(2) as pool:
        driver = guest.plug(LookUp(pool))
        for n in range(50):
            assert ask(driver.requestq, b"word %d" % n) == b"WORD %d" % n


def test_a_chain_is_stale_after_the_reset_and_the_new_driver_sees_nothing_of_it(guest: Guest) -> None:
    device = Keeper()
    driver = guest.plug(device)
    driver.requestq.add(b"old", 8)
    driver.requestq.kick()
    chain = device.take()
    driver.start()
    fresh = driver.requestq.add(b"new", 8)
    driver.requestq.kick()
    new_chain = device.take()
    with guest.only_writes():
        for touch in (chain.read, chain.complete, lambda: chain.write(b"late"), lambda: chain.readable):
            with pytest.raises(StaleChain):
                touch()
    new_chain.write(b"answer")
    new_chain.complete()
    assert fresh.wait() == b"answer"


def test_a_second_completion_is_an_error_and_harms_nobody(guest: Guest) -> None:
    device = Keeper()
    driver = guest.plug(device)
    first = driver.requestq.add(b"x", 1)
    driver.requestq.kick()
    chain = device.take()
    chain.complete()
    with pytest.raises(RuntimeError):
        chain.complete()
    first.wait()
    second = driver.requestq.add(b"y", 1)
    driver.requestq.kick()
    device.take().complete()
    second.wait()
    assert driver.requestq.strays == []


def test_a_defect_in_a_handler_breaks_the_device_until_its_reset(
    guest: Guest, caplog: pytest.LogCaptureFixture
) -> None:
    device = Broken()
    driver, other = guest.plug(device), guest.plug(Echo())
    driver.requestq.add(b"x", 1)
    driver.requestq.kick()
    assert "KeyError" in driver.wait_needs_reset()
    assert "no such thing" in caplog.text
    assert "Traceback" in caplog.text
    assert "broken0: needs a reset" in caplog.text
    assert ask(other.echoq, b"still here") == b"still here"
    device.defect = False
    driver.start()
    assert ask(driver.requestq, b"x") == b""


def test_a_broken_device_takes_no_chain(guest: Guest) -> None:
    device = Broken()
    driver = guest.plug(device)
    driver.requestq.add(b"x", 1)
    driver.requestq.kick()
    driver.wait_needs_reset()
    device.defect = False
    before = driver.function.dataplane.queues[0].counters["chains"]
    driver.requestq.add(b"x", 1)
    driver.requestq.publish()
    driver.requestq.notify()
    assert driver.requestq.ring.used_idx == 0
    assert driver.function.dataplane.queues[0].counters["chains"] == before


def test_a_receive_queue_keeps_buffers_until_there_is_something_to_say(guest: Guest) -> None:
    class Sender(Device, id=63):
        """Takes a chain only when it has a message."""

        def __init__(self) -> None:
            self.messages: list[bytes] = []
            self.calls = 0

        @queue(size=8)
        def rxq(self, vq: VirtQueue) -> None:
            self.calls += 1
            while self.messages:
                chain = next(vq)
                chain.write(self.messages.pop(0))
                chain.complete()

    device = Sender()
    driver = guest.plug(device)
    buffers = [driver.rxq.add(writable=16) for _ in range(2)]
    driver.rxq.kick()
    device.messages.append(b"hello")
    driver.rxq.notify()
    assert buffers[0].wait() == b"hello"
    assert not buffers[1].done
    assert device.calls < 20


def test_a_handler_never_runs_twice_at_once(guest: Guest) -> None:
    class Slow(Device, id=63):
        """Notices when it is entered twice."""

        def __init__(self) -> None:
            self.inside = 0
            self.worst = 0

        @queue(size=64)
        def requestq(self, vq: VirtQueue) -> None:
            self.inside += 1
            self.worst = max(self.worst, self.inside)
            time.sleep(0.001)
            for chain in vq:
                chain.complete()
            self.inside -= 1

    device = Slow()
    driver = guest.plug(device)
    buffers = [driver.requestq.add(writable=1) for _ in range(32)]
    driver.requestq.publish()
    vcpus = [threading.Thread(target=driver.requestq.notify) for _ in range(8)]
    for vcpu in vcpus:
        vcpu.start()
    for vcpu in vcpus:
        vcpu.join()
    for buffer in buffers:
        buffer.wait()
    assert device.worst == 1


def test_unpack_reads_across_descriptors_and_refuses_a_short_chain(guest: Guest) -> None:
    class Adder(Device, id=63):
        """Adds two numbers."""

        @queue(size=8)
        def requestq(self, vq: VirtQueue) -> None:
            for chain in vq:
                first, second = chain.unpack("<HI")
                chain.write((int(first) + int(second)).to_bytes(8, "little"))
                chain.complete()

    driver = guest.plug(Adder())
    buffer = driver.requestq.add([b"\x01", b"\x00\x02\x00", b"\x00\x00"], 8)
    driver.requestq.kick()
    assert buffer.wait() == (3).to_bytes(8, "little")
    driver.requestq.add(b"\x01", 8)
    driver.requestq.kick()
    driver.wait_needs_reset()


def test_in_flight_and_counters_tell_what_happened(guest: Guest) -> None:
    device = Keeper()
    driver = guest.plug(device)
    vq = driver.function.dataplane.queues[0]
    buffers = [driver.requestq.add(writable=1) for _ in range(3)]
    driver.requestq.kick()
    chains = [device.take() for _ in buffers]
    assert vq.in_flight == 3
    assert vq.counters["chains"] == 3
    for chain, buffer in zip(chains, buffers, strict=True):
        chain.complete()
        buffer.wait()
    assert vq.in_flight == 0
    assert vq.counters["interrupts"] == driver.requestq.interrupts == 3
