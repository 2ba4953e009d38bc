"""The network of an ordinary user: passt runs as long as its backend, and what is wrong is one line."""

import logging
import os
import select
import shutil
import socket
import struct
import time
from pathlib import Path

import pytest
from own_network import ip, own_network

from pyvirtio.backends.passt import Passt
from pyvirtio.errors import ConfigError
from pyvirtio.testing.plugin import nothing_left_behind
from pyvirtio.testing.queue import HANG

GUEST, GATEWAY = socket.inet_aton("198.51.100.2"), socket.inet_aton("198.51.100.1")
GUEST_MAC = b"\x52\x54\0\0\0\1"

needs_passt = pytest.mark.skipif(shutil.which("passt") is None, reason="the package passt is not installed")


def route_to_nowhere() -> None:
    """What passt takes the guest's addresses from."""
    ip("tuntap add uplink mode tap")
    ip("link set uplink up")
    ip("addr add 198.51.100.2/24 dev uplink")
    ip("route add default via 198.51.100.1")


def read(fd: int, length: int) -> bytes:
    data = b""
    while len(data) < length:
        assert select.select([fd], [], [], HANG)[0]
        data += os.read(fd, length - len(data))
    return data


@needs_passt
@own_network
def test_it_answers_for_the_gateway_and_ends_with_the_backend() -> None:
    route_to_nowhere()
    with nothing_left_behind():
        backend = Passt()
        [fd] = backend.fds
        who_has = struct.pack(">HHBBH", 1, 0x800, 6, 4, 1) + GUEST_MAC + GUEST + bytes(6) + GATEWAY
        frame = b"\xff" * 6 + GUEST_MAC + b"\x08\x06" + who_has
        os.write(fd, struct.pack(">I", len(frame)) + frame)
        (length,) = struct.unpack(">I", read(fd, 4))
        answer = read(fd, length)
        assert answer[:6] == GUEST_MAC
        assert answer[12:14] == b"\x08\x06"
        assert answer[28:32] == GATEWAY
        process = backend._process
        assert process.poll() is None
        backend.close()
        backend.close()
        assert process.poll() is not None


@needs_passt
@own_network
def test_ports_lead_to_the_guest() -> None:
    route_to_nowhere()
    backend = Passt(hostfwd="tcp:127.0.0.1:2222-:22,tcp::8080-:80")
    for port in (2222, 8080):
        connect("127.0.0.1", port).close()
    backend.close()


def connect(host: str, port: int) -> socket.socket:
    deadline = time.monotonic() + HANG
    while True:
        try:
            return socket.create_connection((host, port), HANG)
        except ConnectionRefusedError:
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only directory in which programs are looked for."""
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def test_without_passt_the_message_names_the_package(programs: Path) -> None:
    with nothing_left_behind(), pytest.raises(ConfigError, match="install the package passt"):
        Passt()


def test_why_it_ended_is_logged(programs: Path, caplog: pytest.LogCaptureFixture) -> None:
    script = "#!/bin/sh\necho 'No interface' >&2\necho 'Failed to send 9 bytes to syslog' >&2\nexit 3\n"
    (programs / "passt").write_text(script)
    (programs / "passt").chmod(0o755)
    with nothing_left_behind(), caplog.at_level(logging.ERROR, "pyvirtio"):
        backend = Passt()
        backend._supervisor.join(HANG)
        backend.close()
    assert caplog.messages == ["passt ended with status 3: No interface"]


@pytest.mark.parametrize(
    ("hostfwd", "message"),
    [
        ("2222", r"hostfwd=2222 is not allowed: \[tcp\|udp\]:\[ADDRESS\]:PORT-:PORT, such as tcp::2222-:22"),
        ("tcp::2222-10.0.2.15:22", "is not allowed"),
        ("sctp::1-:1", "is not allowed"),
        ("tcp::1-:1,udp::0-:1", "hostfwd=udp::0-:1: port 0 is not allowed: 1 to 65535"),
        ("::65536-:1", "port 65536 is not allowed"),
    ],
)
def test_a_port_that_cannot_be(programs: Path, hostfwd: str, message: str) -> None:
    (programs / "passt").write_text("#!/bin/sh\n")
    (programs / "passt").chmod(0o755)
    with nothing_left_behind(), pytest.raises(ConfigError, match=message):
        Passt(hostfwd=hostfwd)


@pytest.mark.parametrize(("protocol", "kind"), [("tcp", socket.SOCK_STREAM), ("udp", socket.SOCK_DGRAM)])
def test_a_port_that_somebody_has(programs: Path, protocol: str, kind: socket.SocketKind) -> None:
    (programs / "passt").write_text("#!/bin/sh\n")
    (programs / "passt").chmod(0o755)
    with nothing_left_behind(), socket.socket(socket.AF_INET, kind) as somebody:
        somebody.bind(("127.0.0.1", 0))
        if protocol == "tcp":
            somebody.listen()
        forward = f"{protocol}:127.0.0.1:{somebody.getsockname()[1]}-:22"
        with pytest.raises(ConfigError, match=f"hostfwd={forward}: Address already in use"):
            Passt(hostfwd=forward)
