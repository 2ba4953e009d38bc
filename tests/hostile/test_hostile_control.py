"""Commands of a network driver that make no sense: an error is the answer, nothing changes, and the next is served."""

import struct

import pytest
from wire import Wire, device_of

from pyvirtio.devices.net import Net
from pyvirtio.devices.net_control import MAX_COMMAND, MAX_MACS
from pyvirtio.testing import Guest
from pyvirtio.testing.net import ERR, OK, Nic

pytestmark = pytest.mark.guest(
    transport=("modern", "vhost-user"), packed=(False, True), indirect=(False, True), memory=1 << 20
)
PAIRS = 2
RX, MAC, VLAN, ANNOUNCE, MQ, OFFLOADS = range(6)


def count(number: int) -> bytes:
    return struct.pack("<I", number)


COMMANDS: dict[str, tuple[int, int, bytes]] = {
    "an unknown class": (77, 0, b"\0"),
    "the highest class": (255, 255, b"\0"),
    "an unknown command": (RX, 77, b"\0"),
    "nothing to announce": (ANNOUNCE, 0, b""),
    "a mode without a value": (RX, 0, b""),
    "a mode with two values": (RX, 0, b"\0\0"),
    "an address of 5 bytes": (MAC, 1, bytes(5)),
    "an address of 7 bytes": (MAC, 1, bytes(7)),
    "no table": (MAC, 0, b""),
    "one table of two": (MAC, 0, count(0)),
    "half a number": (MAC, 0, b"\0\0"),
    "a table that ends early": (MAC, 0, count(2) + bytes(6) + count(0)),
    "more addresses than memory": (MAC, 0, count(0xFFFFFFFF) + bytes(6) + count(0)),
    "more addresses than fit": (MAC, 0, count(MAX_MACS + 1) + bytes(6 * (MAX_MACS + 1)) + count(0)),
    "bytes behind the tables": (MAC, 0, count(0) + count(0) + b"\0"),
    "a vlan of 1 byte": (VLAN, 0, b"\0"),
    "a vlan that cannot be": (VLAN, 0, struct.pack("<H", 4096)),
    "no queue pairs": (MQ, 0, struct.pack("<H", 0)),
    "more queue pairs than there are": (MQ, 0, struct.pack("<H", PAIRS + 1)),
    "very many queue pairs": (MQ, 0, struct.pack("<H", 0xFFFF)),
    "queue pairs of 1 byte": (MQ, 0, b"\1"),
    "offloads that were not agreed": (OFFLOADS, 0, struct.pack("<Q", 1 << 63)),
    "offloads of 4 bytes": (OFFLOADS, 0, bytes(4)),
    "oversized": (RX, 0, bytes(MAX_COMMAND)),
}


@pytest.fixture
def nic(guest: Guest) -> Nic:
    driver = guest.plug(Net(Wire(PAIRS), mac="52:54:00:00:00:01"))
    return Nic(driver, driver.features)


def still_serves(nic: Nic) -> None:
    assert nic.command(MQ, 0, struct.pack("<H", PAIRS)) == OK
    assert nic.command(MAC, 0, count(0) + count(0)) == OK
    assert nic.driver.why_broken is None


def test_a_command_that_makes_no_sense_is_an_error_and_changes_nothing(nic: Nic) -> None:
    before = device_of(nic.driver).control.save()
    for what, (class_, command, data) in COMMANDS.items():
        assert nic.command(class_, command, data) == ERR, what
        assert device_of(nic.driver).control.save() == before, what
    still_serves(nic)


@pytest.mark.parametrize("readable", [b"", b"\0"], ids=["nothing", "half"])
def test_less_than_a_command_is_an_error(nic: Nic, readable: bytes) -> None:
    assert nic.control is not None
    buffer = nic.control.add(readable, 1)
    nic.control.kick()
    assert buffer.wait() == bytes([ERR])
    still_serves(nic)


def test_no_room_for_the_answer(nic: Nic) -> None:
    assert nic.control is not None
    buffer = nic.control.add(bytes([RX, 77, 0]))
    nic.control.kick()
    assert buffer.wait() == b""
    still_serves(nic)


def test_a_command_in_pieces_of_a_byte(nic: Nic) -> None:
    assert nic.control is not None
    command = bytes([MQ, 0]) + struct.pack("<H", PAIRS)
    buffer = nic.control.add([command[n : n + 1] for n in range(4)], [1, 1])
    nic.control.kick()
    assert buffer.wait() == bytes([OK])
    still_serves(nic)
