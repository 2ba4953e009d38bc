"""The buffers of a request in place: what a handler reads and writes without a copy."""

from collections.abc import Callable
from queue import Queue

import pytest

from pyvirtio import Chain, Device, VirtQueue, queue
from pyvirtio.testing import Guest
from pyvirtio.testing.queue import HANG


class Worker(Device, id=63):
    """Does `work` with each chain."""

    def __init__(self, work: Callable[[Chain], object]) -> None:
        self.work = work

    @queue(size=16)
    def requestq(self, vq: VirtQueue) -> None:
        for chain in vq:
            self.work(chain)
            chain.complete()


def test_buffers_are_the_pieces_of_the_chain_in_place(guest: Guest) -> None:
    def reverse(chain: Chain) -> None:
        (first, second), (room,) = chain.buffers()
        assert first.readonly
        room[:5] = bytes(first)[::-1] + bytes(second)[::-1]
        chain.wrote(5)

    driver = guest.plug(Worker(reverse))
    buffer = driver.requestq.add([b"abc", b"de"], 8)
    driver.requestq.kick()
    assert buffer.wait() == b"cbaed"
    assert buffer.used_len == 5


def test_buffers_pass_over_what_is_left(guest: Guest) -> None:
    seen: list[object] = []

    def header_first(chain: Chain) -> None:
        seen.append(chain.unpack("<H"))
        chain.write(b"ok")
        readable, writable = chain.buffers()
        seen.append([bytes(view) for view in readable])
        seen.append([len(view) for view in writable])
        seen.append((chain.readable, chain.writable, chain.buffers()))

    driver = guest.plug(Worker(header_first))
    buffer = driver.requestq.add(b"\x01\x02rest", 8)
    driver.requestq.kick()
    assert buffer.wait() == b"ok"
    assert seen == [(0x0201,), [b"rest"], [6], (0, 0, ([], []))]


def test_buffers_end_with_the_handler(guest: Guest) -> None:
    kept: list[memoryview] = []

    def keep(chain: Chain) -> None:
        readable, writable = chain.buffers()
        kept.extend((*readable, *writable))
        readable.clear()

    driver = guest.plug(Worker(keep))
    buffer = driver.requestq.add(b"abc", 8)
    driver.requestq.kick()
    buffer.wait()
    for view in kept:
        with pytest.raises(ValueError, match="released"):
            view[0]


def test_only_the_handler_gets_buffers(guest: Guest) -> None:
    kept: Queue[Chain] = Queue()

    class Keeper(Device, id=63):
        """Keeps its chains."""

        @queue(size=16)
        def requestq(self, vq: VirtQueue) -> None:
            for chain in vq:
                kept.put(chain)

    driver = guest.plug(Keeper())
    buffer = driver.requestq.add(b"abc", 8)
    driver.requestq.kick()
    chain = kept.get(timeout=HANG)
    with pytest.raises(RuntimeError, match=r"^buffers\(\) is for the handler while it runs"):
        chain.buffers()
    chain.complete()
    buffer.wait()


def test_no_more_is_counted_than_there_was_room_for(guest: Guest) -> None:
    refused: list[str] = []

    def exaggerate(chain: Chain) -> None:
        chain.write(b"abc")
        chain.buffers()
        chain.wrote(4)
        with pytest.raises(ValueError, match="room for 1 bytes") as caught:
            chain.wrote(2)
        refused.append(str(caught.value))

    driver = guest.plug(Worker(exaggerate))
    buffer = driver.requestq.add(writable=8)
    driver.requestq.kick()
    buffer.wait()
    assert buffer.used_len == 7
    assert refused == ["wrote(2): buffers() gave room for 1 bytes"]
