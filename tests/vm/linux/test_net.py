"""What a Linux driver makes of our network device: over tap with and without vhost, with two queues, and over passt.

One guest has a card for each way, because a boot takes long where KVM itself is emulated.
"""

import ctypes
import hashlib
import http.server
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
from own_network import CLONE_NEWNET, ip

from pyvirtio.backends.net import NetBackend
from pyvirtio.backends.passt import Passt
from pyvirtio.backends.tap import Tap
from pyvirtio.devices.net import Net
from pyvirtio.testing.linux import LinuxGuest
from pyvirtio.transports.pci import VirtioPci
from pyvirtio.vhost.kernel import VhostNet

HANG_GUARD = 600
MIB = 1 << 20
BLOCK = os.urandom(MIB)
BLOCK_SHA256 = hashlib.sha256(BLOCK).hexdigest()
TRANSFER = 4 if "PYVIRTIO_LAB" in os.environ else 100
"""Blocks in a transfer: under emulation a guest takes few of them in a second, or less than one."""
PIECE = 64 * 1024
ETH_P_ALL = 3
TAPS = ("plain", "vhost", "queues")


@pytest.fixture(scope="module")
def network(kvm_that_runs_linux: None) -> Iterator[None]:
    """A network of these tests' own, with a route for passt to find that leads nowhere."""
    if os.geteuid() != 0:
        pytest.skip("tap interfaces with addresses need root")
    libc, before = ctypes.CDLL(None, use_errno=True), os.open("/proc/self/ns/net", os.O_RDONLY)
    assert libc.unshare(CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
    ip("link set lo up")
    ip("tuntap add uplink mode tap")
    ip("link set uplink up")
    ip("addr add 192.0.2.2/24 dev uplink")
    ip("route add default via 192.0.2.1")
    yield
    assert libc.setns(before, CLONE_NEWNET) == 0
    os.close(before)


@dataclass
class Card:
    """One network card: `name` in the guest, the host's and the guest's address on its tap."""

    pci: VirtioPci
    mac: str
    host: str
    address: str
    name: str = ""

    @property
    def backend(self) -> NetBackend:
        assert isinstance(self.pci.device, Net)
        return self.pci.device.netdev

    @property
    def modes(self) -> list[str]:
        """How the kicks of its queues travel."""
        return [self.pci.dataplane.notifiers.mode(vq.index) for vq in self.pci.dataplane.queues]


class Linux(LinuxGuest):
    """A guest with a card for each network."""

    def __init__(self) -> None:
        super().__init__(smp=2, modules=("virtio_pci", "virtio_net"))
        backends: dict[str, NetBackend] = {
            "plain": Tap(ifname="plain"),
            "vhost": Tap(ifname="vhost", vhostforce=True),
            "queues": Tap(ifname="queues", queues=2, vhostforce=True),
            "passt": Passt(),
        }
        self.cards = {name: self._add(number, name, backend) for number, (name, backend) in enumerate(backends.items())}

    def _add(self, number: int, name: str, backend: NetBackend) -> Card:
        mac = f"52:54:00:00:00:{number:02x}"
        host, address = f"198.51.100.{16 * number + 1}", f"198.51.100.{16 * number + 2}"
        if isinstance(backend, Tap):
            ip(f"link set {name} up")
            ip(f"addr add {host}/28 dev {name}")
        else:
            host, address = "192.0.2.1", "192.0.2.2"
        return Card(self.plug(Net(backend, mac=mac), name), mac, host, address)

    def set_up(self) -> None:
        """Find the cards, whose names depend on the order in which the driver does, and give them addresses."""
        for card in self.cards.values():
            card.name = self.run(f"grep -l {card.mac} /sys/class/net/*/address").split("/")[4]
            self.run(f"ip link set {card.name} up; ip addr add {card.address}/28 dev {card.name}")

    def download(self, card: Card, blocks: int = TRANSFER) -> None:
        """Send the guest that many blocks, and compare the checksums."""
        with serving(card, partial(send_blocks, blocks)) as port:
            got = self.run(f"nc {card.host} {port} </dev/null | sha256sum", timeout=HANG_GUARD).split()[0]
        assert got == hashlib.sha256(BLOCK * blocks).hexdigest()

    def download_during(self, card: Card, over: Callable[[], bool]) -> None:
        """Send the guest one stream until it is over, and compare the checksums."""
        digest = hashlib.sha256()
        with serving(card, partial(send_until, over, digest)) as port:
            got = self.run(f"nc {card.host} {port} </dev/null | sha256sum", timeout=HANG_GUARD).split()[0]
        assert got == digest.hexdigest()

    def upload_during(self, card: Card, over: Callable[[], bool]) -> None:
        """Have the guest send one block again and again until it is over; all of them are compared."""
        own = self.block()
        received: list[str] = []
        with serving(card, partial(receive_blocks, received, over=over)) as port:
            self.send(card, port, "while cat /tmp/block 2>&-; do :; done")
        assert set(received) == {own}

    def block(self) -> str:
        """The checksum of what the guest sends, a block of its own."""
        made = "[ -e /tmp/block ] || head -c 1048576 /dev/urandom >/tmp/block; sha256sum </tmp/block"
        return self.run(made).split()[0]

    def upload(self, card: Card, blocks: int = TRANSFER) -> None:
        """Have the guest send that many blocks of its own; the checksum of each is compared."""
        own = self.block()
        received: list[str] = []
        with serving(card, partial(receive_blocks, received)) as port:
            self.send(card, port, f"n=0; while [ $n -lt {blocks} ]; do cat /tmp/block; n=$((n+1)); done")
        assert received == [own] * blocks

    def send(self, card: Card, port: int, output: str) -> None:
        """What shell text prints goes to the socket itself: through a pipe, nc would send it in pieces of 1 KiB."""
        self.run(f"nc {card.host} {port} -e sh -c '{output}' || true", timeout=HANG_GUARD)


def send_blocks(blocks: int, connection: socket.socket) -> None:
    for _ in range(blocks):
        connection.sendall(BLOCK)


def send_until(over: Callable[[], bool], digest: "hashlib._Hash", connection: socket.socket) -> None:
    while not over():
        piece = os.urandom(PIECE)
        connection.sendall(piece)
        digest.update(piece)


def receive_blocks(checksums: list[str], connection: socket.socket, over: Callable[[], bool] = lambda: False) -> None:
    with connection.makefile("rb") as file:
        while not over() and (block := file.read(MIB)):
            checksums.append(hashlib.sha256(block).hexdigest())


@contextmanager
def serving(card: Card, answer: Callable[[socket.socket], None]) -> Iterator[int]:
    """Answer one connection to the port; an error of `answer` is raised in the end."""
    failed: list[BaseException] = []

    def serve() -> None:
        try:
            with listener.accept()[0] as connection:
                connection.settimeout(HANG_GUARD)
                answer(connection)
        except BaseException as error:
            failed.append(error)

    with socket.create_server((card.host, 0)) as listener:
        listener.settimeout(HANG_GUARD)
        thread = threading.Thread(target=serve)
        thread.start()
        yield int(listener.getsockname()[1])
        thread.join()
    if failed:
        raise failed[0]


@pytest.fixture(scope="module")
def linux(network: None) -> Iterator[Linux]:
    with Linux() as guest:
        guest.boot()
        guest.set_up()
        yield guest


@contextmanager
def meanwhile(act: Callable[[int], object], seconds: float = 0.2) -> Iterator[list[int]]:
    """Call `act` with 0, 1, 2, ... in the background, with a pause after each; the list grows with them."""
    done, turns, failed = threading.Event(), list[int](), list[BaseException]()

    def run() -> None:
        try:
            while not done.wait(seconds):
                act(len(turns))
                turns.append(len(turns))
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield turns
    finally:
        done.set()
        thread.join()
    if failed:
        raise failed[0]


def vhost_of(card: Card) -> VhostNet:
    assert card.pci.vhost is not None
    return card.pci.vhost


@pytest.mark.parametrize("name", TAPS)
def test_ping(linux: Linux, name: str) -> None:
    card = linux.cards[name]
    assert " 0% packet loss" in linux.run(f"ping -c 3 -i 0.1 -W 10 {card.host}")
    pairs = card.pci.dataplane.queues[:-1]
    assert card.modes == ["ioeventfd" if name == "plain" else "vhost"] * len(pairs) + ["ioeventfd"]


@pytest.mark.parametrize("name", TAPS)
def test_tcp_each_way(linux: Linux, name: str) -> None:
    card = linux.cards[name]
    linux.download(card)
    linux.upload(card)
    if name != "plain":
        frames = [vq.counters["chains"] for vq in card.pci.dataplane.queues[:-1]]
        assert not any(frames), "the kernel moved them all"


def test_the_driver_uses_both_queue_pairs(linux: Linux) -> None:
    name = linux.cards["queues"].name
    assert linux.run(f"ls /sys/class/net/{name}/queues").split() == ["rx-0", "rx-1", "tx-0", "tx-1"]
    backend = linux.cards["queues"].backend
    assert isinstance(backend, Tap)
    assert backend.attached == 2


def test_give_and_take_back_ten_times_during_a_transfer_each_way(linux: Linux) -> None:
    """Between vhost and the plane, with ioeventfd switched and the machine paused as well."""
    card = linux.cards["queues"]

    def turn(number: int) -> None:
        vhost_of(card).enabled = number % 2 == 1
        if number % 3 == 0:
            card.pci.ioeventfd = not card.pci.ioeventfd
        if number % 5 == 4:
            linux.machine.pause()
            linux.machine.resume()

    for transfer in (linux.download_during, linux.upload_during):
        with meanwhile(turn) as turns:
            transfer(card, lambda turns=turns: len(turns) >= 20)  # type: ignore[misc]
    card.pci.ioeventfd = vhost_of(card).enabled = True
    assert card.modes == ["vhost"] * 4 + ["ioeventfd"]
    linux.download(card, 1)


@pytest.mark.parametrize("name", ["plain", "vhost"])
def test_the_mtu_changes(linux: Linux, name: str) -> None:
    card = linux.cards[name]
    for mtu in (9000, 1280, 1500):
        ip(f"link set {name} mtu {mtu}")
        linux.run(f"ip link set {card.name} mtu {mtu}")
        with longest_frame(name) as longest:
            assert " 0% packet loss" in linux.run(f"ping -c 1 -W 10 -s {mtu - 28} {card.host}")
        assert longest == [mtu + 14]


@pytest.mark.parametrize("name", ["plain", "vhost"])
def test_no_frame_passes_while_the_cable_is_out(linux: Linux, name: str) -> None:
    card = linux.cards[name]
    net = card.pci.device
    assert isinstance(net, Net)
    modes = card.modes
    net.set_link(False)
    linux.run(f"until grep -q 0 /sys/class/net/{card.name}/carrier; do sleep 0.1; done")
    assert card.modes == ["ioeventfd"] * 3
    assert linux.run(f"ping -c 1 -W 1 {card.host} >/dev/null || echo none") == "none"
    net.set_link(True)
    linux.run(f"until grep -q 1 /sys/class/net/{card.name}/carrier; do sleep 0.1; done")
    assert card.modes == modes
    assert " 0% packet loss" in linux.run(f"ping -c 1 -W 10 {card.host}")


@contextmanager
def longest_frame(ifname: str) -> Iterator[list[int]]:
    """The length of the longest frame that passes the interface meanwhile."""
    longest: list[int] = []
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL)) as tap:
        tap.bind((ifname, ETH_P_ALL))
        yield longest
        tap.setblocking(False)
        lengths = []
        with suppress(BlockingIOError):
            while True:
                lengths.append(len(tap.recv(1 << 16)))
        longest.append(max(lengths))


def test_the_driver_is_reloaded_during_traffic(linux: Linux) -> None:
    """Frames for the guest come all the time, and the guest sends until its cards go."""
    taps = [linux.cards[name] for name in TAPS]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as host:

        def send(_: int) -> None:
            for card in taps:
                with suppress(OSError):
                    host.sendto(bytes(1000), (card.address, 9))

        with meanwhile(send, 0.002) as sent:
            for card in taps:
                linux.run(f"ping -i 0.01 -w 1000 {card.host} >/dev/null 2>&1 &")
            linux.run("rmmod virtio_net && insmod /modules/virtio_net.ko && { killall ping; true; }")
            linux.set_up()
            assert [card.modes for card in taps] == [
                ["ioeventfd"] * 3,
                ["vhost"] * 2 + ["ioeventfd"],
                ["vhost"] * 4 + ["ioeventfd"],
            ]
            for card in taps:
                assert " 0% packet loss" in linux.run(f"ping -c 1 -W 10 {card.host}")
    assert sent
    for card in taps:
        linux.download(card, 1)


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves files without a word on standard error."""

    def log_message(self, *_: object) -> None:
        pass


def test_a_file_comes_over_passt_by_http(linux: Linux, tmp_path: Path) -> None:
    """From the host's loopback, which is behind the address of the gateway."""
    card = linux.cards["passt"]
    (tmp_path / "file").write_bytes(BLOCK)
    handler = partial(Quiet, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        url = f"http://{card.host}:{server.server_port}/file"
        got = linux.run(f"wget -q -O - {url} | sha256sum", timeout=HANG_GUARD).split()[0]
        server.shutdown()
        thread.join()
    assert got == BLOCK_SHA256


def test_the_driver_had_nothing_to_complain_about(linux: Linux) -> None:
    complaints = "error|nobody cared|warning:|bug:|blocked for more|invalid|lockup|stall|timed out|unexpected"
    assert linux.run(f"dmesg | sed '1,/Run .init/d' | grep -iE '{complaints}' || true") == ""
