"""The machine around its CPUs, with guests of a few instructions as firmware: any /dev/kvm runs them."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from code16 import (
    CLI,
    HLT,
    MOV_DS_AX,
    XOR_AX_AX,
    Item,
    cmp_word_at,
    firmware_image,
    inc_word_at,
    jmp,
    jnz,
    label,
    out,
    out_word,
    text,
)  # fmt: skip

from pyvirtio.devices.rng import Rng
from pyvirtio.errors import ConfigError
from pyvirtio.testing.plugin import nothing_left_behind
from pyvirtio.vmm import layout
from pyvirtio.vmm.board import allocate
from pyvirtio.vmm.bus import SystemBus
from pyvirtio.vmm.firmware import Firmware
from pyvirtio.vmm.layout import MIB
from pyvirtio.vmm.machine import Machine, Outcome

pytestmark = pytest.mark.skipif(not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="no usable /dev/kvm")

HANG = 10
BOOTS = 0x500
"""A word of RAM, which a reset does not clear."""

POWER_OFF = out_word(layout.PM_CONTROL_PORT, 1 << 13 | 5 << 10)
RESET = out(layout.RESET_PORT, layout.RESET_VALUE)
FOREVER: tuple[Item, ...] = (label("forever"), jmp("forever"))


def firmware(*code: Item) -> Firmware:
    return Firmware(Path("test"), firmware_image(CLI, XOR_AX_AX, MOV_DS_AX, *code))


@pytest.fixture(autouse=True)
def _baseline() -> Iterator[None]:
    with nothing_left_behind():
        yield


def machine(*code: Item, smp: int = 1, console_fd: int = 1) -> Machine:
    return Machine(firmware(*code), memory=16 * MIB, smp=smp, console_fd=console_fd)


def run(*code: Item, smp: int = 1, reboot: bool = True) -> Outcome:
    with machine(*code, smp=smp) as vm, hang_guard(vm):
        return vm.run(reboot=reboot)


class hang_guard:
    """Ends a machine that does not end by itself; then the outcome is QUIT."""

    def __init__(self, vm: Machine) -> None:
        self.timer = threading.Timer(HANG, vm.quit)

    def __enter__(self) -> None:
        self.timer.start()

    def __exit__(self, *_: object) -> None:
        self.timer.cancel()
        self.timer.join()


@pytest.mark.parametrize("smp", [1, 3])
def test_poweroff(smp: int) -> None:
    assert run(POWER_OFF, *FOREVER, smp=smp) is Outcome.POWEROFF


def test_without_reboot_a_reset_is_the_end() -> None:
    assert run(RESET, *FOREVER, reboot=False) is Outcome.RESET


def count_boots(*end: Item) -> tuple[Item, ...]:
    """Count the boots at `BOOTS`; power off in the third, otherwise `end`."""
    third = (cmp_word_at(BOOTS, 3), jnz("not the third"), POWER_OFF, *FOREVER)
    return (inc_word_at(BOOTS), *third, label("not the third"), *end, jmp("forever"))


@pytest.mark.parametrize("end", [RESET, out(0x64, 0xFE)], ids=["0xcf9", "0x64"])
def test_a_reset_boots_again(end: bytes) -> None:
    with machine(*count_boots(end)) as vm, hang_guard(vm):
        assert vm.run() is Outcome.POWEROFF
        assert vm.memory.load16(BOOTS) == 3


def crash_at_once(vm: Machine) -> None:
    """No exception handler can be found from a non-canonical address: a triple fault."""
    vm._vcpus[0].set_registers("long", rip=1 << 50)


def test_a_triple_fault_is_a_reset(caplog: pytest.LogCaptureFixture) -> None:
    with machine(POWER_OFF, *FOREVER) as vm, hang_guard(vm):
        crash_at_once(vm)
        assert vm.run() is Outcome.POWEROFF
    assert caplog.messages == ["the guest crashed (triple fault)"]


def test_a_triple_fault_without_reboot_is_a_crash() -> None:
    with machine(*FOREVER) as vm, hang_guard(vm):
        crash_at_once(vm)
        assert vm.run(reboot=False) is Outcome.CRASH


class Failing:
    """A CPU on which KVM gives up."""

    def run(self, bus: SystemBus) -> str:
        raise RuntimeError("KVM internal error")

    def stop(self) -> None:
        pass


def test_an_error_of_a_cpu_is_raised_by_run() -> None:
    with machine(*FOREVER, smp=2) as vm:
        vm._vcpus[1] = Failing()  # type: ignore[call-overload]
        with pytest.raises(RuntimeError, match="KVM internal error"):
            vm.run()


@pytest.mark.parametrize("code", [FOREVER, (label("halt"), HLT, jmp("halt"))], ids=["spinning", "halted"])
def test_quit_from_another_thread(code: tuple[Item, ...]) -> None:
    with machine(inc_word_at(BOOTS), *code, smp=2) as vm:
        threading.Timer(0.05, vm.quit).start()
        assert vm.run() is Outcome.QUIT


def test_nothing_runs_while_paused() -> None:
    with machine(label("count"), inc_word_at(BOOTS), jmp("count")) as vm:
        runner = threading.Thread(target=vm.run)
        runner.start()
        wait_until(lambda: vm.memory.load16(BOOTS) != 0)
        vm.pause()
        vm.pause()
        before = vm.memory.load16(BOOTS)
        assert vm.memory.load16(BOOTS) == before
        vm.resume()
        wait_until(lambda: vm.memory.load16(BOOTS) != before)
        vm.quit()
        runner.join()


def test_quit_while_paused() -> None:
    with machine(*FOREVER) as vm:
        vm.pause()
        vm.quit()
        assert vm.run() is Outcome.QUIT


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + HANG
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_quit_before_run() -> None:
    with machine(*FOREVER) as vm:
        vm.quit()
        assert vm.run() is Outcome.QUIT


def test_a_machine_that_never_ran_can_be_closed() -> None:
    with machine(*FOREVER, smp=2) as vm:
        vm.add(Rng(), "rng0")


def test_serial_port_writes_to_the_console() -> None:
    read, write = os.pipe()
    with machine(text(layout.COM1_PORT, "Hello"), POWER_OFF, *FOREVER, console_fd=write) as vm, hang_guard(vm):
        vm.run()
    assert os.read(read, 100) == b"Hello"
    os.close(read)
    os.close(write)


def test_devices_are_reset_with_the_machine() -> None:
    class Watched(Rng):
        resets = 0

        def reset(self) -> None:
            self.resets += 1

    # Bus 0, slot 1, command register: I/O, memory, bus master
    enable = b"\x66\xb8\x04\x08\x00\x80\xba\xf8\x0c\x66\xef" + out_word(0xCFC, 7)
    with machine(enable, *count_boots(RESET)) as vm, hang_guard(vm):
        function = vm.add(Watched(), "rng0")
        assert vm.run() is Outcome.POWEROFF
        assert function.driver.bus_master


@pytest.mark.parametrize("smp", [0, 129])
def test_number_of_cpus_out_of_range(smp: int) -> None:
    with pytest.raises(ConfigError, match=f"smp {smp}: allowed are 1 to 128 CPUs"):
        machine(*FOREVER, smp=smp)


@pytest.mark.parametrize("size", [0, 8 * MIB, 16 * MIB + 4096, 1 << 60])
def test_memory_size_out_of_range(size: int) -> None:
    with pytest.raises(ConfigError, match=f"memory of {size} bytes: allowed are whole MiB from 16 MiB"):
        allocate(size)
