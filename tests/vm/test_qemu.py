"""Guests under QEMU (TCG, so they run anywhere) use what `pyvirtio serve` serves over vhost-user."""

import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import bootdisk
import pytest
from code16 import out
from serving import programs

from pyvirtio.lab import initrd
from pyvirtio.lab.kernel import find_kernel

QEMU = "qemu-system-x86_64"
HANG_GUARD = 120
SECTORS = 500
EXIT_PORT = 0x501

pytestmark = pytest.mark.skipif(not shutil.which(QEMU), reason=f"{QEMU} is not installed")


@pytest.fixture
def server(tmp_path: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """Serves the disk at `s`."""
    (tmp_path / "disk.img").write_bytes(bootdisk.image(SECTORS, leave=out(EXIT_PORT, 0)))
    with programs(tmp_path) as start:
        yield start("blk", "--blk-file", "disk.img", "--socket-path", "s")


def qemu(tmp_path: Path, *arguments: str, memory: str = "64M") -> bytes:
    """What the guest prints."""
    command = [QEMU, "-accel", "tcg", "-nodefaults", "-display", "none", "-serial", f"file:{tmp_path / 'serial'}"]
    command += ["-object", f"memory-backend-memfd,id=mem,size={memory},share=on", "-no-reboot"]
    command += ["-machine", "q35,memory-backend=mem", "-m", memory, *arguments]
    subprocess.run(command, timeout=HANG_GUARD, check=False)
    return (tmp_path / "serial").read_bytes()


def boot(tmp_path: Path, *properties: str) -> bytes:
    front_end = ",".join(["vhost-user-blk-pci,chardev=disk,num-queues=1", *properties])
    chardev = f"socket,id=disk,path={tmp_path / 's'}"
    leave = f"isa-debug-exit,iobase={EXIT_PORT},iosize=1"
    return qemu(tmp_path, "-chardev", chardev, "-device", front_end, "-device", leave)


@pytest.mark.parametrize("properties", [["disable-modern=on", "disable-legacy=off"], ["disable-legacy=on"]])
@pytest.mark.usefixtures("server")
def test_boots_and_reads_what_is_on_the_disk(tmp_path: Path, properties: list[str]) -> None:
    assert boot(tmp_path, *properties) == bootdisk.answer(SECTORS)


def test_one_server_serves_one_machine_after_another(server: "subprocess.Popen[bytes]", tmp_path: Path) -> None:
    for _ in range(3):
        assert boot(tmp_path) == bootdisk.answer(SECTORS)
    server.terminate()
    assert server.wait(HANG_GUARD) == 0


INIT = """#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
while read -r module; do insmod "/modules/$module"; done </modules/order
echo "disk $(sha256sum </dev/vda)"
dd if=/dev/urandom of=/dev/vda bs=64k count=8 seek=8 conv=fsync 2>/dev/null
sync
echo 3 >/proc/sys/vm/drop_caches
echo "written $(sha256sum </dev/vda)"
echo "queues $(ls /sys/block/vda/mq | wc -l)"
echo "random $(head -c 512 /dev/hwrng | wc -c)"
poweroff -f
"""


def test_linux_reads_and_writes_the_disk_and_gets_entropy(tmp_path: Path) -> None:
    """Two devices of one process; the checksums are the guest's of the disk, before and after it wrote."""
    image = tmp_path / "disk.img"
    image.write_bytes(os.urandom(4 << 20))
    before = hashlib.sha256(image.read_bytes()).hexdigest()
    kernel = find_kernel()
    modules = ("virtio_pci", "virtio_blk", "virtio_rng")
    (tmp_path / "initrd").write_bytes(initrd.build(kernel, INIT, modules=modules))
    with programs(tmp_path) as start:
        blk = "blk,drive=d,num-queues=2,socket-path=blk"
        start("--drive", "file=disk.img,id=d", "--device", blk, "--device", "rng,socket-path=rng")
        printed = qemu(
            tmp_path,
            *("-smp", "2", "-kernel", str(kernel.image), "-initrd", str(tmp_path / "initrd")),
            *("-append", "console=ttyS0 quiet panic=-1"),
            *(
                "-chardev",
                f"socket,id=blk,path={tmp_path / 'blk'}",
                "-chardev",
                f"socket,id=rng,path={tmp_path / 'rng'}",
            ),
            *("-device", "vhost-user-blk-pci,chardev=blk,num-queues=2", "-device", "vhost-user-rng-pci,chardev=rng"),
            memory="256M",
        ).decode(errors="replace")
    assert f"disk {before}" in printed
    after = hashlib.sha256(image.read_bytes()).hexdigest()
    assert after != before
    assert f"written {after}" in printed
    assert "queues 2" in printed
    assert "random 512" in printed
