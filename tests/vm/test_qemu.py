"""Guests under QEMU (TCG, so they run anywhere) use what `pyvirtio serve` serves over vhost-user."""

import hashlib
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import bootdisk
import pytest
import qemu
from code16 import out
from qemu import HANG_GUARD, QEMU
from serving import programs

SECTORS = 500
EXIT_PORT = 0x501
MIB = 1 << 20

pytestmark = pytest.mark.skipif(not shutil.which(QEMU), reason=f"{QEMU} is not installed")


@pytest.fixture
def server(tmp_path: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """Serves the disk at `s`."""
    (tmp_path / "disk.img").write_bytes(bootdisk.image(SECTORS, leave=out(EXIT_PORT, 0)))
    with programs(tmp_path) as start:
        yield start("blk", "--blk-file", "disk.img", "--socket-path", "s")


def boot(tmp_path: Path, *properties: str) -> bytes:
    front_end = ",".join(["vhost-user-blk-pci,num-queues=1", *properties])
    leave = ["-device", f"isa-debug-exit,iobase={EXIT_PORT},iosize=1"]
    machine = qemu.command(tmp_path, *qemu.vhost_user("disk", tmp_path / "s", front_end), *leave)
    return qemu.run(machine, tmp_path)


@pytest.mark.parametrize("properties", [["disable-modern=on", "disable-legacy=off"], ["disable-legacy=on"]])
@pytest.mark.usefixtures("server")
def test_boots_and_reads_what_is_on_the_disk(tmp_path: Path, properties: list[str]) -> None:
    assert boot(tmp_path, *properties) == bootdisk.answer(SECTORS)


def test_one_server_serves_one_machine_after_another(server: "subprocess.Popen[bytes]", tmp_path: Path) -> None:
    for _ in range(3):
        assert boot(tmp_path) == bootdisk.answer(SECTORS)
    server.terminate()
    assert server.wait(HANG_GUARD) == 0


def sha256(image: Path) -> str:
    return hashlib.sha256(image.read_bytes()).hexdigest()


SCRIPT = """
for disk in vda vdb; do
    echo "$disk $(sha256sum </dev/$disk)"
    dd if=/dev/urandom of=/dev/$disk bs=64k count=8 seek=8 conv=fsync 2>/dev/null
    sync
    echo 3 >/proc/sys/vm/drop_caches
    echo "$disk written $(sha256sum </dev/$disk)"
    echo "$disk packed $(cut -c35 /sys/block/$disk/device/features)"
done
echo "queues $(ls /sys/block/vda/mq | wc -l)"
echo "random $(head -c 512 /dev/hwrng | wc -c)"
poweroff -f
"""


def test_linux_reads_and_writes_disks_and_gets_entropy(tmp_path: Path) -> None:
    """Three devices of one process; the checksums are the guest's of each disk, before and after it wrote."""
    images = {name: tmp_path / f"{name}.img" for name in ("vda", "vdb")}
    for image in images.values():
        image.write_bytes(os.urandom(4 * MIB))
    before = {name: sha256(image) for name, image in images.items()}
    split = qemu.vhost_user("split", tmp_path / "split", "vhost-user-blk-pci,num-queues=2")
    packed = qemu.vhost_user("packed", tmp_path / "packed", "vhost-user-blk-pci,num-queues=1,packed=on")
    entropy = qemu.vhost_user("rng", tmp_path / "rng", "vhost-user-rng-pci")
    with programs(tmp_path) as start:
        drives = [text for name in images for text in ("--drive", f"file={name}.img,id={name}")]
        blks = ["blk,drive=vda,num-queues=2,socket-path=split", "blk,drive=vdb,packed=on,socket-path=packed"]
        start(*drives, "--device", blks[0], "--device", blks[1], "--device", "rng,socket-path=rng")
        machine = qemu.linux(tmp_path, SCRIPT, *split, *packed, *entropy, modules=("virtio_blk", "virtio_rng"))
        printed = qemu.run(machine, tmp_path).decode(errors="replace")
    for name, image in images.items():
        assert f"{name} {before[name]}" in printed
        assert sha256(image) != before[name]
        assert f"{name} written {sha256(image)}" in printed
        assert f"{name} packed {int(name == 'vdb')}" in printed
    assert "queues 2" in printed
    assert "random 512" in printed


FILES = 6
WRITER = f"""
echo "packed $(cut -c35 /sys/block/vda/device/features)"
mount -t ext4 /dev/vda /mnt
for n in $(seq {FILES}); do
    echo "round $n"
    (dd if=/dev/urandom of=/mnt/a$n bs=64k count=24 conv=fsync 2>/dev/null) &
    dd if=/dev/urandom of=/mnt/b$n bs=64k count=24 conv=fsync 2>/dev/null
    wait
done
umount /mnt
echo 3 >/proc/sys/vm/drop_caches
mount -t ext4 -o ro /dev/vda /mnt
for n in $(seq {FILES}); do for file in a$n b$n; do echo "file $file $(sha256sum </mnt/$file)"; done; done
umount /mnt
dmesg | grep -E "vda|EXT4"
echo finished
poweroff -f
"""


@pytest.mark.parametrize("packed", ["off", "on"], ids=["split", "packed"])
def test_no_file_is_harmed_when_the_server_is_killed_while_linux_writes(tmp_path: Path, packed: str) -> None:
    """ext4 on two queues that two I/O threads serve; `kill -9` in every other round, and a new server each time."""
    image = tmp_path / "disk.img"
    image.touch()
    os.truncate(image, 64 * MIB)
    subprocess.run(["/usr/sbin/mkfs.ext4", "-q", image], check=True)
    rings = f"packed={packed}"
    arguments = [f"blk,num-queues=2,{rings}", "--blk-file", "disk.img", "--iothreads", "2", "--socket-path", "s"]
    disk = qemu.vhost_user("blk", tmp_path / "s", f"vhost-user-blk-pci,num-queues=2,{rings}", reconnect=True)
    with programs(tmp_path) as start:
        server = start(*arguments)
        machine = subprocess.Popen(qemu.linux(tmp_path, WRITER, *disk, modules=("virtio_blk", "ext4")))
        try:
            for number in range(1, FILES, 2):
                wait_until_printed(tmp_path, f"round {number}", machine)
                server.kill()
                server.wait()
                server = start(*arguments)
            machine.wait(HANG_GUARD)
        finally:
            machine.kill()
            machine.wait()
        printed = (tmp_path / "serial").read_text(errors="replace")
        server.terminate()
        server.wait(HANG_GUARD)
    assert f"packed {int(packed == 'on')}" in printed, printed
    assert "finished" in printed, printed
    assert "error" not in printed, printed
    subprocess.run(["/usr/sbin/e2fsck", "-f", "-n", image], check=True, capture_output=True)
    sums = dict(re.findall(r"file (\w+) ([0-9a-f]{64})", printed))
    assert len(sums) == 2 * FILES
    for file, checksum in sums.items():
        shown = subprocess.run(["/usr/sbin/debugfs", "-R", f"cat /{file}", image], check=True, capture_output=True)
        assert hashlib.sha256(shown.stdout).hexdigest() == checksum


def wait_until_printed(directory: Path, line: str, machine: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + HANG_GUARD
    serial = directory / "serial"
    while not serial.exists() or line.encode() not in serial.read_bytes():
        assert machine.poll() is None, serial.read_text(errors="replace")
        assert time.monotonic() < deadline, serial.read_text(errors="replace")
        time.sleep(0.02)
