"""A Linux guest with a console, ports, a balloon, disks and network cards; as a program it goes on from a snapshot.

    python ported.py DIRECTORY

prints, as JSON, what the line that ran when the snapshot was taken still said, and what the guest finds afterwards.
"""

import gc
import json
import os
import socket
import sys
from pathlib import Path

from pyvirtio.backends.block import File
from pyvirtio.backends.chardev import Socket
from pyvirtio.backends.tap import Tap
from pyvirtio.devices.balloon import Balloon
from pyvirtio.devices.blk import Blk
from pyvirtio.devices.console import Console
from pyvirtio.devices.net import Net
from pyvirtio.devices.rng import Rng
from pyvirtio.testing.linux import LinuxGuest
from pyvirtio.vmm.machine import Outcome

MIB = 1 << 20
MEMORY = 192 * MIB
AGENT = "org.example.agent"
SNAPSHOT = "guest.snapshot"
MODULES = ("virtio_pci", "virtio_blk", "virtio_net", "virtio_console", "virtio_balloon", "virtio_rng")
TAPS = {"plain": ("198.51.100.1", "198.51.100.2"), "vhost": ("198.51.100.17", "198.51.100.18")}
"""Interfaces that outlive a process, with the addresses of host and guest; none for a user who may not make them."""
if os.geteuid() != 0:
    TAPS.clear()


class Ported(LinuxGuest):
    """Disks `read` and `written` in `directory`; `console` and `agent` are the host's ends of two ports.

    The network cards are on `TAPS`, which exist; the frames of one are moved by the kernel's vhost-net.
    """

    def __init__(self, directory: Path) -> None:
        super().__init__(memory=MEMORY, smp=2, modules=MODULES)
        self.directory = directory
        self.blk = self.plug(Blk(File(directory / "read.img"), num_queues=2), "read")
        self.written = Blk(File(directory / "written.img"))
        self.plug(self.written, "written", vectors=0)
        ports = [Socket(name, path=directory / name, server=True) for name in ("console", AGENT)]
        self.plug(Console(ports[0], ports=ports[1:]), "console0")
        self.balloon = Balloon(free_page_reporting=True)
        self.plug(self.balloon, "balloon0")
        self.plug(Rng(), "rng0")
        self.cards = [self._card(number, name) for number, name in enumerate(TAPS)]
        self.console, self.agent = (self._connect(directory / name) for name in ("console", AGENT))

    def _card(self, number: int, name: str) -> Net:
        card = Net(Tap(ifname=name, vhostforce=name == "vhost"), mac=f"52:54:00:00:00:0{number}")
        self.plug(card, name)
        return card

    def _connect(self, path: Path) -> socket.socket:
        peer = socket.socket(socket.AF_UNIX)
        peer.settimeout(60)
        peer.connect(str(path))
        return peer

    def close(self) -> None:
        self.console.close()
        self.agent.close()
        super().close()
        # A network device keeps its tap open for as long as somebody keeps the device.
        vars(self).update(dict.fromkeys(("machine", "blk", "written", "balloon", "cards")))
        gc.collect()

    @property
    def held(self) -> int:
        """Bytes of the host that the memory of the guest takes."""
        return os.fstat(self.machine.memory.regions[0][2]).st_blocks * 512


def receive_until(peer: socket.socket, end: bytes) -> bytes:
    data = b""
    while end not in data:
        more = peer.recv(4096)
        assert more, data
        data += more
    return data


def main(directory: Path) -> None:
    with Ported(directory) as guest:
        found = {"line": guest.restore(directory / SNAPSHOT)}
        found["again"] = guest.run("sum /dev/vda; sum /dev/vdb")
        guest.type(f"head -n 1 </dev/virtio-ports/{AGENT}")
        guest.agent.send(b"still there\n")
        found["port"] = guest.finish("port", 60)
        found["received"] = guest.run("wait; cut -d' ' -f1 /tmp/received*") if TAPS else ""
        found["complaints"] = guest.dmesg("snapshot")
        guest.balloon.target = 64 * MIB // 4096
        found["balloon"] = guest.run(
            "until [ $(awk '/MemTotal/{print $2}' /proc/meminfo) -lt 130000 ]; do sleep 0.1; done"
        )
        guest.type("poweroff -f")
        assert guest.wait() is Outcome.POWEROFF
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
