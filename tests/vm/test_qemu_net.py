"""QEMU's own stream and datagram networks are the other ends of ours: it passes frames from one to the other."""

import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pyvirtio.backends.net import NetBackend
from pyvirtio.backends.sockets import Dgram, Stream
from pyvirtio.bench.servers import is_listened_at
from pyvirtio.devices.net import Net
from pyvirtio.testing import Guest
from pyvirtio.testing.net import Nic, frame

QEMU = "qemu-system-x86_64"
HANG_GUARD = 60

pytestmark = pytest.mark.skipif(not shutil.which(QEMU), reason=f"{QEMU} is not installed")


@contextmanager
def qemu(directory: Path, *netdevs: str) -> Iterator[None]:
    """A QEMU without a machine, whose networks are plugged into one hub."""
    command = [QEMU, "-machine", "none", "-nodefaults", "-display", "none"]
    for number, netdev in enumerate(netdevs):
        command += ["-netdev", f"{netdev},id=n{number}", "-netdev", f"hubport,id=h{number},hubid=0,netdev=n{number}"]
    with subprocess.Popen(command, cwd=directory, stdin=subprocess.DEVNULL) as process:
        try:
            yield
        finally:
            process.kill()


def dgram(directory: Path) -> Dgram:
    return Dgram(
        local__type="unix", local__path=directory / "ours", remote__type="unix", remote__path=directory / "qemus"
    )


def nic_on(guest: Guest, backend: NetBackend) -> Nic:
    driver = guest.plug(Net(backend))
    return Nic(driver, driver.features)


def test_frames_pass_from_our_stream_through_qemu_to_our_datagrams(guest: Guest, tmp_path: Path) -> None:
    datagrams = dgram(tmp_path)
    with qemu(
        tmp_path,
        "stream,server=on,addr.type=unix,addr.path=stream",
        "dgram,local.type=unix,local.path=qemus,remote.type=unix,remote.path=ours",
    ):
        nics = [nic_on(guest, connected(tmp_path / "stream")), nic_on(guest, datagrams)]
        for sender, receiver in (nics, nics[::-1]):
            until_it_passes(sender, receiver)
            for number in range(1, 300):
                receiver.post()
                sender.send(frame(number, 60 + 4 * number)).wait()
                while (got := receiver.receive().frame) == frame(0):
                    receiver.post()
                assert got == frame(number, 60 + 4 * number)


def connected(path: Path) -> Stream:
    deadline = time.monotonic() + HANG_GUARD
    while not is_listened_at(Path(path.name)):  # as QEMU was told, in its directory
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return Stream(addr__type="unix", addr__path=path)


def until_it_passes(sender: Nic, receiver: Nic) -> None:
    """A datagram socket has its peer a moment after that is there; frames until then are lost."""
    receiver.post()
    deadline = time.monotonic() + HANG_GUARD
    while not receiver.received:
        assert time.monotonic() < deadline
        sender.send(frame(0)).wait()
        receiver.post()
        time.sleep(0.05)
