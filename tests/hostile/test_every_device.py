"""Every type of device under attack, in each kind of ring: it asks for a reset or copes, and then it serves again."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from attack import Placing

from pyvirtio.backends.block import File, Memory
from pyvirtio.backends.chardev import Null
from pyvirtio.backends.net import NetBackend
from pyvirtio.device import Device
from pyvirtio.devices import DEVICES, load
from pyvirtio.devices.blk import Blk
from pyvirtio.devices.console import Console
from pyvirtio.devices.net import Net
from pyvirtio.spec import Feature
from pyvirtio.testing import Guest, VirtioDriver
from pyvirtio.testing.queue import Queue
from pyvirtio.testing.ring import INDIRECT, NEXT, WRITE, Desc

pytestmark = pytest.mark.guest(
    transport=("modern", "legacy", "vhost-user"), packed=(False, True), memory=1 << 20, ioeventfd=(False, True)
)
MIB = 1 << 20


def raw_file(directory: Path) -> Device:
    (directory / "disk.img").write_bytes(bytes(MIB))
    return Blk(File(directory / "disk.img"))


MADE: dict[str, Callable[[Path], Device]] = {
    "blk": lambda _: Blk(Memory(MIB)),
    "blk, a raw file": raw_file,
    "console": lambda _: Console(Null(), ports=[Null("port")]),
    "net": lambda _: Net(NetBackend()),
}
"""Devices that need something to be made with."""
IDLE = ("receiveq", "statsq")
"""How the queues are called that a device may look at only when it has something to say."""
OUTSIDE = 1 << 45
AT = 0x8000
"""RAM that nobody uses."""

Row = Callable[[Placing], object]

IN_RING_OR_TABLE: dict[str, list[Desc]] = {
    "outside RAM": [Desc(OUTSIDE, 16, WRITE)],
    "in a hole": [Desc(0x80000000, 16)],
    "address wraps": [Desc(2**64 - 8, 16, WRITE)],
    "longer than 2^32": [Desc(AT, 16, NEXT, 1), Desc(AT, 2**32 - 1)],
    "readable after writable": [Desc(AT, 16, WRITE | NEXT, 1), Desc(AT, 16)],
}
IN_SPLIT_RING_OR_TABLE: dict[str, list[Desc]] = {
    "its own next": [Desc(AT, 16, NEXT, 0)],
    "a loop": [Desc(AT, 16, NEXT, 1), Desc(AT, 16, NEXT, 0)],
    "next past the table": [Desc(AT, 16, NEXT, 0xFFF0)],
    "all ones": [Desc(2**64 - 1, 2**32 - 1, 0xFFFF, 0xFFFF)],
}
TABLES: dict[str, Row] = {
    "a table of no bytes": lambda at: at.offer(Desc(AT, 0, INDIRECT)),
    "a table of 15 bytes": lambda at: at.offer(Desc(AT, 15, INDIRECT)),
    "a table outside RAM": lambda at: at.offer(Desc(OUTSIDE, 16, INDIRECT)),
    "a table with next": lambda at: at.place_indirect(Desc(AT, 16), flags=INDIRECT | NEXT),
    "a table in a table": lambda at: at.place_indirect(Desc(*at.queue.place_table([Desc(AT, 16)]), INDIRECT)),
    "a table longer than the queue": lambda at: at.offer(Desc(AT, 16 * (at.ring.size + 1), INDIRECT)),
}


def _jump(at: Placing) -> None:
    at.ring.next_avail = at.ring.size + 1


def _available(at: Placing, flags: int) -> None:
    """A packed ring that is available from end to end."""
    for index in range(at.ring.size):
        at.ring.write_desc(index, Desc(AT, 1, flags | 1 << 7))


ONLY_SPLIT: dict[str, Row] = {"a head past the table": lambda at: at.ring.offer(at.ring.size), "avail jumps": _jump}
ONLY_PACKED: dict[str, Row] = {
    "a buffer id past the ring": lambda at: at.ring.offer([Desc(AT, 8, WRITE)], at.ring.size),
    "longer than the ring": lambda at: _available(at, NEXT),
    "all ones": lambda at: at.ring.write_desc(0, Desc(2**64 - 1, 2**32 - 1, 0x7FFF, 0xFFFF)),
    "a table behind another": lambda at: at.ring.offer([Desc(AT, 8), Desc(AT, 16, INDIRECT)], 0),
}


def rows(*, packed: bool) -> dict[str, Row]:
    """What breaks any device, by name."""
    descs = IN_RING_OR_TABLE | ({} if packed else IN_SPLIT_RING_OR_TABLE)
    found = {**(ONLY_PACKED if packed else ONLY_SPLIT), **TABLES}
    found |= {name: partial(_place, descs=chain) for name, chain in descs.items()}
    found |= {f"{name}, in a table": partial(_place_indirect, descs=chain) for name, chain in descs.items()}
    return found


def _place(at: Placing, descs: list[Desc]) -> None:
    at.place(*descs)


def _place_indirect(at: Placing, descs: list[Desc]) -> None:
    at.place_indirect(*descs)


SERVED: dict[str, tuple[str, bytes, int]] = {
    "balloon": ("inflateq", bytes(4), 0),
    "blk": ("requestq", bytes(16), 513),
    "console": ("transmitq0", b"x", 0),
    "net": ("transmitq", bytes(80), 0),
    "rng": ("requestq", b"", 8),
}
"""What each serves in any case: the queue, and a request."""


def serves(driver: VirtioDriver, name: str) -> None:
    """Its driver starts over, and is served."""
    driver.start()
    queue, readable, writable = SERVED[name.partition(",")[0]]
    (vq,) = [vq for vq in driver.queues if vq.name in (queue, f"{queue}0")]
    buffer = vq.add(readable, writable)
    vq.kick()
    buffer.wait()
    assert driver.why_broken is None


def start(driver: VirtioDriver, *, event_idx: bool) -> None:
    driver.features_wanted = ~0 if event_idx else ~int(Feature.EVENT_IDX)
    driver.start()
    assert driver.why_broken is None


def send(at: Placing) -> None:
    at.queue.publish()
    at.queue.notify()


def has_verdict(vq: Queue, driver: VirtioDriver) -> bool:
    return bool(vq.strays or driver.why_broken)


def attacked(driver: VirtioDriver) -> list[int]:
    """The queues that the device looks at whenever they are kicked."""
    driver.start()
    return [vq.index for vq in driver.queues if not any(idle in vq.name for idle in IDLE)]


def placing(driver: VirtioDriver, index: int) -> Placing:
    vq: Queue = driver.queues[index]
    return Placing(vq, in_table=False, packed=driver.guest.packed)


every_device = pytest.mark.parametrize("name", dict.fromkeys([*MADE, *DEVICES]))


def make(name: str, directory: Path) -> Device:
    return MADE[name](directory) if name in MADE else load(name)()


@every_device
def test_what_is_malformed_breaks_the_device_until_it_is_reset(guest: Guest, tmp_path: Path, name: str) -> None:
    """One malformed chain for each reset; the queues, and whether there is EVENT_IDX, take turns."""
    driver = guest.plug(make(name, tmp_path), start=False)
    queues = attacked(driver)
    for number, (row, place) in enumerate(rows(packed=guest.packed).items()):
        start(driver, event_idx=(number + bool(guest.ioeventfd)) % 2 == 0)
        at = placing(driver, queues[number % len(queues)])
        place(at)
        rings = [range_ for vq in driver.queues for range_ in vq.ring.device_ranges]
        with guest.only_writes(*rings, *at.ring.driver_ranges):
            send(at)
            assert at.queue.name in driver.wait_needs_reset(), row
    serves(driver, name)


ODD: dict[str, list[Desc]] = {
    "no bytes": [Desc(AT, 0)],
    "no bytes of what is not there": [Desc(OUTSIDE, 0, WRITE)],
    "one byte": [Desc(AT, 1)],
    "room for one byte": [Desc(AT, 1, WRITE)],
    "a few of each": [Desc(AT, 3, NEXT, 1), Desc(AT, 7, WRITE)],
    "the same half MiB eight times": [Desc(0, MIB // 2, NEXT, n + 1) for n in range(7)] + [Desc(0, MIB // 2)],
    "room in the same quarter MiB eight times": [
        *[Desc(MIB // 2, MIB // 4, NEXT | WRITE, n + 1) for n in range(7)],
        Desc(MIB // 2, MIB // 4, WRITE),
    ],
}


@every_device
def test_what_is_odd_is_served_or_breaks_the_device(guest: Guest, tmp_path: Path, name: str) -> None:
    driver = guest.plug(make(name, tmp_path), start=False)
    for index in attacked(driver):
        for number, descs in enumerate(ODD.values()):
            start(driver, event_idx=(number + bool(guest.ioeventfd)) % 2 == 0)
            at = placing(driver, index)
            driver.may_break = at.queue.polling = True
            at.place(*descs)
            send(at)
            at.queue.wait_until(partial(has_verdict, at.queue, driver), "there is a verdict")
    serves(driver, name)


@every_device
def test_a_reset_in_the_middle_of_anything(guest: Guest, tmp_path: Path, name: str) -> None:
    driver = guest.plug(make(name, tmp_path))
    for index in range(len(driver.queues)):
        for _ in range(2):
            driver.queues[index].add(bytes(16), 64)
            driver.queues[index].kick()
            driver.may_break = True
            driver.start()
    serves(driver, name)
