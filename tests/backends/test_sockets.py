"""Networks over sockets: who connects to whom, and what is wrong with an address."""

import errno
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pyvirtio.backends.net import NetBackend
from pyvirtio.backends.sockets import Dgram, Stream
from pyvirtio.errors import ConfigError
from pyvirtio.testing.plugin import nothing_left_behind
from pyvirtio.testing.queue import HANG


def free_port(kind: socket.SocketKind) -> int:
    with socket.socket(socket.AF_INET, kind) as finder:
        finder.bind(("127.0.0.1", 0))
        return int(finder.getsockname()[1])


def addresses(kind: str, tmp_path: Path) -> dict[str, Any]:
    if kind == "unix":
        return {"addr__type": "unix", "addr__path": tmp_path / "s"}
    return {"addr__type": "inet", "addr__host": "127.0.0.1", "addr__port": free_port(socket.SOCK_STREAM)}


def eventually(make: Callable[[], Any]) -> Any:
    """What `make` returns, once it can; the other side takes its time."""
    deadline = time.monotonic() + HANG
    while True:
        try:
            return make()
        except (ConfigError, OSError):
            assert time.monotonic() < deadline
            time.sleep(0.01)


def carries(one: NetBackend, other: NetBackend) -> None:
    for source, sink in ((one, other), (other, one)):
        eventually(lambda source=source: os.write(source.fds[0], b"frame"))  # type: ignore[misc]
        assert eventually(lambda sink=sink: os.read(sink.fds[0], 100)) == b"frame"  # type: ignore[misc]


@pytest.mark.parametrize("kind", ["unix", "inet"])
def test_a_server_and_a_client(tmp_path: Path, kind: str) -> None:
    with nothing_left_behind():
        ends: list[Stream] = []
        where = addresses(kind, tmp_path)
        waiting = threading.Thread(target=lambda: ends.append(Stream(**where, server=True)))
        waiting.start()
        ends.insert(0, eventually(lambda: Stream(**where)))
        waiting.join()
        assert [end.framing for end in ends] == ["stream"] * 2
        assert [end.vnet_header for end in ends] == [False] * 2
        carries(*ends)
        for end in ends:
            end.close()
            end.close()
        assert list(tmp_path.iterdir()) == []


def test_datagrams_over_udp() -> None:
    ports = [free_port(socket.SOCK_DGRAM), free_port(socket.SOCK_DGRAM)]
    here: dict[str, Any] = {"local__type": "inet", "local__host": "127.0.0.1"}
    there: dict[str, Any] = {"remote__type": "inet", "remote__host": "127.0.0.1"}
    with nothing_left_behind():
        ends = [Dgram(**here, **there, local__port=a, remote__port=b) for a, b in (ports, ports[::-1])]
        assert ends[0].framing == "datagram"
        carries(*ends)
        for end in ends:
            end.close()


def test_datagrams_over_unix_sockets_whose_peer_comes_and_goes(tmp_path: Path) -> None:
    def end(a: str, b: str) -> Dgram:
        return Dgram(local__type="unix", local__path=tmp_path / a, remote__type="unix", remote__path=tmp_path / b)

    with nothing_left_behind():
        one = end("a", "b")
        with pytest.raises(OSError, match=os.strerror(errno.ENOTCONN)):
            os.write(one.fds[0], b"nobody is there")
        for _ in range(2):
            other = end("b", "a")
            carries(one, other)
            other.close()
        one.close()
        assert list(tmp_path.iterdir()) == []


def test_mistakes_are_one_line_each(tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    unix: dict[str, Any] = {"addr__type": "unix"}
    taken = unix | {"addr__path": tmp_path / "taken"}
    inet: dict[str, Any] = {"addr__type": "inet"}
    local: dict[str, Any] = {"local__type": "unix", "local__path": tmp_path / "l"}
    four: dict[str, Any] = {"local__type": "inet", "local__host": "127.0.0.1", "local__port": 9}
    cases: list[tuple[Callable[[], object], str]] = [
        (lambda: Stream(**unix), "addr.path is required with addr.type=unix"),
        (lambda: Stream(**taken, addr__port=1), "addr.host and addr.port are not allowed with addr.type=unix"),
        (lambda: Stream(**inet, addr__path=tmp_path / "s"), "addr.path is not allowed with addr.type=inet"),
        (lambda: Stream(**inet, addr__port=1), "addr.host and addr.port are required with addr.type=inet"),
        (lambda: Stream(**inet, addr__host="127.0.0.1"), "addr.host and addr.port are required with addr.type=inet"),
        (lambda: Stream(**unix, addr__path=tmp_path / "s"), f"{tmp_path}/s: No such file or directory"),
        (
            lambda: Stream(**taken, server=True),
            f"{tmp_path}/taken: Address already in use",
        ),
        (
            lambda: Stream(**unix, addr__path=Path("x" * 200)),
            f"addr.path={'x' * 200}: 200 bytes, at most 107 are allowed",
        ),
        (lambda: Dgram(**local, remote__type="unix"), "remote.path is required with remote.type=unix"),
        (lambda: Dgram(**local, remote__type="inet"), "remote.type=inet: not the same as local.type=unix"),
        (
            lambda: Dgram(**local, remote__type="unix", remote__path=Path("x" * 108)),
            f"remote.path={'x' * 108}: 108 bytes, at most 107 are allowed",
        ),
        (
            lambda: Dgram(**four, remote__type="inet", remote__host="::1", remote__port=9),
            "remote.host=::1: not of the same address family as local.host=127.0.0.1",
        ),
    ]
    port = free_port(socket.SOCK_STREAM)
    refused = f"127.0.0.1:{port}: Connection refused"
    cases.append((lambda: Stream(**inet, addr__host="127.0.0.1", addr__port=port), refused))
    for make, message in cases:
        with nothing_left_behind(), pytest.raises(ConfigError) as caught:
            make()
        assert str(caught.value) == message
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
