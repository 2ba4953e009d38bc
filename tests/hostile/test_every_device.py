"""Malformed chains for every type of device: it asks for a reset, and after that it serves again."""

from collections.abc import Callable
from pathlib import Path

import pytest

from pyvirtio.backends.block import File, Memory
from pyvirtio.backends.chardev import Null
from pyvirtio.backends.net import NetBackend
from pyvirtio.device import Device
from pyvirtio.devices import DEVICES, load
from pyvirtio.devices.blk import Blk
from pyvirtio.devices.console import Console
from pyvirtio.devices.net import Net
from pyvirtio.testing import Guest
from pyvirtio.testing.ring import INDIRECT, NEXT, WRITE, Desc

pytestmark = pytest.mark.guest(transport=("modern", "vhost-user"))
MIB = 1 << 20


def raw_file(directory: Path) -> Device:
    (directory / "disk.img").write_bytes(bytes(MIB))
    return Blk(File(directory / "disk.img"))


MADE: dict[str, Callable[[Path], Device]] = {
    "blk": lambda _: Blk(Memory(MIB)),
    "blk, a raw file": raw_file,
    "console": lambda _: Console(Null(), ports=[Null("port")]),
    "net": lambda _: Net(NetBackend()),
}
"""Devices that need something to be made with."""
IDLE = ("receiveq", "statsq")
"""How the queues are called that a device may look at only when it has something to say."""
MALFORMED = {
    "a loop": [Desc(0x8000, 16, NEXT, 1), Desc(0x8000, 16, NEXT, 0)],
    "next past the table": [Desc(0x8000, 16, NEXT, 0xFFF0)],
    "all ones": [Desc(2**64 - 1, 2**32 - 1, 0xFFFF, 0xFFFF)],
    "outside RAM": [Desc(1 << 45, 16, WRITE)],
    "address wraps": [Desc(2**64 - 8, 16, WRITE)],
    "longer than 2^32": [Desc(0x8000, 16, NEXT, 1), Desc(0x8000, 2**32 - 1)],
    "readable after writable": [Desc(0x8000, 16, WRITE | NEXT, 1), Desc(0x8000, 16)],
    "a table of 15 bytes": [Desc(0x8000, 15, INDIRECT)],
    "a table with next": [Desc(0x8000, 16, INDIRECT | NEXT, 1), Desc(0x8000, 16)],
    "a table outside RAM": [Desc(1 << 45, 16, INDIRECT)],
}


@pytest.mark.parametrize("chain", MALFORMED)
@pytest.mark.parametrize("name", dict.fromkeys([*MADE, *DEVICES]))
def test_a_malformed_chain_breaks_the_device_until_it_is_reset(
    guest: Guest, tmp_path: Path, name: str, chain: str
) -> None:
    driver = guest.plug(MADE[name](tmp_path) if name in MADE else load(name)())
    for index in [vq.index for vq in driver.queues if not any(name in vq.name for name in IDLE)]:
        vq = driver.queues[index]
        for n, desc in enumerate(MALFORMED[chain]):
            vq.ring.write_desc(n, desc)
        vq.ring.offer(0)
        with guest.only_writes(vq.ring.used_range, (vq.ring.avail, 4)):
            vq.kick()
            assert vq.name in driver.wait_needs_reset()
        driver.start()
        assert driver.why_broken is None
