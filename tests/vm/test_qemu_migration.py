"""Linux under QEMU (TCG) migrates from one server of its disks to another, which sees the same images."""

import hashlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import qemu
from qemu import HANG_GUARD, QEMU, Monitor
from serving import Start, programs

pytestmark = pytest.mark.skipif(not shutil.which(QEMU), reason=f"{QEMU} is not installed")

MIB = 1 << 20
DISK = 16 * MIB
FAST, SLOW = 24 * MIB, 64 << 10
"""Bytes of memory that go over in a second."""
LEFT = 12 * MIB
"""Of its memory when the guest reads the disk into its page cache: so most of that overwrites what was sent before."""
ONLY_THE_DISK_WRITES = "init_on_alloc=0"
"""To pages of the page cache; the kernel would fill them with zeroes first, and its CPU leaves marks of its own."""
GUEST = """
exec 3</dev/ttyS1 4</dev/vda
head -c 4194304 /dev/urandom >/noise
for n in $(seq 15); do cat /noise; done >/noises
rm /noise /noises
while [ ! -e /enough ]; do
    dd if=/dev/vda of=/dev/vdb bs=256k iflag=direct oflag=direct 2>/dev/null
    echo copied >>/copied
done &
copying=$!
until [ -e /copied ]; do sleep 0.1; done
echo "packed $(cut -c35 /sys/block/vda/device/features) $(cut -c35 /sys/block/vdb/device/features)"
echo copying
read -r word <&3
cat <&4 >/dev/null
echo cached
read -r word <&3
touch /enough
echo "cache $(sha256sum </dev/vda)"
wait $copying
echo 3 >/proc/sys/vm/drop_caches
cmp /dev/vda /dev/vdb && echo same
poweroff -f
"""
"""Its free memory holds noise and no zeroes, which would be sent too fast. The open disk keeps its page cache."""


class Vm:
    """A QEMU with two disks from a server of its own. The second, with a packed ring, takes its time for each request.

    So there are always some in flight, and the guest has little to do itself: TCG can lose track of a page that a CPU
    writes to while QEMU looks for dirty ones.
    """

    def __init__(self, directory: Path, start: Start, *arguments: str) -> None:
        self.directory = directory
        directory.mkdir()
        drives = [text for name in "ab" for text in ("--drive", f"file={name}.img,id={name},locking=off")]
        sockets = {name: directory / name for name in "ab"}
        start(
            *drives,
            *("--device", f"blk,drive=a,num-queues=2,socket-path={sockets['a']}"),
            *("--device", f"blk,id=b,drive=b,packed=on,socket-path={sockets['b']}"),
            *("--fault", "b:late=5ms"),
        )
        disks = [
            *qemu.vhost_user("a", sockets["a"], "vhost-user-blk-pci,num-queues=2"),
            *qemu.vhost_user("b", sockets["b"], "vhost-user-blk-pci,num-queues=1,packed=on"),
        ]
        control = ["-serial", "stdio", "-qmp", f"unix:{directory / 'qmp'},server=on,wait=off"]
        options = [*disks, *control, *arguments]
        command = qemu.linux(
            directory, GUEST, *options, modules=("virtio_blk",), append=ONLY_THE_DISK_WRITES, memory="160M"
        )
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)

    @property
    def printed(self) -> str:
        serial = self.directory / "serial"
        return serial.read_text(errors="replace") if serial.exists() else ""

    def go_on(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(b"go\n")
        self.process.stdin.flush()

    def wait_for(self, true: Callable[[], object]) -> None:
        deadline = time.monotonic() + HANG_GUARD
        while not true():
            assert self.process.poll() is None, self.printed
            assert time.monotonic() < deadline, self.printed
            time.sleep(0.02)


@contextmanager
def running(directory: Path, start: Start, *arguments: str) -> Iterator[Vm]:
    vm = Vm(directory, start, *arguments)
    try:
        yield vm
    finally:
        vm.process.kill()
        vm.process.communicate()


def test_linux_migrates_while_it_copies_a_disk(tmp_path: Path) -> None:
    """What the disk wrote to memory that had been sent already, only the log of dirty pages tells: the page cache."""
    (tmp_path / "a.img").write_bytes(os.urandom(DISK))
    (tmp_path / "b.img").write_bytes(bytes(DISK))
    stream = f"unix:{tmp_path / 'stream'}"
    with (
        programs(tmp_path) as start,
        running(tmp_path / "source", start) as source,
        running(tmp_path / "destination", start, "-incoming", stream) as destination,
    ):
        source.wait_for(lambda: "copying" in source.printed)
        destination.wait_for((tmp_path / "stream").exists)
        migrate(source, stream)
        destination.go_on()
        assert destination.process.wait(HANG_GUARD) == 0
    assert "packed 0 1" in source.printed
    expected = hashlib.sha256((tmp_path / "a.img").read_bytes()).hexdigest()
    assert f"cache {expected}" in destination.printed, destination.printed
    assert "same" in destination.printed, destination.printed
    assert (tmp_path / "b.img").read_bytes() == (tmp_path / "a.img").read_bytes()


def migrate(vm: Vm, uri: str) -> None:
    """When most of the memory is sent, have the guest fill its page cache, and only then send the rest."""
    with Monitor(vm.directory / "qmp") as monitor:
        monitor.execute("migrate-set-parameters", **{"max-bandwidth": FAST})
        monitor.execute("migrate", uri=uri)
        vm.wait_for(lambda: left(monitor) < LEFT)
        monitor.execute("migrate-set-parameters", **{"max-bandwidth": SLOW})
        vm.go_on()
        vm.wait_for(lambda: left(monitor) and "cached" in vm.printed)
        monitor.execute("migrate-set-parameters", **{"max-bandwidth": 100 * FAST, "downtime-limit": 60_000})
        vm.wait_for(lambda: monitor.execute("query-migrate")["status"] == "completed")


def left(monitor: Monitor) -> int:
    """Bytes of memory to be sent, by a migration that is under way."""
    state = monitor.execute("query-migrate")
    assert state["status"] in ("setup", "active"), state
    remaining: int = state["ram"]["remaining"] if "ram" in state else LEFT
    return remaining
