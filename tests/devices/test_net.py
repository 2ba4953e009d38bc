"""A network device between its driver and a wire: features, configuration, frames in both directions."""

import os
import socket
import struct
from typing import Literal

import pytest
from wire import Wire, counters, device_of, plug

from pyvirtio.backends.net import NetBackend, Pair
from pyvirtio.dataplane import IoThread
from pyvirtio.devices.net import Net, stable_mac
from pyvirtio.errors import ConfigError
from pyvirtio.spec import Feature, NetFeature
from pyvirtio.testing import Guest
from pyvirtio.testing.net import DATA_VALID, ECN, NEEDS_CSUM, TCPV4, TCPV6, UDP_L4, Header, Nic, frame
from pyvirtio.testing.queue import Queue

OFFLOADS = (
    NetFeature.CSUM
    | NetFeature.GUEST_CSUM
    | NetFeature.HOST_TSO4
    | NetFeature.HOST_TSO6
    | NetFeature.HOST_ECN
    | NetFeature.HOST_USO
    | NetFeature.GUEST_TSO4
    | NetFeature.GUEST_TSO6
    | NetFeature.GUEST_ECN
    | NetFeature.GUEST_USO4
    | NetFeature.GUEST_USO6
)
MTU = 1500


def test_a_frame_goes_out_as_it_is(guest: Guest) -> None:
    wire = Wire()
    nic = plug(guest, wire)
    buffer = nic.send([frame(1, 500)[:14], frame(1, 500)[14:]])
    assert wire.take() == (Header(), frame(1, 500))
    assert buffer.wait() == b""
    assert counters(nic) == {"tx_frames": 1, "tx_bytes": 500}


def test_a_frame_comes_in_as_it_is(guest: Guest) -> None:
    wire = Wire()
    nic = plug(guest, wire)
    nic.post()
    wire.put(frame(2, 500))
    received = nic.receive()
    assert received.frame == frame(2, 500)
    assert received.header.num_buffers == 1
    assert counters(nic) == {"rx_frames": 1, "rx_bytes": 500}


def test_frames_that_came_before_there_were_buffers_wait(guest: Guest) -> None:
    wire = Wire()
    nic = plug(guest, wire)
    for number in range(3):
        wire.put(frame(number))
    nic.post(count=3)
    assert [nic.receive().frame for _ in range(3)] == [frame(number) for number in range(3)]


def test_header_and_frame_may_be_cut_anywhere(guest: Guest) -> None:
    wire = Wire()
    nic = plug(guest, wire)
    whole = Header(num_buffers=7).pack() + frame(3, 70)
    for cut in (1, 5, 11, 12, 13, 30):
        buffer = nic.tx[0].add([whole[at : at + cut] for at in range(0, len(whole), cut)], indirect=True)
        nic.tx[0].kick()
        buffer.wait()
        assert wire.take() == (Header(), frame(3, 70))


def test_a_receive_buffer_may_be_cut_anywhere(guest: Guest) -> None:
    wire = Wire()
    nic = plug(guest, wire)
    for sizes in ([1] * 12 + [60], [5, 100], [12, 1, 1, 70], [11, 2, 200]):
        nic.post(sizes)
        wire.put(frame(4, 60))
        assert nic.receive().frame == frame(4, 60)


def test_a_frame_in_more_pieces_than_one_write_takes_is_copied(guest: Guest) -> None:
    wire = Wire()
    driver = guest.plug(Net(wire, tx_queue_size=1024))
    nic = Nic(driver, driver.features)
    whole = frame(5, 1023)
    nic.tx[0].heap.allocate(4096)
    nic.send([whole[at : at + 1] for at in range(1023)]).wait()
    assert wire.take() == (Header(), whole)


def test_a_large_frame_takes_several_buffers(guest: Guest) -> None:
    wire = Wire()
    nic = plug(guest, wire)
    nic.post(1024, 8)
    wire.put(frame(6, 5000))
    received = nic.receive()
    assert received.frame == frame(6, 5000)
    assert (received.buffers, received.header.num_buffers) == (5, 5)
    wire.put(frame(7))
    assert nic.receive().frame == frame(7)


def test_a_frame_larger_than_a_ring_of_buffers_does_not_wait_for_ever(guest: Guest) -> None:
    wire = Wire()
    nic = plug(guest, wire, rx_queue_size=4)
    nic.post(20, 4)
    wire.put(frame(1, 200))
    wire.put(frame(2, 60))
    assert nic.receive().frame == frame(2, 60)
    assert counters(nic)["rx_dropped_buffer"] == 1


def test_without_mergeable_buffers_what_is_larger_than_one_is_dropped(guest: Guest) -> None:
    wire = Wire()
    nic = plug(guest, wire, features=~NetFeature.MRG_RXBUF)
    nic.post(512, 2)
    wire.put(frame(8, 501))
    wire.put(frame(9, 500))
    received = nic.receive()
    assert (received.frame, received.buffers) == (frame(9, 500), 1)
    assert counters(nic)["rx_dropped_buffer"] == 1


def test_an_old_driver_has_a_header_of_ten_bytes(guest: Guest) -> None:
    wire = Wire()
    driver = guest.plug(Net(wire), transport="legacy", features=~NetFeature.MRG_RXBUF)
    nic = Nic(driver, driver.features)
    assert nic.header_bytes == 10
    nic.post()
    nic.send(frame(10), Header(NEEDS_CSUM, csum_start=20, csum_offset=6))
    assert wire.take() == (Header(NEEDS_CSUM, csum_start=20, csum_offset=6), frame(10))
    wire.put(frame(11), Header(DATA_VALID))
    received = nic.receive()
    assert (received.header.flags, received.frame) == (DATA_VALID, frame(11))


def test_an_old_driver_with_mergeable_buffers_has_twelve(guest: Guest) -> None:
    wire = Wire()
    driver = guest.plug(Net(wire), transport="legacy")
    nic = Nic(driver, driver.features)
    assert nic.header_bytes == 12
    nic.post(64, 4)
    wire.put(frame(12, 100))
    assert nic.receive().frame == frame(12, 100)


@pytest.mark.parametrize(
    "header",
    [
        Header(NEEDS_CSUM, 0, 0, 0, 34, 16),
        Header(NEEDS_CSUM, TCPV4, 54, 1448, 34, 16),
        Header(NEEDS_CSUM, TCPV4 | ECN, 54, 1448, 34, 16),
        Header(NEEDS_CSUM, TCPV6, 74, 1428, 54, 16),
        Header(NEEDS_CSUM, UDP_L4, 42, 1000, 34, 6),
        Header(DATA_VALID),
    ],
)
def test_offloads_that_were_agreed_pass_in_both_directions(guest: Guest, header: Header) -> None:
    wire = Wire()
    nic = plug(guest, wire)
    nic.send(frame(13, 4000), header)
    assert wire.take() == (header, frame(13, 4000))
    nic.post(5000)
    wire.put(frame(14, 4000), header._replace(num_buffers=99))
    received = nic.receive()
    assert received.header == header._replace(num_buffers=1)
    assert received.frame == frame(14, 4000)


def test_a_segment_that_the_driver_did_not_agree_to_never_reaches_it(guest: Guest) -> None:
    wire = Wire()
    nic = plug(guest, wire, features=~OFFLOADS)
    nic.post(5000)
    wire.put(frame(15, 4000), Header(NEEDS_CSUM, TCPV4, 54, 1448, 34, 16))
    wire.put(frame(16), Header(NEEDS_CSUM, csum_start=34, csum_offset=16))
    wire.put(frame(17))
    assert nic.receive().frame == frame(17)
    assert counters(nic)["rx_dropped_offload"] == 2


@pytest.mark.parametrize("framing", ["datagram", "stream"])
def test_without_headers_there_are_no_offloads(guest: Guest, framing: str) -> None:
    wire = Wire(framing=framing, header=False)  # type: ignore[arg-type]
    driver = guest.plug(Net(wire))
    nic = Nic(driver, driver.features)
    assert not driver.features & OFFLOADS
    prefix = struct.pack(">I", 300) if framing == "stream" else b""
    nic.send(frame(18, 300))
    assert wire.take() == (Header(), prefix + frame(18, 300))
    nic.post(count=2)
    wire.peers[0].send(prefix + frame(19, 300))
    assert nic.receive().frame == frame(19, 300)


def test_frames_of_a_stream_may_come_in_any_pieces(guest: Guest) -> None:
    wire = Wire(framing="stream", header=False)
    nic = plug(guest, wire)
    lengths = [60, 1514, 9000, 61]
    stream = b"".join(struct.pack(">I", n) + frame(n, n) for n in lengths)
    nic.post(count=16)
    for at in range(0, len(stream), 997):
        wire.peers[0].send(stream[at : at + 997])
    assert [nic.receive().frame for _ in lengths] == [frame(n, n) for n in lengths]


def test_the_configuration_says_address_link_and_mtu(guest: Guest) -> None:
    driver = guest.plug(Net(Wire(), mac="52:54:00:12:34:56", host_mtu=MTU))
    assert driver.registers.config.bytes(0, 6) == bytes.fromhex("525400123456")
    assert (driver.config.status, driver.config.mtu, driver.config.max_virtqueue_pairs) == (1, MTU, 1)
    assert NetFeature.MTU in NetFeature(driver.features)


def test_the_address_is_made_from_the_name_and_stays() -> None:
    macs = []
    for name in ("net0", "net1", "net0"):
        with Guest() as guest:
            driver = guest.plug(Net(NetBackend()), name=name)
            macs.append(driver.registers.config.bytes(0, 6))
    assert macs[0] == macs[2] != macs[1]
    assert macs[0] == stable_mac("net0", "")
    assert macs[0][0] & 3 == 2, "locally administered, of one card"


@pytest.mark.parametrize(
    ("properties", "message"),
    [
        ({"mac": "52:54:00:12:34"}, "mac=52:54:00:12:34 is not allowed: six bytes"),
        ({"mac": "01:00:5e:00:00:01"}, "mac=01:00:5e:00:00:01 is not allowed: the address of a group"),
        ({"mac": "00:00:00:00:00:00"}, "the address of a group or none"),
        ({"rx_queue_size": 100}, "rx-queue-size=100: allowed are powers of two"),
        ({"tx_queue_size": 48}, "tx-queue-size=48: allowed are powers of two"),
        ({"host_mtu": 67}, "68 to 65535"),
        ({"host_mtu": 65536}, "68 to 65535"),
    ],
)
def test_what_cannot_be_is_one_line(properties: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Net(NetBackend(), **properties)  # type: ignore[arg-type]


def test_a_property_that_is_off_takes_what_depends_on_it_along() -> None:
    wire = Wire()
    offered = NetFeature(Net(wire, csum=False, guest_tso4=False, guest_tso6=False, ctrl_vq=False).device_features)
    gone = NetFeature.CSUM | NetFeature.HOST_TSO4 | NetFeature.HOST_ECN | NetFeature.HOST_USO
    gone |= NetFeature.GUEST_ECN | NetFeature.CTRL_RX | NetFeature.CTRL_MAC_ADDR | NetFeature.CTRL_VLAN
    assert not offered & gone
    assert NetFeature.GUEST_CSUM | NetFeature.GUEST_USO4 in offered
    wire.close()


def test_the_link_goes_down_and_up(guest: Guest) -> None:
    wire = Wire()
    driver = guest.plug(Net(wire))
    nic = Nic(driver, driver.features)
    nic.post(count=4)
    device_of(driver).set_link(False)
    assert driver.config_interrupts == 1
    assert driver.config.status == 0
    nic.send(frame(20)).wait()
    wire.put(frame(21))
    device_of(driver).set_link(True)
    nic.send(frame(22)).wait()
    assert wire.take() == (Header(), frame(22))
    wire.put(frame(23))
    while (received := nic.receive().frame) != frame(23):
        assert received == frame(21), "the link may have been up again when it came"
    assert counters(nic)["tx_dropped_link"] == 1


def test_nobody_is_on_a_network_that_is_none(guest: Guest) -> None:
    nic = plug(guest, NetBackend())
    nic.send(frame(30)).wait()
    assert counters(nic) == {"tx_frames": 1, "tx_bytes": 60}


def test_two_devices_on_a_pair_talk_to_each_other(guest: Guest) -> None:
    one, other = (plug(guest, end) for end in Pair.ends())
    for sender, receiver in ((one, other), (other, one)):
        receiver.post()
        sender.send(frame(31, 1000), Header(NEEDS_CSUM, csum_start=34, csum_offset=16)).wait()
        received = receiver.receive()
        assert received.frame == frame(31, 1000)
        assert (received.header.flags, received.header.csum_start) == (NEEDS_CSUM, 34)


def test_offloads_are_told_to_the_network(guest: Guest) -> None:
    wire = Wire()
    plug(guest, wire, features=~(NetFeature.GUEST_TSO6 | NetFeature.GUEST_USO4 | NetFeature.GUEST_USO6))
    assert wire.offloads == [NetFeature.GUEST_CSUM | NetFeature.GUEST_TSO4 | NetFeature.GUEST_ECN]


def test_queue_pairs_are_served_by_the_io_threads_of_the_mapping() -> None:
    threads = (IoThread("io0", poll_max_ns=0), IoThread("io1", poll_max_ns=0))
    with Guest(ioeventfd=True) as guest:
        wire = Wire(3)
        driver = guest.plug(Net(wire), iothread_vq_mapping=threads)
        nic = Nic(driver, driver.features)
        names = [iothread.name for iothread in driver.function.dataplane.iothreads]
        assert names == ["io0", "io0", "io1", "io1", "io0", "io0", "io1"]
        assert nic.command(4, 0, struct.pack("<H", 3)) == 0
        for pair in range(3):
            nic.send(frame(pair), queue=pair).wait()
            assert wire.take(pair=pair) == (Header(), frame(pair))
            nic.post(queue=pair)
            wire.put(frame(10 + pair), pair=pair)
            assert nic.receive(queue=pair).frame == frame(10 + pair)
    for thread in threads:
        thread.close()


def test_a_driver_without_multiqueue_finds_the_control_queue_third(guest: Guest) -> None:
    wire = Wire(2)
    driver = guest.plug(Net(wire), features=~NetFeature.MQ)
    nic = Nic(driver, driver.features)
    assert len(driver.queues) == 5
    assert len(nic.rx) == 1
    assert isinstance(nic.control, Queue)
    assert nic.control.index == 2
    assert nic.command(0, 0, b"\1") == 0
    nic.send(frame(35)).wait()
    assert wire.take() == (Header(), frame(35))


def test_the_device_is_what_a_kernel_looks_for(guest: Guest) -> None:
    driver = guest.plug(Net(NetBackend()), start=False)
    assert driver.pci.read(0, 4) == 0x1000 << 16 | 0x1AF4
    assert driver.pci.read(8, 4) >> 8 == 0x020000
    assert driver.function.ioeventfd == (guest.ioeventfd is not False)
    assert driver.registers.offered() & Feature.VERSION_1


FRAMINGS: dict[Literal["datagram", "stream"], socket.SocketKind] = {
    "datagram": socket.SOCK_DGRAM,
    "stream": socket.SOCK_STREAM,
}


@pytest.mark.parametrize("framing", FRAMINGS)
def test_a_card_that_is_gone_holds_nothing_of_the_host(guest: Guest, framing: Literal["datagram", "stream"]) -> None:
    one, other = socket.socketpair(socket.AF_UNIX, FRAMINGS[framing])
    network = NetBackend()
    network.fds, network.framing = [one.fileno()], framing
    net = Net(network)
    driver = guest.plug(net)
    assert descriptors_of(one) == 2
    guest.unplug(driver)
    assert descriptors_of(one) == 1
    assert not net.plane.counters["rx_frames"]
    one.close()
    other.close()


def descriptors_of(end: socket.socket) -> int:
    """How many file descriptors of this process are this socket."""
    folder = "/proc/self/fd/"
    found = [os.readlink(folder + fd) for fd in os.listdir(folder) if os.path.lexists(folder + fd)]
    return found.count(os.readlink(folder + str(end.fileno())))
