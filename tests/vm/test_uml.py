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
BLOCK = 2
"""The type of a virtio device, which is all that the command line says of it."""
MIB = 1 << 20

pytestmark = pytest.mark.skipif(not shutil.which(UML), reason=f"{UML} is not installed (package user-mode-linux)")

INIT = """#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
mount -t devtmpfs dev /dev
mount -t sysfs sysfs /sys
while read -r module; do insmod "/modules/$module"; done </modules/order
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
    (tmp_path / "initrd").write_bytes(initrd.build(kernel(), INIT, modules=("virtio_blk",)))
    command = [UML, "mem=64M", f"initrd={tmp_path / 'initrd'}", "root=/dev/ram0", "rw", "quiet"]
    command += ["con=null", "con0=fd:0,fd:1", f"virtio_uml.device={tmp_path / 's'}:{BLOCK}"]
    with programs(tmp_path) as start:
        start("blk", "--blk-file", "disk.img", "--socket-path", "s")
        printed = run(command, tmp_path)
    assert f"disk {before}" in printed, printed
    after = hashlib.sha256(image.read_bytes()).hexdigest()
    assert after != before
    assert f"written {after}" in printed, printed


def run(command: list[str], directory: Path) -> str:
    """What it prints. Its processes end with it, whatever state they are in."""
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
