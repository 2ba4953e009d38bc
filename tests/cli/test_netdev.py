"""`--netdev`: what a user writes, and what is wrong with it."""

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from own_network import own_network

from pyvirtio.backends.net import Pair
from pyvirtio.backends.tap import Tap
from pyvirtio.cli import netdev
from pyvirtio.cli.netdev import Netdev
from pyvirtio.cli.outputs import Outputs
from pyvirtio.errors import ConfigError
from pyvirtio.testing.plugin import nothing_left_behind


@pytest.fixture
def closing() -> Iterator[ExitStack]:
    with nothing_left_behind(), ExitStack() as stack:
        yield stack


def opened(closing: ExitStack, *texts: str) -> dict[str, Netdev]:
    return netdev.open_netdevs(list(texts), closing.enter_context(Outputs()), closing.callback)


def test_the_ends_of_a_pair_find_each_other(closing: ExitStack) -> None:
    netdevs = opened(closing, "pair,id=left", "pair,id=other", "pair,id=right,peer=left")
    assert [str(each.backend) for each in netdevs.values()] == ["pair"] * 3
    os.write(netdevs["left"].backend.fds[0], b"frame")
    assert os.read(netdevs["right"].backend.fds[0], 100) == b"frame"


def test_any_network_can_be_captured(closing: ExitStack, tmp_path: Path) -> None:
    (tmp_path / "old").write_bytes(b"an older capture")
    backend = opened(closing, f"pair,id=n0,pcap={tmp_path / 'old'}")["n0"].backend
    assert backend.pcap is not None
    assert (tmp_path / "old").read_bytes() == b""
    os.write(backend.pcap, b"header")
    assert (tmp_path / "old").read_bytes() == b"header"


HUB = """
from typing import Annotated
from pyvirtio.backends.net import NetBackend

class Hub(NetBackend):
    def __init__(self, *, ports: Annotated[int, "how many"] = 4) -> None:
        if ports > 8:
            raise RuntimeError("too large")
        self.ports = ports

    def send(self, frame: bytes) -> None:
        pass
"""


def test_a_network_of_the_users_own(closing: ExitStack, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(HUB)
    backend = opened(closing, f"{tmp_path}/mine.py:Hub,id=n0,ports=8")["n0"].backend
    assert (str(backend), vars(backend)["ports"]) == ("hub", 8)
    with pytest.raises(ConfigError, match=r"n1: Hub.__init__ raised RuntimeError: too large \(mine.py:8\)"):
        opened(closing, f"{tmp_path}/mine.py:Hub,id=n1,ports=9")


@own_network
def test_a_tap_takes_qemus_words() -> None:
    with nothing_left_behind(), ExitStack() as closing:
        text = "tap,id=n0,ifname=tap7,script=no,downscript=no,queues=2,vhost=off"
        backend = opened(closing, text)["n0"].backend
        assert isinstance(backend, Tap)
        assert (backend.ifname, backend.queue_pairs, backend.vhost_fds) == ("tap7", 2, ())
        assert str(backend) == "tap tap7, 2 queues"


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["id=n0"], "--netdev: type= is required"),
        (["tapp,id=n0"], "--netdev: unknown network 'tapp', did you mean tap? (known: tap, user, stream, dgram, pair,"),
        (["pair"], "--netdev pair: id= is required"),
        (["pair,id=a", "pair,id=a"], "--netdev pair: id=a is already in use"),
        (["pair,id=b,peer=a"], "b: peer=a is not the id of a --netdev (there are: none)"),
        (["pair,id=a", "pair,id=b,peer=a", "pair,id=c,peer=a"], "c: peer: a cable has two ends, and this one has both"),
        (["pair,id=a,pcap=/nowhere/file"], "a: pcap=/nowhere/file: No such file or directory"),
        (["pair,id=a,bridge=br0"], "a: unknown property 'bridge' (known: peer, pcap)"),
        (["tap,id=n0,queues=257"], "n0: queues=257 is not allowed: an integer, 1 to 256"),
        (["tap,id=n0,script=/etc/qemu-ifup"], "n0: script=/etc/qemu-ifup is not allowed: no"),
        (["stream,id=n0,addr.type=unix"], "n0: addr.path is required with addr.type=unix"),
        (["stream,id=n0,addr.type=fd"], "n0: addr.type=fd is not allowed: unix or inet"),
        (["stream,id=n0,addr.type=inet,addr.port=0"], "n0: addr.port=0 is not allowed: an integer, 1 to 65535"),
        (["dgram,id=n0,local.type=unix"], "n0: remote.type is required: unix or inet"),
        (["user,id=n0,hostfwd=tcp::1-:1,hostfwd=x"], "n0: hostfwd=x is not allowed: "),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(texts: list[str], message: str) -> None:
    with nothing_left_behind(), ExitStack() as closing, pytest.raises(ConfigError) as caught:
        opened(closing, *texts)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_no_capture_of_what_does_not_come_by(
    closing: ExitStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pair, "vhost_fds", [1])
    with pytest.raises(ConfigError, match="n0: pcap: with vhost the frames do not come by here"):
        opened(closing, f"pair,id=n0,pcap={tmp_path / 'p'}")
    assert list(tmp_path.iterdir()) == []


def test_help_lists_the_kinds_and_their_properties(capsys: pytest.CaptureFixture[str]) -> None:
    assert not netdev.show_help(["pair,id=n0"])
    assert netdev.show_help(["help"])
    kinds = capsys.readouterr().out
    assert all(kind in kinds for kind in netdev.KINDS)
    assert netdev.show_help(["stream,help"])
    properties = capsys.readouterr().out
    assert all(name in properties for name in ("addr.type", "addr.path", "server", "pcap"))
