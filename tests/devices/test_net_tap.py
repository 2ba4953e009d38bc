"""A network device over a real tap interface: its frames on the host, and the host's in its buffers."""

import socket
import struct
import time

import pytest
from own_network import ip, own_network
from tapped import tapped

from pyvirtio.backends.tap import Tap
from pyvirtio.devices.net import Net
from pyvirtio.spec import NetFeature
from pyvirtio.testing import Guest
from pyvirtio.testing.driver import Interface
from pyvirtio.testing.net import NEEDS_CSUM, OK, Header, frame
from pyvirtio.testing.queue import HANG

MQ_CLASS, VQ_PAIRS_SET = 4, 0


@pytest.mark.parametrize("transport", ["modern", "legacy"])
@pytest.mark.parametrize("ioeventfd", [False, True])
@own_network
def test_frames_go_both_ways(ioeventfd: bool, transport: Interface) -> None:
    with tapped(ioeventfd=ioeventfd, transport=transport) as (nic, host):
        for number in range(200):
            length = 60 + number * 7
            nic.send(frame(number, length)).wait()
            assert host.recv(2000) == frame(number, length)
            nic.post()
            host.send(frame(number, length))
            assert nic.receive().frame == frame(number, length)


@own_network
def test_frames_wait_for_buffers() -> None:
    """The interface keeps them meanwhile, as far as its queue is long."""
    with tapped() as (nic, host):
        for number in range(100):
            host.send(frame(number))
        nic.post(count=100)
        assert [nic.receive().frame for _ in range(100)] == [frame(number) for number in range(100)]


@own_network
def test_the_driver_uses_as_many_queue_pairs_as_it_asks_for() -> None:
    with tapped(queues=4) as (nic, host):
        assert len(nic.rx) == 4
        for count in (1, 4, 2):
            assert nic.command(MQ_CLASS, VQ_PAIRS_SET, struct.pack("<H", count)) == OK
            for queue in range(count):
                nic.send(frame(queue), queue=queue).wait()
                assert host.recv(2000) == frame(queue)
        for pair in range(2):
            nic.post(count=64, queue=pair)
        for flow in range(40):
            host.send(frame(flow)[:6] + bytes([2, flow]) + frame(flow)[8:])
        deadline = time.monotonic() + HANG
        while sum(queue.ring.used_idx for queue in nic.rx[:2]) < 40:
            assert time.monotonic() < deadline
            time.sleep(0.001)


@own_network
def test_the_host_completes_a_checksum() -> None:
    """A UDP datagram without one reaches a socket of the host, which refuses wrong ones."""
    with tapped() as (nic, _), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as host:
        assert nic.driver.features & NetFeature.CSUM
        ip("addr add 198.51.100.1/24 dev tap7")
        host.bind(("198.51.100.1", 4000))
        host.settimeout(HANG)
        ours, theirs = socket.inet_aton("198.51.100.2"), socket.inet_aton("198.51.100.1")
        datagram = struct.pack(">HHHH", 5000, 4000, 8 + 5, 0) + b"hello"
        packet = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(datagram), 1, 0, 64, 17, 0) + ours + theirs
        packet = packet[:10] + struct.pack(">H", checksum(packet)) + packet[12:]
        pseudo = checksum(ours + theirs + struct.pack(">BBH", 0, 17, len(datagram))) ^ 0xFFFF
        datagram = datagram[:6] + struct.pack(">H", pseudo) + datagram[8:]
        link = ip("-o link show tap7").split("link/ether ")[1].split()[0]
        ethernet = bytes.fromhex(link.replace(":", "")) + b"\x52\x54\0\0\0\1\x08\0"
        nic.send(ethernet + packet + datagram, Header(NEEDS_CSUM, csum_start=34, csum_offset=6)).wait()
        assert host.recv(100) == b"hello"


def checksum(data: bytes) -> int:
    total: int = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return total ^ 0xFFFF


@own_network
def test_an_interface_of_its_own_goes_away_with_the_device() -> None:
    with Guest() as guest:
        net = Net(Tap(ifname="tap8", queues=2))
        guest.unplug(guest.plug(net))
        assert "tap8" not in [name for _, name in socket.if_nameindex()]
        assert net.netdev.fds == []
