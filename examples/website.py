"""A network that is one program: it gives the guest an address and answers with a web page. No tap, no root.

    pyvirtio run ... --netdev examples/website.py:Website,id=n0 --device virtio-net-pci,netdev=n0

It answers ARP, DHCP (RFC 2131) and HTTP on 10.0.0.1. There is no state: what is said to a TCP segment follows from that
segment alone, which is enough for one request and one page that fits into one frame.
"""

import struct
from socket import inet_aton
from typing import Annotated

from pyvirtio.backends.net import NetBackend

OUR_MAC, OUR_IP, GUEST_IP, MASK = b"\x02web\x00\x01", inet_aton("10.0.0.1"), inet_aton("10.0.0.2"), b"\xff\xff\xff\0"
ARP, IPV4 = 0x0806, 0x0800
TCP, UDP = 6, 17
FIN, SYN, PSH, ACK = 1, 2, 8, 16
DISCOVER, OFFER, REQUEST, ACKNOWLEDGE = 1, 2, 3, 5
COOKIE = b"\x63\x82\x53\x63"


class Website(NetBackend):
    """One host at the other end of the guest's cable."""

    def __init__(self, page: Annotated[str, "what GET answers; at most 1200 bytes"] = "Hello from the host.\n") -> None:
        self.page = page.encode()[:1200]

    def send(self, frame: bytes) -> None:
        """A frame from the guest; one that is cut short or of another kind is ignored."""
        try:
            answer = self.answer(frame)
        except (struct.error, IndexError):
            return
        if answer is not None:
            self.inject([answer])

    def answer(self, frame: bytes) -> bytes | None:
        guest_mac, (kind,) = frame[6:12], struct.unpack_from(">H", frame, 12)
        payload = None
        if kind == ARP:
            payload = self.arp(frame[14:])
        elif kind == IPV4:
            payload = self.ip(frame[14:])
        return guest_mac + OUR_MAC + struct.pack(">H", kind) + payload if payload else None

    def arp(self, packet: bytes) -> bytes | None:
        operation, sender, sender_ip, wanted = struct.unpack_from(">6xH6s4s6x4s", packet)
        if operation != 1 or wanted != OUR_IP:
            return None
        return struct.pack(">HHBBH6s4s6s4s", 1, IPV4, 6, 4, 2, OUR_MAC, OUR_IP, sender, sender_ip)

    def ip(self, packet: bytes) -> bytes | None:
        length, protocol = struct.unpack_from(">2xH5xB", packet)
        body = packet[(packet[0] & 15) * 4 : length]
        if protocol == UDP and struct.unpack_from(">2xH", body) == (67,):
            return self.dhcp(body[8:])
        if protocol == TCP and struct.unpack_from(">2xH", body) == (80,) and packet[16:20] == OUR_IP:
            return self.tcp(packet[12:16], body)
        return None

    def dhcp(self, message: bytes) -> bytes | None:
        transaction, client = message[4:8], message[28:44]
        asked = options(message[240:]).get(53)
        kind = {bytes([DISCOVER]): OFFER, bytes([REQUEST]): ACKNOWLEDGE}.get(asked or b"")
        if kind is None or message[236:240] != COOKIE:
            return None
        given = {53: bytes([kind]), 54: OUR_IP, 51: struct.pack(">I", 3600), 1: MASK, 3: OUR_IP}
        head = struct.pack(">BBBB4s8x4s4s4x", 2, 1, 6, 0, transaction, GUEST_IP, OUR_IP) + client + bytes(192)
        reply = head + COOKIE + b"".join(bytes([code, len(value)]) + value for code, value in given.items()) + b"\xff"
        udp = struct.pack(">HHHH", 67, 68, 8 + len(reply), 0) + reply
        return ip_packet(UDP, inet_aton("255.255.255.255"), udp)

    def tcp(self, guest_ip: bytes, segment: bytes) -> bytes | None:
        port, seq, ack, offset, flags = struct.unpack_from(">H2xIIBB", segment)
        data = segment[(offset >> 4) * 4 :]
        if flags & SYN:
            return tcp_packet(guest_ip, port, 0, seq + 1, SYN | ACK)
        if data:
            return tcp_packet(guest_ip, port, ack, seq + len(data), ACK | PSH | FIN, self.http(data))
        return tcp_packet(guest_ip, port, ack, seq + 1, ACK) if flags & FIN else None

    def http(self, request: bytes) -> bytes:
        status, page = (b"200 OK", self.page) if request.startswith(b"GET / ") else (b"404 Not Found", b"")
        return b"HTTP/1.0 %s\r\nContent-Type: text/plain\r\nContent-Length: %d\r\n\r\n%s" % (status, len(page), page)


def options(data: bytes) -> dict[int, bytes]:
    """The options of a DHCP message."""
    found, at = {}, 0
    while data[at] != 0xFF:
        found[data[at]] = data[at + 2 : at + 2 + data[at + 1]]
        at += 2 + data[at + 1]
    return found


def tcp_packet(to: bytes, port: int, seq: int, ack: int, flags: int, data: bytes = b"") -> bytes:
    head = struct.pack(">HHIIBBHHH", 80, port, seq & 0xFFFFFFFF, ack & 0xFFFFFFFF, 5 << 4, flags, 0xFFFF, 0, 0)
    pseudo = OUR_IP + to + struct.pack(">HH", TCP, len(head) + len(data))
    return ip_packet(TCP, to, head[:16] + checksum(pseudo + head + data) + head[18:] + data)


def ip_packet(protocol: int, to: bytes, body: bytes) -> bytes:
    head = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(body), 0, 0, 64, protocol, 0) + OUR_IP + to
    return head[:10] + checksum(head) + head[12:] + body


def checksum(data: bytes) -> bytes:
    """The Internet checksum (RFC 1071)."""
    total = sum(struct.unpack(f">{len(data + bytes(len(data) % 2)) // 2}H", data + bytes(len(data) % 2)))
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return struct.pack(">H", ~total & 0xFFFF)
