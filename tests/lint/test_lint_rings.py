"""Each rule of a ring, broken once; and a driver that breaks none, whatever it is like."""

from collections.abc import Callable
from weakref import WeakSet

import pytest

from pyvirtio import Device, VirtQueue, queue
from pyvirtio.backends.block import Memory
from pyvirtio.devices.blk import Blk
from pyvirtio.spec import Feature
from pyvirtio.testing import Guest, Queue
from pyvirtio.testing.blk import Disk
from pyvirtio.testing.packed import AVAIL, USED, PackedRing
from pyvirtio.testing.ring import INDIRECT, NEXT, WRITE, Desc, linked

BUFFER = 0x9_0000
RING = 8
keepers: "WeakSet[Keeper]" = WeakSet()
"""The device of the test that runs."""


class Keeper(Device, id=4):
    """Completes nothing until it is told to."""

    def __init__(self) -> None:
        self.chains: list[object] = []
        keepers.add(self)

    @queue(size=RING)
    def requestq(self, vq: VirtQueue) -> None:
        self.chains.extend(vq)


def offer(vq: Queue, *descs: Desc) -> None:
    for index, desc in enumerate(descs):
        vq.ring.write_desc(index, desc)
    vq.ring.offer(0)
    vq.kick()


def table(vq: Queue, *descs: Desc, flags: int = INDIRECT, length: int | None = None) -> None:
    address, size = vq.place_table(descs)
    offer(vq, Desc(address, size if length is None else length, flags, 1), Desc(BUFFER, 4))


def twice(vq: Queue) -> None:
    offer(vq, Desc(BUFFER, 4, WRITE))
    vq.ring.offer(0)
    vq.kick()


def jump(vq: Queue, to: int) -> None:
    offer(vq, Desc(BUFFER, 4, WRITE))
    vq.polling = True
    vq.wait_until(lambda: any(keeper.chains for keeper in keepers), "the device has the buffer")
    vq.ring.next_avail = to
    vq.kick()


BROKEN: dict[str, tuple[str, Callable[[Queue], object]]] = {
    "a flag that does not exist": ("2.7.5", lambda vq: offer(vq, Desc(BUFFER, 4, 0x10))),
    "not in RAM": ("2.7.5", lambda vq: offer(vq, Desc(1 << 40, 4))),
    "next past the table": ("2.7.5", lambda vq: offer(vq, Desc(BUFFER, 4, NEXT, RING))),
    "readable after writable": ("2.7.4.2", lambda vq: offer(vq, Desc(BUFFER, 4, WRITE | NEXT, 1), Desc(BUFFER, 4))),
    "a loop": ("2.7.5.2", lambda vq: offer(vq, Desc(BUFFER, 4, NEXT, 1), Desc(BUFFER, 4, NEXT, 0))),
    "too long": ("2.7.5.2", lambda vq: offer(vq, Desc(0, 2**32 - 1, NEXT, 1), Desc(0, 2**32 - 1))),
    "a table of 15 bytes": ("2.7.5.3", lambda vq: table(vq, Desc(BUFFER, 4), length=15)),
    "a table with next": ("2.7.5.3.1", lambda vq: table(vq, Desc(BUFFER, 4), flags=INDIRECT | NEXT)),
    "a table in a table": ("2.7.5.3.1", lambda vq: table(vq, Desc(BUFFER, 16, INDIRECT))),
    "a table longer than the queue": (
        "2.7.5.3.1",
        lambda vq: table(vq, *linked([Desc(BUFFER, 1)] * (RING + 1), range(RING + 1))),
    ),
    "a buffer in flight made available again": ("3.3.1", twice),
    "avail goes back": ("2.7.6.1", lambda vq: jump(vq, 0)),
    "avail goes ahead": ("2.7.13.3", lambda vq: jump(vq, RING + 3)),
}


@pytest.mark.guest(transport=("modern", "legacy", "vhost-user"), lint=True)
@pytest.mark.parametrize("rule", BROKEN)
def test_a_driver_that_breaks_a_rule_is_told_which(guest: Guest, rule: str) -> None:
    assert guest.lint is not None
    section, break_it = BROKEN[rule]
    driver = guest.plug(Keeper())
    driver.may_break = True
    break_it(driver.requestq)
    driver.start()
    found = guest.lint.take()
    assert {violation.who for violation in found} == {"driver"}
    assert section in {violation.section for violation in found}
    assert all(str(violation).startswith("keeper0: driver: requestq: ") for violation in found)


@pytest.mark.guest(lint=True)
def test_an_indirect_table_that_was_not_agreed(guest: Guest) -> None:
    assert guest.lint is not None
    driver = guest.plug(Keeper(), features=~int(Feature.INDIRECT_DESC))
    driver.may_break = True
    table(driver.requestq, Desc(BUFFER, 4))
    driver.wait_needs_reset()
    assert [violation.section for violation in guest.lint.take()] == ["2.7.5.3.1"]


@pytest.mark.guest(lint=True, ioeventfd=False)
def test_a_device_that_writes_nonsense_into_the_used_ring(guest: Guest) -> None:
    assert guest.lint is not None
    vq = guest.plug(Keeper()).requestq
    buffer = vq.add(b"readable", writable=16)
    vq.kick()
    ring = vq.ring
    for slot, (head, length) in enumerate([(buffer.head, 17), (buffer.head, 4)]):
        entry = ring.used + 4 + 8 * slot
        guest.memory.write(entry, head.to_bytes(4, "little") + length.to_bytes(4, "little"))
    ring.used_idx = 2
    assert [(violation.who, violation.section, violation.text) for violation in guest.lint.take()] == [
        ("device", "2.7.8.2", "requestq: used length 17 of a buffer with 16 device-writable bytes"),
        ("device", "2.7.8", f"requestq: a used element of buffer {buffer.head}, which is not in flight"),
    ]
    ring.used_idx = 2 + RING + 1
    assert [violation.section for violation in guest.lint.take()] == ["2.7.8"]


@pytest.mark.guest(lint=True, ioeventfd=False)
@pytest.mark.parametrize("event_idx", [False, True])
def test_a_notification_that_nobody_asked_for(guest: Guest, event_idx: bool) -> None:
    assert guest.lint is not None
    vq = guest.plug(Keeper(), event_idx=event_idx).requestq
    vq.add(writable=4)
    vq.kick()
    assert guest.lint.take() == []
    if not event_idx:
        vq.ring.used_flags = 1
    vq.notify()
    assert [violation.section for violation in guest.lint.take()] == ["2.7.10.1"]


@pytest.mark.guest(lint=True, ioeventfd=False)
@pytest.mark.parametrize("event_idx", [False, True])
def test_flags_that_do_not_go_with_the_features(guest: Guest, event_idx: bool) -> None:
    assert guest.lint is not None
    vq = guest.plug(Keeper(), event_idx=event_idx).requestq
    vq.ring.avail_flags = 2 - event_idx
    vq.add(writable=4)
    vq.kick()
    vq.ring.avail_flags = 0
    assert [violation.section for violation in guest.lint.take()] == ["2.7.7.1"]


both = (False, True)
every_ring = pytest.mark.guest(transport=("modern", "legacy", "vhost-user"), indirect=both, packed=both, lint=True)


@every_ring
@pytest.mark.parametrize("in_order", [False, True], ids=["any-order", "in-order"])
@pytest.mark.parametrize("event_idx", [False, True], ids=["flags", "event_idx"])
def test_a_sound_driver_and_a_sound_device_are_clean(guest: Guest, event_idx: bool, in_order: bool) -> None:
    assert guest.lint is not None
    device = Blk(Memory(1 << 20), num_queues=2)
    driver = guest.plug(device, event_idx=event_idx, in_order=in_order, queue_size=8)
    disk = Disk(driver)
    for n in range(40):
        disk.write(n, bytes([n]) * 512, queue=n % 2)
        requests = [disk.submit(0, sector, room=512, queue=n % 2) for sector in (n, n + 1)]
        assert [request.wait() for request in requests] == [0, 0]
    driver.start()
    disk = Disk(driver)
    disk.flush()
    assert guest.lint.take() == []


@pytest.mark.guest(lint=True, ioeventfd=False)
def test_a_ring_that_somebody_else_serves_is_left_alone(guest: Guest) -> None:
    assert guest.lint is not None
    vq = guest.plug(Keeper()).requestq
    for _ in range(3):
        vq.add(writable=16)
    vq.publish()
    vq.ring.used_idx = 2  # as if vhost had served two
    assert guest.lint.take() == []
    vq.ring.used_idx = 7
    assert guest.lint.take() == []


def offer_list(vq: Queue, *descs: Desc, id_: int = 0) -> None:
    assert isinstance(vq.ring, PackedRing)
    vq.ring.offer(descs, id_)
    vq.kick()


def packed_table(vq: Queue, *descs: Desc, flags: int = INDIRECT, length: int | None = None) -> None:
    address, size = vq.place_table(descs)
    offer_list(vq, Desc(address, size if length is None else length, flags))


def half_a_list(vq: Queue) -> None:
    vq.ring.write_desc(0, Desc(BUFFER, 4, NEXT | AVAIL))
    vq.notify()


def same_id(vq: Queue) -> None:
    offer_list(vq, Desc(BUFFER, 4, WRITE))
    offer_list(vq, Desc(BUFFER, 4, WRITE))


BROKEN_PACKED: dict[str, tuple[str, Callable[[Queue], object]]] = {
    "a flag that does not exist": ("2.8.13", lambda vq: offer_list(vq, Desc(BUFFER, 4, 0x10))),
    "not in RAM": ("2.8.13", lambda vq: offer_list(vq, Desc(1 << 40, 4))),
    "readable after writable": ("2.8.17", lambda vq: offer_list(vq, Desc(BUFFER, 4, WRITE), Desc(BUFFER, 4))),
    "half of a list": ("2.8.17", half_a_list),
    "too long": ("2.8.5", lambda vq: offer_list(vq, Desc(0, 2**32 - 1), Desc(0, 2**32 - 1))),
    "a table of 15 bytes": ("2.8.7", lambda vq: packed_table(vq, Desc(BUFFER, 4), length=15)),
    "a table in a list": ("2.8.19", lambda vq: offer_list(vq, Desc(BUFFER, 16, INDIRECT), Desc(BUFFER, 4))),
    "a table in a table": ("2.8.19", lambda vq: packed_table(vq, Desc(BUFFER, 16, INDIRECT))),
    "an id in flight made available again": ("2.8.16", same_id),
}


@pytest.mark.guest(transport=("modern", "vhost-user"), packed=True, lint=True)
@pytest.mark.parametrize("rule", BROKEN_PACKED)
def test_a_driver_that_breaks_a_rule_of_packed_rings_is_told_which(guest: Guest, rule: str) -> None:
    assert guest.lint is not None
    section, break_it = BROKEN_PACKED[rule]
    driver = guest.plug(Keeper())
    driver.may_break = True
    break_it(driver.requestq)
    driver.start()
    found = guest.lint.take()
    assert {violation.who for violation in found} == {"driver"}
    assert section in {violation.section for violation in found}


@pytest.mark.guest(lint=True, packed=True, ioeventfd=False)
def test_a_device_that_writes_nonsense_into_a_packed_ring(guest: Guest) -> None:
    assert guest.lint is not None
    vq = guest.plug(Keeper()).requestq
    for _ in range(2):
        vq.add(b"readable", writable=16)
    vq.kick()
    vq.ring.write_desc(0, Desc(0, 17, AVAIL | USED | WRITE, 0))
    vq.ring.write_desc(2, Desc(0, 0, AVAIL | USED, 7))
    assert [(violation.who, violation.section, violation.text) for violation in guest.lint.take()] == [
        ("device", "2.8.4", "requestq: used length 17 of a buffer with 16 device-writable bytes"),
        ("device", "2.8.22", "requestq: a used descriptor of buffer 7, which is not in flight"),
    ]
