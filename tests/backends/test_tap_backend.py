"""Tap interfaces: opened or made with the flags the core expects, and one clear line if that cannot be."""

import ctypes
import errno
import fcntl
import os
import select
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from own_network import ip, own_network

from pyvirtio.backends import tap
from pyvirtio.backends.tap import Tap
from pyvirtio.errors import ConfigError
from pyvirtio.spec import NetFeature
from pyvirtio.testing.plugin import nothing_left_behind

ETHERNET = b"\xff" * 6 + b"\x02\0\0\0\0\1" + b"\x88\xb5"
FRAME = ETHERNET + b"frame" * 10
NO_OFFLOAD = bytes(12)


def mistake(make: Callable[[], Tap]) -> str:
    """The one line that it is, with nothing left behind."""
    with nothing_left_behind(), pytest.raises(ConfigError) as caught:
        make().close()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def host_side(ifname: str) -> socket.socket:
    """Sends and receives frames as the host does."""
    ip(f"link set {ifname} up")
    host = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0x88B5)
    host.bind((ifname, 0x88B5))
    host.settimeout(10)
    return host


def read(*fds: int, ethertype: bytes = ETHERNET[12:]) -> tuple[int, bytes]:
    """The next frame of this type on any of the fds, with its header, and the fd; IPv6 says hello in between."""
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    while ready := poll.poll(10_000):
        frame = os.read(ready[0][0], 2000)
        if frame[24:26] == ethertype:
            return ready[0][0], frame
    raise TimeoutError


@own_network
def test_frames_go_both_ways_behind_a_header_of_12_bytes() -> None:
    backend = Tap(ifname="tap7")
    assert (backend.ifname, backend.framing, backend.vnet_header, backend.queue_pairs) == ("tap7", "tap", True, 1)
    with host_side("tap7") as host:
        os.write(backend.fds[0], NO_OFFLOAD + FRAME)
        assert host.recv(2000) == FRAME
        host.send(FRAME)
        assert read(*backend.fds)[1][12:] == FRAME
    backend.close()
    backend.close()
    assert "tap7" not in ip("link")


@own_network
def test_the_host_chooses_a_name_and_what_was_there_stays() -> None:
    ip("tuntap add mine mode tap")
    chosen, mine = Tap(), Tap(ifname="mine")
    assert chosen.ifname == "tap0"
    for backend in (chosen, mine):
        backend.close()
    assert "tap0" not in ip("link")
    assert "mine" in ip("link")


@own_network
def test_several_queues_of_which_the_driver_uses_some() -> None:
    backend = Tap(ifname="tap7", queues=4)
    assert len(set(backend.fds)) == backend.queue_pairs == 4
    with host_side("tap7") as host:
        for count in (1, 4, 2, 1):
            backend.set_queue_pairs(count)
            for flow in range(20):
                host.send(FRAME[:6] + bytes([2, flow]) + FRAME[8:])
                assert read(*backend.fds)[0] in backend.fds[:count]
            for fd in backend.fds[:count]:
                os.write(fd, NO_OFFLOAD + FRAME)
                assert host.recv(2000) == FRAME
    backend.close()


def test_queues_that_the_host_refuses_can_be_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = object.__new__(Tap)
    backend.fds, backend.attached = [10, 11, 12, 13], 1
    attached, refused = {10}, {12}

    def ioctl(fd: int, request: int, argument: bytes) -> None:
        attach = tap.IFREQ.unpack(argument)[1] == tap.IFF_ATTACH_QUEUE
        if fd in refused or attach is (fd in attached):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        attached.symmetric_difference_update({fd})

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    with pytest.raises(OSError, match="Invalid"):
        backend.set_queue_pairs(4)
    refused.clear()
    backend.set_queue_pairs(4)
    assert attached == {10, 11, 12, 13}
    refused.add(11)
    with pytest.raises(OSError, match="Invalid"):
        backend.set_queue_pairs(1)
    refused.clear()
    backend.set_queue_pairs(1)
    assert attached == {10}


@own_network
def test_one_queue_of_a_multi_queue_interface_will_do() -> None:
    ip("tuntap add many mode tap multi_queue")
    backend = Tap(ifname="many")
    assert backend.queue_pairs == 1
    backend.close()


@own_network
def test_an_unusual_mtu_is_the_drivers_business() -> None:
    for mtu, told in ((1500, None), (9000, 9000)):
        ip(f"tuntap add tap{mtu} mode tap")
        ip(f"link set tap{mtu} mtu {mtu}")
        backend = Tap(ifname=f"tap{mtu}")
        assert backend.mtu == told
        backend.close()


@own_network
def test_offloads_are_what_the_driver_takes() -> None:
    """With none the host sends no frame without its checksum."""
    backend = Tap(ifname="tap7")
    ip("link set tap7 up")
    ip("addr add 198.51.100.1/24 dev tap7")
    ip("neigh add 198.51.100.2 lladdr 02:00:00:00:00:02 dev tap7")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as host:
        for features, flags in ((NetFeature(0), 0), (NetFeature.GUEST_CSUM, 1), (NetFeature.MRG_RXBUF, 0)):
            backend.set_offload(features)
            host.sendto(b"datagram", ("198.51.100.2", 9))
            assert read(*backend.fds, ethertype=b"\x08\x00")[1][0] == flags
    backend.close()


@own_network
def test_mistakes_are_one_line_each() -> None:
    ip("tuntap add alone mode tap")
    ip("tuntap add many mode tap multi_queue")
    held = Tap(ifname="held")
    assert mistake(lambda: Tap(ifname="lo")) == "ifname=lo: the interface is no tap of ours to use"
    assert mistake(lambda: Tap(ifname="held")) == "ifname=held: the interface is in use"
    assert (
        mistake(lambda: Tap(ifname="alone", queues=2)) == "queues=2: the interface alone was made without multi_queue"
    )
    assert mistake(lambda: Tap(ifname="a/b")) == "ifname=a/b: Invalid argument"
    assert mistake(lambda: Tap(ifname="x" * 16)) == f"ifname={'x' * 16}: 16 bytes, at most 15 are allowed"
    first = Tap(ifname="many", queues=200)
    assert mistake(lambda: Tap(ifname="many", queues=100)) == "ifname=many: all queues of the interface are in use"
    first.close()
    held.close()
    assert "held" not in ip("link")


@own_network
def test_without_permission_a_line_says_what_root_would_do() -> None:
    drop_capabilities()
    assert mistake(Tap) == "not permitted to make an interface: name one that exists with ifname="
    assert mistake(lambda: Tap(ifname="new")).startswith(
        "ifname=new: there is no such interface, and it may not be made; root may: ip tuntap add new mode tap user "
    )


def drop_capabilities() -> None:
    """Be an ordinary user (capset(2))."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    nothing = (ctypes.c_uint32 * 6)()
    assert libc.capset(header, nothing) == 0


@own_network
def test_without_the_device_of_tun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tap, "TUN", "/dev/net/none")
    assert mistake(Tap) == "/dev/net/none: No such file or directory"


@own_network
def test_without_vhost_there_is_one_warning_or_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tap, "VHOST_NET", str(tmp_path / "none"))
    backend = Tap(queues=2, vhost=True)
    [record] = caplog.records
    assert record.getMessage() == (
        f"tap0: no vhost ({tmp_path}/none: No such file or directory); frames go through this process"
    )
    assert backend.vhost_fds == []
    backend.close()
    assert mistake(lambda: Tap(vhostforce=True)) == f"vhostforce=on: {tmp_path}/none: No such file or directory"
    (tmp_path / "none").touch()
    backend = Tap(queues=2, vhost=True)
    assert len(backend.vhost_fds) == 2
    backend.close()
