"""Snapshots of a machine: the guest goes on in another process, or the mistake is one line."""

import json
import os
import re
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from code16 import (
    CLI,
    MOV_DS_AX,
    XOR_AX_AX,
    Item,
    cmp_word_at,
    firmware_image,
    inc_word_at,
    jmp,
    jz,
    label,
    out_word,
    text,
)

from pyvirtio import Device, VirtQueue, queue
from pyvirtio.backends.block import Memory
from pyvirtio.cli.main import main
from pyvirtio.devices.blk import Blk
from pyvirtio.devices.rng import Rng
from pyvirtio.errors import ConfigError
from pyvirtio.testing.plugin import nothing_left_behind
from pyvirtio.vmm import layout, snapshot
from pyvirtio.vmm.board import allocate
from pyvirtio.vmm.firmware import Firmware
from pyvirtio.vmm.layout import MIB
from pyvirtio.vmm.machine import Machine, Outcome

pytestmark = pytest.mark.skipif(not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="no usable /dev/kvm")

HANG = 20
STARTS, COUNT, GO = 0x500, 0x502, 0x504
"""Words of RAM: how often the guest booted, what it counts, and whether it may end."""

POWER_OFF = out_word(layout.PM_CONTROL_PORT, 1 << 13 | 5 << 10)
COUNTER: tuple[Item, ...] = (
    *(CLI, XOR_AX_AX, MOV_DS_AX, inc_word_at(STARTS), text(layout.COM1_PORT, "started\n")),
    *(label("count"), inc_word_at(COUNT), cmp_word_at(GO, 0), jz("count")),
    *(text(layout.COM1_PORT, "ended\n"), POWER_OFF, label("off"), jmp("off")),
)
"""Counts until it may end."""


@pytest.fixture(autouse=True)
def _baseline() -> Iterator[None]:
    with nothing_left_behind():
        yield


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "firmware.bin"
    path.write_bytes(firmware_image(*COUNTER))
    return path


def machine(image: Path, *, memory: int = 16 * MIB, smp: int = 1, disk: int = MIB) -> Machine:
    vm = Machine(Firmware.read(image), memory=memory, smp=smp, console_fd=2)
    vm.add(Blk(Memory(disk)), "blk0")
    vm.add(Rng(), "rng0")
    return vm


@contextmanager
def counting(vm: Machine) -> Iterator[None]:
    """The guest runs, and has counted a little; it is ended in the end."""
    thread = threading.Thread(target=vm.run)
    thread.start()
    try:
        goes_on(vm)
        yield
    finally:
        vm.quit()
        thread.join()


def goes_on(vm: Machine) -> None:
    before = vm.memory.load16(COUNT)
    wait_until(lambda: vm.memory.load16(COUNT) != before)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + HANG
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.fixture
def taken(image: Path, tmp_path: Path) -> Path:
    """A snapshot of a guest that counts."""
    path = tmp_path / "guest.snapshot"
    with machine(image) as vm, counting(vm):
        vm.snapshot(path)
    return path


def test_the_guest_goes_on_after_a_snapshot(image: Path, tmp_path: Path) -> None:
    with machine(image) as vm, counting(vm):
        for _ in range(3):
            vm.snapshot(tmp_path / "again")
            goes_on(vm)
    assert set(os.listdir(tmp_path)) == {"firmware.bin", "again"}


def test_a_paused_guest_stays_paused(image: Path, tmp_path: Path) -> None:
    with machine(image) as vm, counting(vm):
        vm.pause()
        before = vm.memory.load16(COUNT)
        vm.snapshot(tmp_path / "paused")
        assert vm.memory.load16(COUNT) == before
        vm.resume()
        wait_until(lambda: vm.memory.load16(COUNT) != before)


def test_the_guest_goes_on_where_it_was(image: Path, taken: Path) -> None:
    with machine(image) as vm:
        vm.restore(taken)
        assert vm.memory.load16(STARTS) == 1
        counted = vm.memory.load16(COUNT)
        assert counted
        with counting(vm):
            vm.memory.store16(GO, 1)
            wait_until(lambda: not vm._running)
        assert vm.memory.load16(STARTS) == 1


class Memo(Device, id=63):
    """Has a state of its own."""

    def __init__(self, memo: str = "") -> None:
        self.memo = memo

    @queue(size=8)
    def requestq(self, vq: VirtQueue) -> None: ...

    def save(self) -> dict[str, Any]:
        return {**super().save(), "memo": self.memo}

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        self.memo = state["memo"]


def test_a_device_of_the_users_own_has_its_state_back(image: Path, tmp_path: Path) -> None:
    path, memo = tmp_path / "guest.snapshot", Memo()
    with machine(image) as vm:
        vm.add(Memo("kept"), "memo0")
        with counting(vm):
            vm.snapshot(path)
    with machine(image) as vm:
        vm.add(memo, "memo0")
        vm.restore(path)
        assert memo.memo == "kept"


def test_several_cpus(image: Path, tmp_path: Path) -> None:
    """Those that nobody started stay so."""
    with machine(image, smp=3) as vm, counting(vm):
        vm.snapshot(tmp_path / "smp")
    with machine(image, smp=3) as vm:
        vm.restore(tmp_path / "smp")
        with counting(vm):
            pass
        assert vm.memory.load16(STARTS) == 1


def test_a_restored_guest_can_be_reset(image: Path, taken: Path) -> None:
    with machine(image) as vm:
        vm.restore(taken)
        with counting(vm):
            vm._end(Outcome.RESET)
            wait_until(lambda: vm.memory.load16(STARTS) == 2)


def test_a_restored_guest_can_be_taken_again(image: Path, taken: Path, tmp_path: Path) -> None:
    with machine(image) as vm:
        vm.restore(taken)
        with counting(vm):
            vm.snapshot(tmp_path / "second")
    with machine(image) as vm:
        vm.restore(tmp_path / "second")
        with counting(vm):
            pass


def test_run_restore_in_a_process_of_its_own(image: Path, tmp_path: Path) -> None:
    """Only what comes after the snapshot is printed, by a process that did not start the guest."""
    path = tmp_path / "guest.snapshot"
    with Machine(Firmware.read(image), memory=16 * MIB, console_fd=2) as vm, counting(vm):
        vm.pause()
        vm.memory.store16(GO, 1)
        vm.snapshot(path)
    arguments = ["run", "--firmware", str(image), "-m", "16M", "--restore", str(path)]
    done = subprocess.run(
        [sys.executable, "-m", "pyvirtio", *arguments], stdin=subprocess.DEVNULL, capture_output=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"ended\n", b"")


def test_memory_that_is_zero_takes_no_room(taken: Path) -> None:
    with zipfile.ZipFile(taken) as archive:
        assert archive.getinfo("memory").file_size <= 4 * snapshot.PIECE


def test_the_memory_comes_back_as_it_was() -> None:
    memory = allocate(16 * MIB)
    memory.write(0x1000, b"one")
    memory.write(snapshot.PIECE - 2, b"four")
    memory.write(5 * MIB, bytes(100))
    memory.write(16 * MIB - 4, b"last")
    found = dict(snapshot.nonzero(memory))
    assert sorted(found) == [0, snapshot.PIECE, 16 * MIB - snapshot.PIECE]
    assert all(memory.read(address, len(data)) == data for address, data in found.items())
    assert snapshot.merge([(a, len(d)) for a, d in found.items()])[0] == (0, 2 * snapshot.PIECE)


def test_a_snapshot_before_or_after_the_run_is_refused(image: Path, tmp_path: Path) -> None:
    with machine(image) as vm:
        with pytest.raises(ConfigError, match="the guest is not running"):
            vm.snapshot(tmp_path / "early")
        with counting(vm):
            pass
        with pytest.raises(ConfigError, match="the guest is not running"):
            vm.snapshot(tmp_path / "late")
    assert os.listdir(tmp_path) == ["firmware.bin"]


@pytest.mark.parametrize("where", ["missing/guest.snapshot", "/dev/full", "."])
def test_a_place_that_does_not_do_leaves_nothing_behind(image: Path, tmp_path: Path, where: str) -> None:
    with machine(image) as vm, counting(vm):
        with pytest.raises((OSError, ConfigError)):
            vm.snapshot(tmp_path / where)
        goes_on(vm)
    assert os.listdir(tmp_path) == ["firmware.bin"]


def test_a_full_disk_leaves_the_last_snapshot_alone(image: Path, taken: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = taken.read_bytes()

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with machine(image) as vm, counting(vm), pytest.raises(OSError, match="No space left"):
        vm.snapshot(taken)
    assert taken.read_bytes() == before
    assert not list(taken.parent.glob("*.part"))


def refusal(vm: Machine, path: Path) -> str:
    """The line that tells why `path` cannot be restored; nothing has started then."""
    with vm, pytest.raises(ConfigError) as refused:
        vm.restore(path)
    assert not any(function.dataplane.notifiers.running for function in vm.devices)
    message = str(refused.value)
    assert message.startswith(f"snapshot {path}: ")
    assert "\n" not in message
    return message


def test_another_machine_is_refused(image: Path, taken: Path, tmp_path: Path) -> None:
    assert "memory of that machine: 16M; of this one: 32M" in refusal(machine(image, memory=32 * MIB), taken)
    assert "CPUs of that machine: 1; of this one: 2" in refusal(machine(image, smp=2), taken)
    assert "blk0: the disk has 4096 sectors now, and had 2048" in refusal(machine(image, disk=2 * MIB), taken)
    more = machine(image)
    more.add(Rng(), "rng1")
    assert "rng0 (Rng, slot 2); of this one: blk0 (Blk, slot 1), rng0 (Rng, slot 2), rng1" in refusal(more, taken)
    other = tmp_path / "other.bin"
    other.write_bytes(firmware_image(POWER_OFF))
    assert "firmware of that machine: " in refusal(machine(other), taken)


@pytest.mark.parametrize("part", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_snapshot_is_refused(image: Path, taken: Path, part: float) -> None:
    data = taken.read_bytes()
    taken.write_bytes(data[: int(len(data) * part)])
    assert "truncated, damaged, or no snapshot" in refusal(machine(image), taken)


@pytest.mark.parametrize("name", [snapshot.MEMORY, snapshot.STATE])
def test_a_changed_byte_is_noticed(image: Path, taken: Path, name: str) -> None:
    with zipfile.ZipFile(taken) as archive:
        at = archive.getinfo(name).header_offset + 200
    data = bytearray(taken.read_bytes())
    data[at] ^= 1
    taken.write_bytes(data)
    assert "Bad CRC-32" in refusal(machine(image), taken)


def rewrite(path: Path, change: Callable[[Any], object]) -> None:
    """Write the snapshot anew with its `machine.json` changed, and correct checksums."""
    with zipfile.ZipFile(path) as archive:
        contents, memory = json.loads(archive.read(snapshot.STATE)), archive.read(snapshot.MEMORY)
    change(contents)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(snapshot.MEMORY, memory)
        archive.writestr(snapshot.STATE, json.dumps(contents))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(version=2), "has version 2 of the format, this is version 1"),
        (lambda c: c.update(kind="cake"), "it is a cake"),
        (lambda c: c.pop("state"), "no snapshot"),
        (lambda c: c.update(extents=[[0, 1 << 40]]), "less memory than it says"),
        (lambda c: c.update(extents=[]), "more memory than it says"),
        (lambda c: c.update(extents=[[1 << 40, 64]]), "are not guest memory"),
        (lambda c: c.update(extents=[[0, -1]]), "more memory than it says"),
        (lambda c: c["extents"][0].__setitem__(0, -1), "no snapshot"),
        (lambda c: c.update(machine=[]), "no snapshot"),
        (lambda c: c["machine"].clear(), "no snapshot"),
        (lambda c: c.update(state=c["state"]["cpus"]), "no snapshot"),
        (lambda c: c["state"]["cpus"].clear(), "no snapshot"),
        (lambda c: c["state"]["cpus"][0].pop("lapic"), "the state has no lapic"),
        (lambda c: c["state"]["cpus"][0].update(cpuid={"hex": "00"}), "the CPU of this host"),
        (lambda c: c["state"]["cpus"][0].update(regs={"hex": "00"}), "the state has 1 bytes too many in regs"),
        (lambda c: c["state"]["vm"].pop("clock"), "the state has no clock"),
        (lambda c: c["state"].update(serial={"hex": "00"}), "the state has 1 bytes of a serial port"),
        (lambda c: c["state"]["pci"]["slots"].pop("1"), "no snapshot"),
        (lambda c: c["state"]["pci"]["slots"]["1"].update(config={"hex": "00" * 256}), "another device"),
        (lambda c: c["state"]["pci"]["slots"]["1"].update(config={"hex": "00"}), "another device"),
        (lambda c: c["state"]["pci"]["slots"]["1"]["driver"]["queues"].clear(), "no snapshot"),
        (lambda c: c["state"]["pci"]["slots"]["1"]["interrupts"].update(isr=1 << 20), "no snapshot"),
        (lambda c: c["state"]["pci"]["slots"]["1"]["interrupts"]["queue_vectors"].clear(), "no snapshot"),
        (lambda c: c["state"]["pci"]["slots"]["1"]["interrupts"]["msix"].update(table={"hex": ""}), "no snapshot"),
        (lambda c: c["state"]["pci"]["slots"]["1"]["interrupts"]["msix"].update(pending=[99]), "no snapshot"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(image: Path, taken: Path, change: Callable[[Any], object], message: str) -> None:
    rewrite(taken, change)
    assert re.search(message, refusal(machine(image), taken))


@pytest.mark.parametrize("name", [snapshot.MEMORY, snapshot.STATE])
def test_a_snapshot_that_would_grow_is_refused(image: Path, taken: Path, name: str) -> None:
    """None of ours is compressed; a small file that is not could stand for more than this host has."""
    with zipfile.ZipFile(taken) as archive:
        parts = {part: archive.read(part) for part in (snapshot.MEMORY, snapshot.STATE)}
    with zipfile.ZipFile(taken, "w") as archive:
        for part, data in parts.items():
            archive.writestr(part, data, zipfile.ZIP_DEFLATED if part == name else zipfile.ZIP_STORED)
    assert f"{name} is compressed" in refusal(machine(image), taken)


def test_a_description_larger_than_any_is_refused(image: Path, taken: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "MAX_STATE", 1000)
    assert "machine.json has " in refusal(machine(image), taken)


def test_the_command_says_it_in_one_line(image: Path, taken: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["run", "--firmware", str(image), "-m", "16M", "--serial", "null"]
    assert main([*options, "--restore", str(taken)]) == 2
    devices = "blk0 (Blk, slot 1), rng0 (Rng, slot 2)"
    assert (
        capsys.readouterr().err
        == f"pyvirtio: snapshot {taken}: devices of that machine: {devices}; of this one: none\n"
    )
    assert main([*options, "--restore", str(taken), "--dry-run"]) == 2
    assert f"devices of that machine: {devices}" in capsys.readouterr().err
    rewrite(taken, lambda c: c["machine"].update(devices=""))
    assert main([*options, "--restore", str(taken), "--dry-run"]) == 0
    assert main([*options, "-m", "32M", "--restore", str(taken), "--dry-run"]) == 2
    assert "memory of that machine: 16M; of this one: 32M" in capsys.readouterr().err
    assert main([*options, "--restore", "nothing"]) == 2
    assert capsys.readouterr().err == "pyvirtio: snapshot nothing: No such file or directory\n"


def test_files_that_are_no_snapshots(image: Path, tmp_path: Path) -> None:
    assert "No such file" in refusal(machine(image), tmp_path / "none")
    assert "Is a directory" in refusal(machine(image), tmp_path)
    assert "no snapshot" in refusal(machine(image), image)
