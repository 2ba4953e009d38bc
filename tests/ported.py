"""A Linux guest with a console, ports, a balloon and disks; run as a program, it goes on from a snapshot of one.

    python ported.py DIRECTORY

prints, as JSON, what the line that ran when the snapshot was taken still said, and what the guest finds afterwards.
"""

import json
import os
import socket
import sys
from pathlib import Path

from pyvirtio.backends.block import File
from pyvirtio.backends.chardev import Socket
from pyvirtio.devices.balloon import Balloon
from pyvirtio.devices.blk import Blk
from pyvirtio.devices.console import Console
from pyvirtio.devices.rng import Rng
from pyvirtio.testing.linux import LinuxGuest
from pyvirtio.vmm.machine import Outcome

MIB = 1 << 20
MEMORY = 192 * MIB
AGENT = "org.example.agent"
SNAPSHOT = "guest.snapshot"
MODULES = ("virtio_pci", "virtio_blk", "virtio_console", "virtio_balloon", "virtio_rng")


class Ported(LinuxGuest):
    """Disks `read` and `written` in `directory`; `console` and `agent` are the host's ends of two ports."""

    def __init__(self, directory: Path) -> None:
        super().__init__(memory=MEMORY, smp=2, modules=MODULES)
        self.directory = directory
        self.blk = self.plug(Blk(File(directory / "read.img"), num_queues=2), "read")
        self.plug(Blk(File(directory / "written.img")), "written", vectors=0)
        ports = [Socket(name, path=directory / name, server=True) for name in ("console", AGENT)]
        self.plug(Console(ports[0], ports=ports[1:]), "console0")
        self.balloon = Balloon(free_page_reporting=True)
        self.plug(self.balloon, "balloon0")
        self.plug(Rng(), "rng0")
        self.console, self.agent = (self._connect(directory / name) for name in ("console", AGENT))

    def _connect(self, path: Path) -> socket.socket:
        peer = socket.socket(socket.AF_UNIX)
        peer.settimeout(60)
        peer.connect(str(path))
        return peer

    def close(self) -> None:
        self.console.close()
        self.agent.close()
        super().close()

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
        found["port"] = guest._finish("port", None, 60)
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
