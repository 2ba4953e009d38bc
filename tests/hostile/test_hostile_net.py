"""Hostile network drivers and networks: what is dropped, and that it is counted."""

import os
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from attack import Echo, echo
from wire import Wire

from pyvirtio.backends.net import NetBackend
from pyvirtio.devices.net import Net
from pyvirtio.devices.net_control import MAX_COMMAND, MAX_MACS
from pyvirtio.spec import NetFeature
from pyvirtio.testing import Guest, VirtioDriver
from pyvirtio.testing.net import ECN, ERR, NEEDS_CSUM, OK, TCPV4, TCPV6, UDP, UDP_L4, Header, Nic, frame
from pyvirtio.testing.queue import HANG
from pyvirtio.testing.ring import INDIRECT, WRITE, Desc

MAX_FRAME = 65535 + 14 + 8
NO_COMMANDS = {
    "unknown class": [bytes([9, 0]), bytes([255, 255])],
    "unknown command": [bytes([0, 6, 1]), bytes([1, 2])],
    "short": [
        b"",
        b"\0",
        bytes([0, 0]),
        bytes([1, 1]) + bytes(5),
        bytes([1, 0]) + struct.pack("<I", 1) + bytes(6),
        bytes([1, 0]) + struct.pack("<II", 0, 0xFFFFFFFF),
        bytes([2, 0, 1]),
    ],
    "oversized": [
        bytes([0, 0, 1, 1]),
        bytes([1, 1]) + bytes(7),
        bytes([1, 0]) + bytes(7),
        bytes([1, 0]) + bytes(9),
        bytes([0, 0, 1]) + bytes(MAX_COMMAND),
    ],
    "out of range": [
        bytes([2, 0]) + struct.pack("<H", 4096),
        *(bytes([4, 0]) + struct.pack("<H", pairs) for pairs in (0, 2, 65535)),
        *(bytes([5, 0]) + struct.pack("<Q", offloads) for offloads in (1 << 63, NetFeature.GUEST_UFO)),
    ],
}
"""What the control queue is asked, by what is wrong with it."""


class Victim:
    """A card with a hostile driver, and the other end of its cable."""

    def __init__(self, guest: Guest, *, event_idx: bool, indirect: bool, packed: bool) -> None:
        self.guest, self.event_idx, self.indirect, self.packed = guest, event_idx, indirect, packed
        self.bystander = guest.plug(Echo(), name="bystander")
        self.plug()

    def plug(self, features: int = ~0, **properties: int) -> None:
        """Another card, whose driver agrees on less."""
        self.wire = Wire()
        self.device = Net(self.wire, **properties)  # type: ignore[arg-type]
        self.driver: VirtioDriver = self.guest.plug(
            self.device, features=features, event_idx=self.event_idx, indirect=self.indirect, packed=self.packed
        )
        self.nic = Nic(self.driver, self.driver.features)

    def drops_sent(self, reason: str, data: bytes | list[bytes]) -> None:
        """What the driver sends, header and all, is dropped and counted; the driver gets its buffer back."""
        before = self.device.plane.counters[f"tx_dropped_{reason}"]
        buffer = self.nic.tx[0].add(data)
        self.nic.tx[0].kick()
        assert buffer.wait() == b""
        assert self.device.plane.counters[f"tx_dropped_{reason}"] == before + 1
        self.is_well()

    def drops_received(self, reason: str, data: bytes) -> None:
        """What comes from the network, header and all, is dropped and counted."""
        before = self.device.plane.counters[f"rx_dropped_{reason}"]
        self.wire.peers[0].send(data)
        self.is_well()
        assert self.device.plane.counters[f"rx_dropped_{reason}"] == before + 1

    def breaks(self, reason: str) -> None:
        assert reason in self.driver.wait_needs_reset()
        self.driver.start()
        self.nic = Nic(self.driver, self.driver.features)
        self.is_well()

    def is_well(self) -> None:
        """Frames go both ways, and the other device serves."""
        self.nic.post()
        self.nic.send(frame(1))
        assert self.wire.take() == (Header(), frame(1))
        self.wire.put(frame(2))
        assert self.nic.receive().frame == frame(2)
        assert echo(self.bystander.echoq) == b"hello"


@pytest.fixture
def victim(guest: Guest, event_idx: bool, in_table: bool, packed: bool) -> Iterator[Victim]:
    attacked = Victim(guest, event_idx=event_idx, indirect=in_table, packed=packed)
    yield attacked
    if not attacked.driver.may_break:
        attacked.is_well()


def test_missing_header(victim: Victim) -> None:
    for length in range(1, 12):
        victim.drops_sent("header", bytes(length))


def test_header_without_a_frame(victim: Victim) -> None:
    for length in (0, 1, 13):
        victim.drops_sent("length", [Header().pack(), bytes(length)])


def test_only_writable_descriptors(victim: Victim) -> None:
    buffer = victim.nic.tx[0].add(writable=100)
    victim.nic.tx[0].kick()
    assert buffer.wait() == b""
    assert victim.device.plane.counters["tx_dropped_header"] == 1


def test_a_frame_longer_than_any(victim: Victim) -> None:
    victim.drops_sent("length", [Header().pack(), bytes(MAX_FRAME + 1)])


@pytest.mark.parametrize(
    "header",
    [
        Header(NEEDS_CSUM, csum_start=start, csum_offset=offset)
        for start, offset in [(59, 0), (0, 59), (60, 60), (65535, 65535), (57, 2)]
    ],
)
def test_checksum_offsets_past_the_packet(victim: Victim, header: Header) -> None:
    victim.drops_sent("header", [header.pack(), frame(3, 60)])
    victim.drops_received("header", header.pack() + frame(3, 60))


@pytest.mark.parametrize(
    "header",
    [
        Header(NEEDS_CSUM, TCPV4, 61, 100, 34, 16),
        Header(NEEDS_CSUM, TCPV6, 54, 0, 34, 16),
        Header(NEEDS_CSUM, UDP_L4, 65535, 65535, 34, 6),
    ],
)
def test_segments_without_a_size_or_with_headers_past_the_packet(victim: Victim, header: Header) -> None:
    victim.drops_sent("header", [header.pack(), frame(4, 60)])
    victim.drops_received("header", header.pack() + frame(4, 60))


def test_segments_without_the_feature(victim: Victim) -> None:
    victim.plug(host_tso4=False, host_tso6=False, host_uso=False, guest_tso4=False, guest_tso6=False, guest_uso4=False)
    for gso_type in (TCPV4, TCPV6, TCPV4 | ECN, UDP, UDP_L4, ECN, 2, 6, 0x7F, 0xFF):
        header = Header(NEEDS_CSUM, gso_type, 54, 1448, 34, 16)
        victim.drops_sent("offload", [header.pack(), frame(5, 3000)])
        victim.drops_received("offload", header.pack() + frame(5, 3000))


def test_a_checksum_to_compute_without_the_feature(victim: Victim) -> None:
    victim.plug(csum=False, guest_csum=False)
    header = Header(NEEDS_CSUM, csum_start=34, csum_offset=16)
    victim.drops_sent("offload", [header.pack(), frame(6)])
    victim.drops_received("offload", header.pack() + frame(6))


def test_a_tx_chain_of_gigabytes_is_given_back_without_a_copy(victim: Victim) -> None:
    """Nearly the 4 GiB that a chain can have at most: 1000 times the same 3 MiB."""
    victim.plug(tx_queue_size=1024)
    queue = victim.nic.tx[0]
    descs = [Desc(0, 3 * victim.guest.border // 2)] * 1000
    address, length = queue.place_table(queue.ring.linked(descs))
    queue.ring.add([Desc(address, length, INDIRECT)])
    queues = [vq for driver in victim.guest.drivers for vq in driver.queues]
    rings = [range_ for vq in queues for range_ in (*vq.ring.device_ranges, *vq.ring.driver_ranges)]
    with victim.guest.only_writes(*rings):
        queue.kick()
        queue.wait_until(lambda: bool(queue.strays), "it is given back")
    assert victim.device.plane.counters["tx_dropped_length"] == 1


def test_a_frame_that_the_guest_rewrites_is_sent_with_the_header_that_was_checked(victim: Victim) -> None:
    """The header is read once: what is written to the network is not read from the guest again."""
    good = Header(NEEDS_CSUM, csum_start=34, csum_offset=16)
    headers: list[Header] = []
    for _ in range(200):
        buffer = victim.nic.send(frame(7, 200), good, kick=False)
        address, _ = buffer.readable[0]
        victim.nic.tx[0].kick()
        victim.driver.memory.write(address, Header(NEEDS_CSUM, 0xFF, 65535, 0, 65535, 65535).pack())
        buffer.wait()
        if victim.device.plane.counters["tx_frames"] > len(headers):
            headers.append(victim.wire.take()[0])
    assert set(headers) <= {good}


@pytest.mark.parametrize("size", [1, 11])
def test_a_receive_buffer_smaller_than_the_header(victim: Victim, size: int) -> None:
    victim.nic.post(size)
    victim.breaks(f"a receive buffer of {size} bytes has no room for the header of 12")


def test_a_receive_buffer_that_is_readable(victim: Victim) -> None:
    victim.nic.rx[0].add(bytes(2048))
    victim.nic.rx[0].kick()
    victim.breaks("a receive buffer of 0 bytes")


def test_a_receive_buffer_of_zero_bytes(victim: Victim) -> None:
    rx = victim.nic.rx[0]
    rx.ring.add([Desc(0x1000, 0, WRITE)])
    rx.kick()
    victim.breaks("a receive buffer of 0 bytes")


def test_a_buffer_of_zero_bytes_for_the_rest_of_a_frame(victim: Victim) -> None:
    rx = victim.nic.rx[0]
    victim.nic.post(100, kick=False)
    rx.ring.add([Desc(0x1000, 0, WRITE)])
    rx.kick()
    victim.wire.put(frame(9, 300))
    victim.breaks("a receive buffer of 0 bytes")


def test_a_frame_larger_than_the_buffer_without_mergeable_buffers(victim: Victim) -> None:
    victim.plug(features=~NetFeature.MRG_RXBUF)
    victim.drops_received("buffer", Header().pack() + frame(10, 5000))


def test_a_frame_waits_for_as_many_buffers_as_it_needs(victim: Victim) -> None:
    for _ in range(5):
        victim.wire.put(frame(11, 2000))
        for _ in range(11):
            victim.nic.post(20, 10)
        assert victim.nic.receive().frame == frame(11, 2000)
    assert not any(count for name, count in victim.device.plane.counters.items() if "dropped" in name)


def test_a_frame_in_more_buffers_than_a_service_hands_out(guest: Guest) -> None:
    wire = Wire()
    driver = guest.plug(Net(wire, rx_queue_size=1024))
    nic = Nic(driver, driver.features)
    nic.post(20, 500)
    wire.put(frame(12, 20 * 300))
    wire.put(frame(13, 20 * 250))
    assert nic.receive().frame == frame(13, 20 * 250)
    device = driver.function.device
    assert isinstance(device, Net)
    assert device.plane.counters["rx_dropped_buffer"] == 1


def test_a_flood_without_buffers(victim: Victim) -> None:
    """The network's queue fills up, and nobody looks at it until there are buffers."""
    victim.nic.post(count=2)
    victim.wire.put(frame(0))
    victim.nic.receive()
    assert is_watched(victim.wire)
    victim.wire.put(frame(1))
    victim.nic.receive()
    sent = flood(victim.wire)
    wait_until(lambda: not is_watched(victim.wire))
    for number in range(sent):
        victim.nic.post()
        assert victim.nic.receive().frame == frame(number, 1000)


def flood(wire: Wire) -> int:
    """Send frames until the socket is full; return how many."""
    wire.peers[0].setblocking(False)
    sent = 0
    with suppress(BlockingIOError):
        while True:
            wire.put(frame(sent, 1000))
            sent += 1
    wire.peers[0].setblocking(True)
    return sent


def is_watched(wire: Wire) -> bool:
    """Whether some epoll set of this process has the device's end of the wire."""
    socket = os.stat(wire.fds[0]).st_ino
    links = {
        fd: os.readlink(path) for fd in os.listdir("/proc/self/fd") if os.path.islink(path := f"/proc/self/fd/{fd}")
    }
    sets = [Path(f"/proc/self/fdinfo/{fd}").read_text() for fd, link in links.items() if "eventpoll" in link]
    return any(f"ino:{socket:x} " in line for text in sets for line in text.splitlines())


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + HANG
    while not condition():
        assert time.monotonic() < deadline, "hangs"
        time.sleep(0.0005)


@pytest.mark.parametrize("data", [b"", b"\0", bytes(11), Header().pack(), Header().pack() + bytes(13)])
def test_a_network_that_sends_no_whole_frame(victim: Victim, data: bytes) -> None:
    if data:
        victim.drops_received("header" if len(data) < 12 else "length", data)


def test_a_network_that_goes_away(victim: Victim) -> None:
    victim.nic.post()
    victim.wire.peers[0].close()
    victim.nic.send(frame(12)).wait()
    assert victim.device.plane.counters["tx_dropped_error"] == 1
    assert echo(victim.bystander.echoq) == b"hello"
    victim.driver.may_break = True  # nothing can be received any more


def test_a_stream_with_a_frame_longer_than_any(guest: Guest) -> None:
    wire = Wire(framing="stream", header=False)
    driver = guest.plug(Net(wire))
    nic = Nic(driver, driver.features)
    nic.post(count=4)
    wire.peers[0].send(struct.pack(">I", 60) + frame(13))
    assert nic.receive().frame == frame(13)
    wire.peers[0].send(struct.pack(">I", MAX_FRAME + 1) + bytes(1000))
    nic.send(frame(14)).wait()
    assert wire.take()[1][4:] == frame(14)
    assert nic.received == 0


class TestControl:
    """The control queue."""

    @pytest.mark.parametrize("kind", NO_COMMANDS)
    def test_what_is_no_command_gets_an_error(self, victim: Victim, kind: str) -> None:
        assert victim.nic.control is not None
        for command in NO_COMMANDS[kind]:
            buffer = victim.nic.control.add(command, 1)
            victim.nic.control.kick()
            assert (command, buffer.wait()) == (command, bytes([ERR]))

    def test_mac_table_overflow(self, victim: Victim) -> None:
        macs = [struct.pack("<IH", number, 0) for number in range(MAX_MACS + 1)]
        most = struct.pack("<I", MAX_MACS) + b"".join(macs[:-1]) + bytes(4)
        assert victim.nic.command(1, 0, most) == OK
        over = struct.pack("<I", MAX_MACS) + b"".join(macs[:-1]) + struct.pack("<I", 1) + macs[-1]
        assert victim.nic.command(1, 0, over) == ERR

    def test_a_command_without_room_for_the_answer(self, victim: Victim) -> None:
        assert victim.nic.control is not None
        buffer = victim.nic.control.add(bytes([0, 0, 1]))
        victim.nic.control.kick()
        assert buffer.wait() == b""

    def test_a_command_of_4_gib(self, victim: Victim) -> None:
        assert victim.nic.control is not None
        queue = victim.nic.control
        descs = [Desc(0, victim.guest.border) for _ in range(60)]
        answer = queue.heap.allocate(16)
        address, length = queue.place_table(queue.ring.linked([*descs, Desc(answer, 1, WRITE)]))
        queue.ring.add([Desc(address, length, INDIRECT)])
        queue.kick()
        queue.wait_until(lambda: bool(queue.strays), "it is answered")
        assert victim.driver.memory.read(answer, 1) == bytes([ERR])


def test_a_python_network_is_never_given_what_no_frame_can_be(guest: Guest) -> None:
    class Strict(NetBackend):
        """Knows how long a frame may be."""

        def send(self, frame: bytes) -> None:
            assert 14 <= len(frame) <= MAX_FRAME

    driver = guest.plug(Net(Strict()))
    nic = Nic(driver, driver.features)
    for length in (1, 13, 14, 1514, MAX_FRAME, MAX_FRAME + 1):
        nic.send(bytes(length)).wait()
    nic.post(count=4)
    device = driver.function.device
    assert isinstance(device, Net)
    assert device.netdev.inject([b"", bytes(13), bytes(70000), frame(1)]) == 4
    assert nic.receive().frame == frame(1)
    assert device.plane.counters["rx_dropped_length"] == 3
