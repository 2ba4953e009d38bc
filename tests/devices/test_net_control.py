"""The control queue of a network device: what a driver receives, its address, offloads and queue pairs."""

import errno
import os
import struct
from collections.abc import Sequence

import pytest
from wire import Wire, counters, device_of, plug

from pyvirtio.devices.net import Net
from pyvirtio.spec import Feature, NetFeature
from pyvirtio.testing import Guest, VirtioDriver
from pyvirtio.testing.net import ERR, NEEDS_CSUM, OK, TCPV4, Header, Nic, frame

RX, MAC, VLAN, MQ, OFFLOADS = 0, 1, 2, 4, 5
PROMISC, ALLMULTI, ALLUNI, NOMULTI, NOUNI, NOBCAST = range(6)
TABLE_SET, ADDR_SET = 0, 1
ADD, DEL = 0, 1
OWN = bytes.fromhex("525400000001")
OTHER = bytes.fromhex("525400000002")
GROUP = bytes.fromhex("333300000001")
BROADCAST = b"\xff" * 6


class Station:
    """A card on a wire, with its filter on."""

    def __init__(self, guest: Guest, *, features: int = ~0, pairs: int = 1, filtering: bool = True) -> None:
        self.wire = Wire(pairs)
        self.driver: VirtioDriver = guest.plug(Net(self.wire, mac="52:54:00:00:00:01"), features=features)
        self.nic = Nic(self.driver, self.driver.features)
        self.nic.post(count=16)
        if filtering:
            assert self.command(RX, PROMISC, b"\0") == OK

    def command(self, class_: int, command: int, data: bytes = b"") -> int:
        return self.nic.command(class_, command, data)

    def hears(self, *frames: bytes) -> list[bytes]:
        """Which of the frames the driver receives."""
        end = frame(0xEEEE, to=BROADCAST)
        heard = []
        for one in (*frames, end):
            self.wire.put(one)
        while (received := self.nic.receive().frame) != end:
            heard.append(received)
            self.nic.post()
        self.nic.post()
        return heard

    def hears_to(self, *addresses: bytes) -> list[bool]:
        frames = [frame(number, to=to) for number, to in enumerate(addresses)]
        heard = self.hears(*frames)
        return [one in heard for one in frames]


def tables(unicast: Sequence[bytes] = (), multicast: Sequence[bytes] = ()) -> bytes:
    return b"".join(struct.pack("<I", len(table)) + b"".join(table) for table in (unicast, multicast))


def tagged(vlan: int, to: bytes = OWN) -> bytes:
    return to + OTHER + struct.pack(">HHH", 0x8100, vlan, 0x88B5) + bytes(46)


def test_at_first_every_frame_is_received(guest: Guest) -> None:
    station = Station(guest, filtering=False)
    assert station.hears_to(OWN, OTHER, GROUP, BROADCAST) == [True] * 4


def test_a_driver_that_is_not_promiscuous_receives_its_own_frames_and_broadcasts(guest: Guest) -> None:
    station = Station(guest)
    assert station.hears_to(OWN, OTHER, GROUP, BROADCAST) == [True, False, False, True]


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        (PROMISC, [True, True, True]),
        (ALLMULTI, [True, False, True]),
        (ALLUNI, [True, True, False]),
        (NOUNI, [False, False, False]),
    ],
)
def test_a_receive_mode_is_switched_on_and_off(guest: Guest, mode: int, expected: list[bool]) -> None:
    station = Station(guest)
    assert station.command(RX, mode, b"\1") == OK
    assert station.hears_to(OWN, OTHER, GROUP) == expected
    assert station.command(RX, mode, b"\0") == OK
    assert station.hears_to(OWN, OTHER, GROUP) == [True, False, False]


def test_no_multicast_wins_over_all_multicast(guest: Guest) -> None:
    station = Station(guest)
    assert [station.command(RX, mode, b"\1") for mode in (ALLMULTI, NOMULTI)] == [OK, OK]
    assert station.hears_to(GROUP) == [False]


def test_the_tables_are_replaced_as_a_whole(guest: Guest) -> None:
    station = Station(guest)
    assert station.command(MAC, TABLE_SET, tables([OTHER], [GROUP])) == OK
    assert station.hears_to(OWN, OTHER, GROUP) == [True, True, True]
    assert station.command(MAC, TABLE_SET, tables([], [GROUP])) == OK
    assert station.hears_to(OWN, OTHER, GROUP) == [True, False, True]


def test_the_driver_sets_its_address(guest: Guest) -> None:
    station = Station(guest)
    assert station.command(MAC, ADDR_SET, OTHER) == OK
    assert station.hears_to(OWN, OTHER) == [False, True]
    assert station.driver.registers.config.bytes(0, 6) == OTHER
    station.driver.start()
    assert station.driver.registers.config.bytes(0, 6) == OWN, "the reset forgot it"


def test_an_old_driver_sets_its_address_in_the_configuration(guest: Guest) -> None:
    wire = Wire()
    driver = guest.plug(Net(wire), transport="legacy", features=~NetFeature.CTRL_MAC_ADDR)
    for at, byte in enumerate(OTHER):
        driver.registers.config.write(at, 1, byte)
    assert driver.registers.config.bytes(0, 6) == OTHER


def test_a_modern_driver_cannot_write_the_configuration(guest: Guest) -> None:
    station = Station(guest)
    before = station.driver.registers.config.bytes(0, 12)
    for at in range(12):
        station.driver.registers.config.write(at, 1, 0xA5)
    assert station.driver.registers.config.bytes(0, 12) == before


def test_tagged_frames_pass_by_the_vlans_of_the_driver(guest: Guest) -> None:
    station = Station(guest)
    frames = [tagged(vlan) for vlan in (0, 100, 101, 4095)]
    assert station.hears(*frames) == []
    assert [station.command(VLAN, ADD, struct.pack("<H", vlan)) for vlan in (100, 4095)] == [OK, OK]
    assert station.hears(*frames) == [frames[1], frames[3]]
    assert station.command(VLAN, DEL, struct.pack("<H", 100)) == OK
    assert station.hears(*frames) == [frames[3]]


def test_without_the_feature_all_vlans_pass(guest: Guest) -> None:
    station = Station(guest, features=~NetFeature.CTRL_VLAN)
    assert station.hears(tagged(7)) == [tagged(7)]
    assert station.command(VLAN, ADD, b"\7\0") == ERR


def test_what_was_filtered_is_counted(guest: Guest) -> None:
    station = Station(guest)
    station.hears_to(OTHER, GROUP)
    assert counters(station.nic)["rx_dropped_filter"] == 2


def test_a_reset_forgets_the_filter(guest: Guest) -> None:
    station = Station(guest)
    station.driver.start()
    station.nic = Nic(station.driver, station.driver.features)
    station.nic.post(count=8)
    assert station.hears_to(OWN, OTHER, GROUP) == [True] * 3


def test_frames_are_received_on_the_queue_pairs_in_use(guest: Guest) -> None:
    station = Station(guest, pairs=2, filtering=False)
    station.nic.post(count=2, queue=1)
    station.wire.put(frame(1), pair=1)
    station.wire.put(frame(2), pair=0)
    assert station.nic.receive().frame == frame(2)
    assert not any(buffer.done for buffer in station.nic.rx[1].pending.values())
    assert station.command(MQ, 0, struct.pack("<H", 2)) == OK
    assert station.nic.receive(queue=1).frame == frame(1)
    assert station.command(MQ, 0, struct.pack("<H", 1)) == OK
    station.wire.put(frame(3), pair=1)
    station.wire.put(frame(4), pair=0)
    assert station.nic.receive().frame == frame(4)
    assert station.wire.active == [1, 2, 1]


def test_multiqueue_without_a_control_queue_is_all_queue_pairs(guest: Guest) -> None:
    """As a vhost-user front-end does, which answers the control queue itself."""
    features = ~(NetFeature.CTRL_VQ | NetFeature.CTRL_RX | NetFeature.CTRL_VLAN)
    station = Station(guest, pairs=2, features=features, filtering=False)
    assert station.wire.active == [2]
    (queue,) = [queue for queue in station.driver.queues if queue.name == "receiveq1"]
    buffer = queue.add(writable=2048)
    queue.kick()
    station.wire.put(frame(1), pair=1)
    assert buffer.wait()[12:] == frame(1)


def test_a_driver_with_neither_uses_one_queue_pair(guest: Guest) -> None:
    features = ~(NetFeature.MQ | NetFeature.CTRL_VQ | NetFeature.CTRL_RX | NetFeature.CTRL_VLAN)
    assert Station(guest, pairs=2, features=features, filtering=False).wire.active == [1]


def test_offloads_are_switched_off_and_on(guest: Guest) -> None:
    station = Station(guest, filtering=False)
    segment = Header(NEEDS_CSUM, TCPV4, 54, 1448, 34, 16)
    csum = int(NetFeature.GUEST_CSUM)
    assert station.command(OFFLOADS, 0, struct.pack("<Q", csum)) == OK
    station.wire.put(frame(1, 1000), segment)
    station.wire.put(frame(2, 1000), Header(NEEDS_CSUM, csum_start=34, csum_offset=16))
    assert station.nic.receive().frame == frame(2, 1000)
    assert station.command(OFFLOADS, 0, struct.pack("<Q", csum | NetFeature.GUEST_TSO4)) == OK
    station.wire.put(frame(3, 1000), segment)
    assert station.nic.receive().header.gso_type == TCPV4
    assert station.wire.offloads[1:] == [csum, csum | NetFeature.GUEST_TSO4]


def test_switching_offloads_leaves_the_rest_as_it_was_agreed(guest: Guest) -> None:
    station = Station(guest, features=~NetFeature.MRG_RXBUF, filtering=False)
    assert station.command(OFFLOADS, 0, bytes(8)) == OK
    station.wire.put(frame(1))
    assert station.nic.receive().frame == frame(1), "behind a header of 12 bytes still"
    station.nic.send(frame(2), Header(NEEDS_CSUM, csum_start=34, csum_offset=16)).wait()
    assert station.wire.take()[0].flags == NEEDS_CSUM


class Unwilling(Wire):
    """The host refuses what it is asked for while `refuses`, as it does for a tap that somebody has deleted."""

    refuses = False

    def _ask(self) -> None:
        if self.refuses:
            raise OSError(errno.EBADFD, os.strerror(errno.EBADFD))

    def set_offload(self, features: int) -> None:
        self._ask()
        super().set_offload(features)

    def set_queue_pairs(self, count: int) -> None:
        self._ask()
        super().set_queue_pairs(count)


def test_what_the_host_refuses_is_an_error_of_the_command(guest: Guest) -> None:
    """The device goes on, with what it had."""
    wire = Unwilling(2)
    nic = plug(guest, wire)
    wire.refuses = True
    assert nic.command(MQ, 0, struct.pack("<H", 2)) == ERR
    assert nic.command(OFFLOADS, 0, bytes(8)) == ERR
    nic.post(count=2)
    wire.put(frame(1, 1000), Header(NEEDS_CSUM, TCPV4, 54, 1448, 34, 16))
    assert nic.receive().header.gso_type == TCPV4
    control = device_of(nic.driver).control
    assert (control.queue_pairs, control.offloads) == (1, None)


@pytest.mark.parametrize(
    ("class_", "command", "data"),
    [
        (RX, PROMISC, b"\1"),
        (RX, ALLUNI, b"\1"),
        (MAC, TABLE_SET, tables()),
        (MAC, ADDR_SET, OTHER),
        (VLAN, ADD, b"\1\0"),
        (MQ, 0, b"\1\0"),
        (OFFLOADS, 0, bytes(8)),
    ],
)
def test_a_command_needs_its_feature(guest: Guest, class_: int, command: int, data: bytes) -> None:
    features = Feature.VERSION_1 | NetFeature.CTRL_VQ
    station = Station(guest, features=features, filtering=False)
    assert station.command(class_, command, data) == ERR
