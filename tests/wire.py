"""A network device, and the other end of its cable in the hands of a test."""

import os
import socket
from typing import Literal

from pyvirtio.backends.net import NetBackend
from pyvirtio.devices.net import Net
from pyvirtio.testing import Guest, VirtioDriver
from pyvirtio.testing.net import Header, Nic
from pyvirtio.testing.queue import HANG, Driver


class Wire(NetBackend):
    """Socket pairs, one for each queue pair: the device has one end of each, the test the other."""

    uso = True

    def __init__(
        self,
        pairs: int = 1,
        *,
        framing: Literal["datagram", "stream"] = "datagram",
        header: bool = True,
        room: int = 0,
    ) -> None:
        """`room` is about how many bytes the device can send before the test takes some."""
        kind = socket.SOCK_STREAM if framing == "stream" else socket.SOCK_SEQPACKET
        self.framing, self.vnet_header = framing, header
        ends = [socket.socketpair(socket.AF_UNIX, kind) for _ in range(pairs)]
        for end, _ in ends:
            if room:
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, room)
        self.fds = [end.detach() for end, _ in ends]
        self.peers = [peer for _, peer in ends]
        for peer in self.peers:
            peer.settimeout(HANG)
        self.offloads: list[int] = []
        self.active: list[int] = []

    def put(self, frame: bytes, header: Header | None = None, *, pair: int = 0) -> None:
        """Send a frame to the device."""
        front = (header or Header()).pack() if self.vnet_header else b""
        self.peers[pair].sendall(front + frame)

    def take(self, *, pair: int = 0) -> tuple[Header, bytes]:
        """The next frame from the device."""
        data = self.peers[pair].recv(1 << 17)
        return (Header.unpack(data), data[12:]) if self.vnet_header else (Header(), data)

    def set_offload(self, features: int) -> None:
        self.offloads.append(int(features))

    def set_queue_pairs(self, count: int) -> None:
        self.active.append(count)

    def close(self) -> None:
        fds, self.fds = self.fds, []
        for fd in fds:
            os.close(fd)
        for peer in self.peers:
            peer.close()


def plug(guest: Guest, netdev: NetBackend, *, features: int = ~0, **properties: object) -> Nic:
    driver = guest.plug(Net(netdev, **properties), features=features)  # type: ignore[arg-type]
    return Nic(driver, driver.features)


def counters(nic: Nic) -> dict[str, int]:
    """What the device has counted, without what is zero."""
    return {name: count for name, count in device_of(nic.driver).plane.counters.items() if count}


def device_of(driver: Driver) -> Net:
    device = driver.function.device if isinstance(driver, VirtioDriver) else vars(driver)["device"]
    assert isinstance(device, Net)
    return device
