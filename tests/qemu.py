"""QEMU (TCG, so that it runs anywhere) as the front-end of served devices."""

import json
import socket
import subprocess
from pathlib import Path
from typing import Any, Self

from pyvirtio.lab import initrd
from pyvirtio.lab.kernel import find_kernel

QEMU = "qemu-system-x86_64"
HANG_GUARD = 120

INIT = """#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
while read -r module; do insmod "/modules/$module"; done </modules/order
"""
"""How an init script begins that needs its modules."""


def command(directory: Path, *arguments: str, memory: str = "64M") -> list[str]:
    """A machine whose memory is shared; what its guest prints goes to the file `serial`."""
    machine = [QEMU, "-accel", "tcg", "-nodefaults", "-display", "none", "-serial", f"file:{directory / 'serial'}"]
    machine += ["-object", f"memory-backend-memfd,id=mem,size={memory},share=on", "-no-reboot"]
    return [*machine, "-machine", "q35,memory-backend=mem", "-m", memory, *arguments]


def linux(
    directory: Path, script: str, *arguments: str, modules: tuple[str, ...], append: str = "", memory: str = "256M"
) -> list[str]:
    """A machine with two CPUs that boots Linux, with `append` for the kernel, loads `modules` and runs `script`."""
    kernel = find_kernel()
    (directory / "initrd").write_bytes(initrd.build(kernel, INIT + script, modules=("virtio_pci", *modules)))
    boot = ["-smp", "2", "-kernel", str(kernel.image), "-initrd", str(directory / "initrd")]
    # The kernel's tests of its ciphers once did not end on the second of two emulated CPUs.
    append = f"console=ttyS0 quiet panic=-1 cryptomgr.notests {append}"
    return command(directory, *boot, "-append", append, *arguments, memory=memory)


def run(machine: list[str], directory: Path) -> bytes:
    """What the guest prints until the machine ends."""
    subprocess.run(machine, timeout=HANG_GUARD, check=False)
    return (directory / "serial").read_bytes()


class Monitor:
    """QEMU's machine protocol, at the socket `path`."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(HANG_GUARD)
        self.socket.connect(str(path))
        self.lines = self.socket.makefile("rb")
        self.lines.readline()
        self.execute("qmp_capabilities")

    def execute(self, command: str, **arguments: object) -> Any:
        self.socket.sendall(json.dumps({"execute": command, "arguments": arguments}).encode())
        for line in self.lines:
            answer = json.loads(line)
            assert "error" not in answer, answer
            if "return" in answer:
                return answer["return"]
        raise ConnectionError("QEMU has gone")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.lines.close()
        self.socket.close()


def vhost_user(name: str, socket: Path, device: str, *, reconnect: bool = False) -> list[str]:
    """The options for one served device."""
    again = ",reconnect=1" if reconnect else ""
    return ["-chardev", f"socket,id={name},path={socket}{again}", "-device", f"{device},chardev={name}"]


def vhost_user_net(name: str, socket: Path, *properties: str, queues: int = 1) -> list[str]:
    """The options for one served network card; without MSI-X, for which QEMU 7.2 crashes unless there is KVM."""
    chardev = ["-chardev", f"socket,id={name}chr,path={socket}"]
    netdev = ["-netdev", f"vhost-user,id={name},chardev={name}chr,queues={queues}"]
    return [*chardev, *netdev, "-device", ",".join(["virtio-net-pci", f"netdev={name}", "vectors=0", *properties])]
