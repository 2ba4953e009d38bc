"""The website, asked by a guest that was written from the RFCs."""

import struct
from collections.abc import Iterable

import pytest
from website import OUR_MAC, Website

from pyvirtio.devices.net import Net
from pyvirtio.testing import Guest
from pyvirtio.testing.net import Nic

MAC = b"\x52\x54\x00\x12\x34\x56"
OUR_IP, GUEST_IP = bytes([10, 0, 0, 1]), bytes([10, 0, 0, 2])
BROADCAST = b"\xff" * 6


class Cable:
    """A guest's end of the cable: says something, and returns the answer."""

    def __init__(self) -> None:
        self.site = Website(page="It works.\n")
        self.heard: list[bytes] = []
        self.site.connect(self._hear)

    def _hear(self, frames: Iterable[bytes]) -> int:
        self.heard.extend(frames)
        return 1

    def say(self, frame: bytes) -> bytes | None:
        self.site.send(frame)
        return self.heard.pop() if self.heard else None

    def ip(self, protocol: int, body: bytes) -> bytes:
        """Say an IP packet; the body of the answer."""
        head = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 20 + len(body), 1, 0, 64, protocol, 0, GUEST_IP, OUR_IP)
        answer = self.say(OUR_MAC + MAC + b"\x08\x00" + head + body)
        assert answer is not None
        assert ones(answer[14:34]) == 0xFFFF
        return answer[34 : 14 + struct.unpack(">H", answer[16:18])[0]]


def ones(data: bytes) -> int:
    """The one's complement sum; of data with its checksum it is all ones."""
    total: int = sum(struct.unpack(f">{len(data) // 2}H", data))
    return (total & 0xFFFF) + (total >> 16)


def dhcp(kind: int) -> bytes:
    message = struct.pack(">BBBBI20x6s10x192x4s", 1, 1, 6, 0, 0xCAFE, MAC, b"\x63\x82\x53\x63") + bytes([53, 1, kind])
    return struct.pack(">HHHH", 68, 67, 8 + len(message) + 1, 0) + message + b"\xff"


def segment(seq: int, ack: int, flags: int, data: bytes = b"") -> bytes:
    return struct.pack(">HHIIBBHHH", 40000, 80, seq, ack, 0x50, flags, 1024, 0, 0) + data


def test_arp_is_answered_for_the_host_only() -> None:
    cable = Cable()
    for wanted, answered in ((OUR_IP, True), (GUEST_IP, False)):
        question = struct.pack(">HHBBH6s4s6x4s", 1, 0x0800, 6, 4, 1, MAC, GUEST_IP, wanted)
        answer = cable.say(BROADCAST + MAC + b"\x08\x06" + question)
        assert (answer is not None) is answered
        if answer:
            assert answer[:14] == MAC + OUR_MAC + b"\x08\x06"
            assert answer[20:] == struct.pack(">H6s4s6s4s", 2, OUR_MAC, OUR_IP, MAC, GUEST_IP)


@pytest.mark.parametrize(("said", "answered"), [(1, 2), (3, 5)], ids=["discover", "request"])
def test_dhcp_gives_the_address(said: int, answered: int) -> None:
    reply = Cable().ip(17, dhcp(said))
    assert struct.unpack(">HH", reply[:4]) == (67, 68)
    assert reply[12:16] == struct.pack(">I", 0xCAFE)
    assert reply[24:28] == GUEST_IP
    assert reply[36:42] == MAC
    assert reply[248:251] == bytes([53, 1, answered])


def test_a_page_comes_in_one_conversation() -> None:
    cable = Cable()
    *_, seq, ack, _, flags = struct.unpack(">HHIIBB", cable.ip(6, segment(1000, 0, 2))[:14])
    assert (ack, flags) == (1001, 0x12)
    answer = cable.ip(6, segment(1001, seq + 1, 0x18, b"GET / HTTP/1.0\r\n\r\n"))
    assert answer[20:].endswith(b"Content-Length: 10\r\n\r\nIt works.\n")
    assert struct.unpack(">II", answer[4:12]) == (seq + 1, 1001 + 18)
    pseudo = OUR_IP + GUEST_IP + struct.pack(">HH", 6, len(answer))
    assert ones(pseudo + answer + bytes(len(answer) % 2)) == 0xFFFF
    assert b"404 Not Found" in cable.ip(6, segment(2000, 1, 0x18, b"GET /other HTTP/1.0\r\n\r\n"))
    assert struct.unpack(">II", cable.ip(6, segment(3000, 5, 0x11))[4:12]) == (5, 3001)


def test_frames_that_are_cut_short_are_ignored() -> None:
    cable = Cable()
    head = struct.pack(">BBH5xB2x4s4s", 0x45, 0, 20 + len(dhcp(1)), 17, GUEST_IP, OUR_IP)
    whole = OUR_MAC + MAC + b"\x08\x00" + head + dhcp(1)
    assert cable.say(whole) is not None
    for length in range(len(whole)):
        assert cable.say(whole[:length]) is None


@pytest.mark.guest(transport=("modern", "legacy", "vhost-user"), lint=True)
def test_a_network_card_gets_the_page(guest: Guest) -> None:
    driver = guest.plug(Net(Website(page="It works.\n")))
    nic = Nic(driver, driver.features)
    nic.post(count=4)
    head = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 20, 1, 0, 64, 6, 0, GUEST_IP, OUR_IP)
    request = segment(1, 1, 0x18, b"GET / HTTP/1.0\r\n\r\n")
    nic.send([OUR_MAC + MAC + b"\x08\x00", head[:2] + struct.pack(">H", 20 + len(request)) + head[4:], request])
    assert nic.receive().frame.endswith(b"\r\n\r\nIt works.\n")
