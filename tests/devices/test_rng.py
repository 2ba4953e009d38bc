"""The entropy device, which is also the smallest one: what holds for every device is shown here."""

import os

import pytest

from pyvirtio.devices.rng import Rng
from pyvirtio.testing import Guest, Interface
from pyvirtio.testing.ring import WRITE, Desc


def count_up(length: int) -> bytes:
    return bytes(n % 256 for n in range(length))


def test_one_interrupt_for_a_batch(guest: Guest) -> None:
    rng = guest.plug(Rng(source=bytes))
    buffers = [rng.requestq.add(writable=16) for _ in range(3)]
    rng.requestq.kick()
    assert [buffer.wait() for buffer in buffers] == [bytes(16)] * 3
    assert rng.requestq.interrupts == 1


@pytest.mark.parametrize("transport", ["modern", "legacy"])
@pytest.mark.parametrize("indirect", [False, True], ids=["direct", "indirect"])
@pytest.mark.parametrize("event_idx", [False, True], ids=["flags", "event_idx"])
@pytest.mark.parametrize("msix", [False, True], ids=["intx", "msix"])
def test_many_requests_in_every_way_to_drive_it(
    guest: Guest, transport: Interface, indirect: bool, event_idx: bool, msix: bool
) -> None:
    rng = guest.plug(Rng(source=count_up), transport=transport, indirect=indirect, event_idx=event_idx, msix=msix)
    for length in range(1, 70):
        buffer = rng.requestq.add(writable=[length, 3])
        rng.requestq.kick()
        assert buffer.wait() == count_up(length + 3)
        assert buffer.used_len == length + 3


def test_the_source_is_asked_for_what_fits(guest: Guest) -> None:
    asked = []

    def source(length: int) -> bytes:
        asked.append(length)
        return bytes(length)

    rng = guest.plug(Rng(source))
    buffer = rng.requestq.add(writable=[10, 20])
    rng.requestq.kick()
    buffer.wait()
    assert asked == [30]


def test_a_short_source_is_a_short_answer(guest: Guest) -> None:
    rng = guest.plug(Rng(source=lambda length: b"abc"))
    buffer = rng.requestq.add(writable=16)
    rng.requestq.kick()
    assert buffer.wait() == b"abc"
    assert buffer.used_len == 3


def test_the_default_source_differs_each_time(guest: Guest) -> None:
    rng = guest.plug(Rng())
    first, second = rng.requestq.add(writable=32), rng.requestq.add(writable=32)
    rng.requestq.kick()
    assert first.wait() != second.wait()


def test_a_source_that_cannot_read_breaks_only_this_device(guest: Guest, caplog: pytest.LogCaptureFixture) -> None:
    def source(length: int) -> bytes:
        raise OSError(5, os.strerror(5))

    broken, other = guest.plug(Rng(source)), guest.plug(Rng(source=bytes))
    broken.requestq.add(writable=16)
    broken.requestq.kick()
    assert "Input/output error" in broken.wait_needs_reset()
    assert "rng0: needs a reset" in caplog.text
    buffer = other.requestq.add(writable=16)
    other.requestq.kick()
    assert buffer.wait() == bytes(16)


def test_the_ring_wraps_at_every_size(guest: Guest) -> None:
    for size in (2, 4, 8, 64):
        rng = guest.plug(Rng(source=count_up), queue_size=size)
        assert rng.requestq.ring.size == size
        for _ in range(3 * size + 1):
            buffer = rng.requestq.add(writable=5)
            rng.requestq.kick()
            assert buffer.wait() == count_up(5)
        guest.unplug(rng)


def test_no_interrupt_while_the_driver_wants_none(guest: Guest) -> None:
    rng = guest.plug(Rng(source=bytes), event_idx=False)
    rng.requestq.ring.avail_flags = 1
    rng.requestq.polling = True
    for _ in range(10):
        buffer = rng.requestq.add(writable=16)
        rng.requestq.kick()
        buffer.wait()
    assert rng.requestq.interrupts == 0


def test_a_reset_and_a_second_driver(guest: Guest) -> None:
    rng = guest.plug(Rng(source=bytes))
    for _ in range(20):
        rng.start()
        buffer = rng.requestq.add(writable=16)
        rng.requestq.kick()
        assert buffer.wait() == bytes(16)


def test_a_huge_request_is_served_with_64_kib(guest: Guest) -> None:
    """Descriptors may overlap, so a small guest can describe a huge chain."""
    asked = []

    def source(length: int) -> bytes:
        asked.append(length)
        return b"\x17" * length

    rng = guest.plug(Rng(source))
    q, size = rng.requestq, 1 << 20
    q.ring.add([Desc(guest.border, size, WRITE)] * 64)
    with guest.only_writes((guest.border, Rng.MAX_BYTES), q.ring.used_range, (q.ring.avail, 134)):
        q.kick()
        q.wait_until(lambda: bool(q.strays), "it is served")
    assert asked == [Rng.MAX_BYTES]
    assert q.strays == [(0, Rng.MAX_BYTES)]
