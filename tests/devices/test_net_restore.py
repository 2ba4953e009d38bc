"""A network device in a pause and in another process: what the driver has asked for stands, and rings go on."""

import struct

import pytest
from wire import Wire

from pyvirtio.devices.net import Net
from pyvirtio.spec import NetFeature
from pyvirtio.testing import Guest
from pyvirtio.testing.net import NEEDS_CSUM, Header, Nic, frame
from pyvirtio.testing.queue import HANG

OK = 0
RX, MAC, MQ, OFFLOADS = 0, 1, 4, 5
OWN, OTHER, GROUP = (bytes.fromhex(text) for text in ("525400000001", "525400000002", "333300000001"))


def card(guest: Guest, pairs: int = 1, **properties: object) -> tuple[Wire, Nic]:
    wire = Wire(pairs)
    driver = guest.plug(Net(wire, mac="52:54:00:00:00:01"), **properties)  # type: ignore[arg-type]
    return wire, Nic(driver, driver.features)


def go_on(nic: Nic) -> Wire:
    """The driver goes on with a fresh device, on a fresh wire."""
    driver = nic.driver
    old = driver.function.device
    wire = Wire(old.pairs)
    driver.restore(Net(wire, mac="52:54:00:00:00:99"), driver.save())
    return wire


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_frames_go_on_in_both_directions(guest: Guest, packed: bool) -> None:
    wire, nic = card(guest, packed=packed)
    for _ in range(2):
        for number in range(300):
            nic.post()
            wire.put(frame(number))
            assert nic.receive().frame == frame(number)
            nic.send(frame(number)).wait()
            assert wire.take()[1] == frame(number)
        nic.post(count=5)
        wire = go_on(nic)
        for number in range(5):
            wire.put(frame(number))
            assert nic.receive().frame == frame(number)


def test_what_the_driver_asked_for_stands(guest: Guest) -> None:
    wire, nic = card(guest, pairs=2)
    table = struct.pack("<I", 0) + struct.pack("<I", 1) + GROUP
    assert nic.command(RX, 0, b"\0") == nic.command(MAC, 0, table) == OK
    assert nic.command(MQ, 0, b"\2\0") == OK
    csum = int(NetFeature.GUEST_CSUM)
    assert nic.command(OFFLOADS, 0, struct.pack("<Q", csum)) == OK
    nic.post(count=8)
    nic.post(queue=1)
    wire = go_on(nic)
    assert (wire.active, wire.offloads[-1]) == ([1, 2], csum)
    for number, to in enumerate((OWN, OTHER, GROUP)):
        wire.put(frame(number, to=to), Header(NEEDS_CSUM, csum_start=34, csum_offset=16))
    assert [nic.receive().frame for _ in range(2)] == [frame(0, to=OWN), frame(2, to=GROUP)]
    wire.put(frame(5, to=OWN), pair=1)
    assert nic.receive(queue=1).frame == frame(5, to=OWN)


def test_the_address_is_the_one_it_had(guest: Guest) -> None:
    _, nic = card(guest)
    go_on(nic)
    assert bytes(nic.driver.function.device.mac) == OWN


def test_a_cable_that_was_out_is_out(guest: Guest) -> None:
    wire, nic = card(guest)
    nic.driver.function.device.set_link(False)
    nic.post(count=2)
    wire = go_on(nic)
    wire.put(frame(1))
    nic.send(frame(2)).wait()
    device = nic.driver.function.device
    assert device.plane.counters["tx_dropped_link"] == 1
    device.set_link(True)
    wire.put(frame(3))
    while (received := nic.receive().frame) != frame(3):
        assert received == frame(1), "nobody had looked at it while the cable was out"


def test_a_driver_that_starts_anew_starts_from_nothing(guest: Guest) -> None:
    """A restored state is for the driver that it was of."""
    _, nic = card(guest)
    assert nic.command(RX, 0, b"\0") == OK
    nic.driver.reset()
    wire = go_on(nic)
    nic.driver.start()
    nic = Nic(nic.driver, nic.driver.features)
    nic.post()
    wire.put(frame(1, to=OTHER))
    assert nic.receive().frame == frame(1, to=OTHER)


def test_nothing_arrives_in_a_pause_and_everything_after_it(guest: Guest) -> None:
    wire, nic = card(guest)
    notifiers = nic.driver.function.dataplane.notifiers
    nic.post(count=250)
    for number in range(50):
        notifiers.hold()
        with guest.only_writes():
            for each in range(5):
                wire.put(frame(5 * number + each))
        notifiers.unhold()
        for each in range(5):
            assert nic.receive().frame == frame(5 * number + each)
    nic.send(frame(1)).wait(HANG)
