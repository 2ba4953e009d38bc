"""Split or packed, in order or not: what is offered, and that a ring goes on where it was."""

import pytest
from attack import Keeper
from notified import Echo, echo

from pyvirtio.devices.rng import Rng
from pyvirtio.errors import ConfigError
from pyvirtio.spec import Feature, Status
from pyvirtio.testing import Guest
from pyvirtio.testing.packed import PackedRing
from pyvirtio.testing.pci import BUS_MASTER
from pyvirtio.testing.ring import SplitRing

RINGS = pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])


def test_packed_rings_are_offered_if_asked_for(guest: Guest) -> None:
    assert not guest.plug(Rng(), start=False).registers.offered() & (Feature.RING_PACKED | Feature.IN_ORDER)
    offered = guest.plug(Rng(), start=False, packed=True, in_order=True).registers.offered()
    assert offered & Feature.RING_PACKED
    assert offered & Feature.IN_ORDER


def test_the_driver_decides(guest: Guest) -> None:
    assert isinstance(guest.plug(Rng(), packed=True).requestq.ring, PackedRing)
    declined = guest.plug(Rng(), packed=True, features=~int(Feature.RING_PACKED))
    assert isinstance(declined.requestq.ring, SplitRing)


def test_a_legacy_driver_has_split_rings(guest: Guest) -> None:
    rng = guest.plug(Rng(), transport="legacy", packed=True, in_order=True)
    assert isinstance(rng.requestq.ring, SplitRing)
    buffer = rng.requestq.add(writable=8)
    rng.requestq.kick()
    assert len(buffer.wait()) == 8


def test_packed_without_the_modern_interface_is_a_mistake(guest: Guest) -> None:
    with pytest.raises(ConfigError, match="packed with disable-modern"):
        guest.plug(Rng(), packed=True, disable_modern=True, start=False)


@pytest.mark.parametrize(("packed", "sizes"), [(False, [16, 16, 4]), (True, [16, 7, 5])], ids=["split", "packed"])
def test_a_packed_ring_may_have_any_size(guest: Guest, packed: bool, sizes: list[int]) -> None:
    """What is no size leaves the register as it was."""
    driver = guest.plug(Echo(), packed=packed, start=False)
    driver.negotiate()
    read = [driver.registers.set_queue_size(0, size) for size in (16, 7, 5 if packed else 4)]
    assert read == sizes
    driver.set_up()
    driver.status |= Status.DRIVER_OK
    assert [echo(driver.echoq) for _ in range(3 * sizes[-1])] == [b"hello"] * 3 * sizes[-1]


@RINGS
def test_a_ring_goes_on_where_bus_mastering_left_it(guest: Guest, packed: bool) -> None:
    driver = guest.plug(Echo(), packed=packed, queue_size=8)
    command = driver.pci.command
    for n in range(40):
        assert echo(driver.echoq) == b"hello"
        if n % 3 == 0:
            driver.pci.command = command & ~BUS_MASTER
            driver.pci.command = command


@RINGS
@pytest.mark.parametrize("indirect", [False, True], ids=["direct", "indirect"])
def test_in_order_whatever_the_order_of_completion(guest: Guest, packed: bool, indirect: bool) -> None:
    device = Keeper()
    driver = guest.plug(device, packed=packed, in_order=True, indirect=indirect)
    q = driver.requestq
    for _ in range(20):
        buffers = [q.add(b"x", [4, 4]) for _ in range(4)]
        q.kick()
        chains = [device.take() for _ in range(4)]
        for n in (2, 3, 1):
            chains[n].write(b"%d" % n * (8 if n < 3 else 5))
            chains[n].complete()
        driver.take_interrupts()
        assert not any(buffer.done for buffer in buffers)
        chains[0].complete()
        assert [buffer.wait() for buffer in buffers] == [b"", b"1" * 8, b"2" * 8, b"3" * 5]
        assert [buffer.used_len for buffer in buffers] == [0, 8, 8, 5]
    assert not q.strays
