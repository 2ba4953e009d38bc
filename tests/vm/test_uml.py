"""User-mode Linux, whose own virtio transport speaks vhost-user, uses what `pyvirtio serve` serves."""

import hashlib
import os
import shutil
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest
from serving import programs

from pyvirtio.lab import initrd
from pyvirtio.lab.kernel import InstalledKernel

UML = "linux.uml"
HANG_GUARD = 60
NET, BLOCK = 1, 2
"""The type of a virtio device, which is all that the command line says of it."""
MIB = 1 << 20

pytestmark = pytest.mark.skipif(not shutil.which(UML), reason=f"{UML} is not installed (package user-mode-linux)")

INIT = """#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
mount -t devtmpfs dev /dev
mount -t sysfs sysfs /sys
while read -r module; do insmod "/modules/$module"; done </modules/order
"""
DISK = """
echo "disk $(sha256sum </dev/vda)"
dd if=/dev/urandom of=/dev/vda bs=64k count=8 seek=8 conv=fsync 2>/dev/null
echo 3 >/proc/sys/vm/drop_caches
echo "written $(sha256sum </dev/vda)"
poweroff -f
"""


def kernel() -> InstalledKernel:
    (modules,) = Path("/usr/lib/uml/modules").iterdir()
    return InstalledKernel(modules.name, Path(str(shutil.which(UML))), modules)


def test_user_mode_linux_reads_and_writes_the_disk(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(os.urandom(4 * MIB))
    before = hashlib.sha256(image.read_bytes()).hexdigest()
    with programs(tmp_path) as start:
        start("blk", "--blk-file", "disk.img", "--socket-path", "s")
        printed = run(DISK, ("virtio_blk",), {"s": BLOCK}, tmp_path)
    assert f"disk {before}" in printed, printed
    after = hashlib.sha256(image.read_bytes()).hexdigest()
    assert after != before
    assert f"written {after}" in printed, printed


CABLE = """
unshare -n sleep 1000 &
other=$!
sleep 0.2
ip link set eth1 netns $other
nsenter -t $other -n ifconfig eth1 10.0.0.2 up
ifconfig eth0 10.0.0.1 up
ping -c 5 -i 0.2 -s 1400 10.0.0.2
poweroff -f
"""


def test_user_mode_linux_pings_itself_across_a_cable_between_two_network_cards(tmp_path: Path) -> None:
    """The second card is in a network namespace of its own."""
    devices = [option for name in "ab" for option in ("--device", f"net,netdev={name},socket-path={name}")]
    with programs(tmp_path) as start:
        start("--netdev", "pair,id=a", "--netdev", "pair,id=b,peer=a", *devices)
        printed = run(CABLE, ("virtio_net",), {"a": NET, "b": NET}, tmp_path)
    assert "5 packets transmitted, 5 packets received" in printed, printed


def run(script: str, modules: tuple[str, ...], sockets: dict[str, int], directory: Path) -> str:
    """What it prints. Its processes end with it, whatever state they are in."""
    (directory / "initrd").write_bytes(initrd.build(kernel(), INIT + script, modules=modules))
    command = [UML, "mem=64M", f"initrd={directory / 'initrd'}", "root=/dev/ram0", "rw", "quiet"]
    command += ["con=null", "con0=fd:0,fd:1"]
    command += [f"virtio_uml.device={directory / name}:{kind}" for name, kind in sockets.items()]
    printed = directory / "printed"
    with (
        printed.open("wb") as out,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=out, stderr=out, process_group=0) as linux,
    ):
        try:
            linux.wait(HANG_GUARD)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(linux.pid, signal.SIGKILL)
    return printed.read_text(errors="replace")
