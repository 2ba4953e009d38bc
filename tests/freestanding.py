"""Freestanding guests: a few bytes of machine code on one vCPU, and a machine whose driver's accesses that vCPU makes.

The code uses general registers only, so that it runs in a software KVM too.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from pyvirtio._core import GuestMemory, IrqLine, MsixVector, Vcpu, Vm
from pyvirtio.accel.kvm import Kvm
from pyvirtio.testing import Guest
from pyvirtio.testing.heap import Heap

if TYPE_CHECKING:
    from pyvirtio._core import Bus

Mode = Literal["real", "protected", "long"]

HANG = 20.0
"""Seconds after which a guest counts as hung; none of them takes a second."""

CODE = 0x10000
STACK = 0x18000
FREE = 0x20000
"""From here on guest memory is neither code, stack nor tables."""

DONE = 0xF4
"""The port that a guest writes to when it is through."""

EXIT = bytes([0xE6, DONE])  # out DONE, al

# Accesses in 32- and 64-bit code, by their width: ports in dx, addresses in edi, values in (e)ax.
OUT = {1: b"\xee", 2: b"\x66\xef", 4: b"\xef"}
IN = {1: b"\xec", 2: b"\x66\xed", 4: b"\xed"}
STORE = {1: b"\x88\x07", 2: b"\x66\x89\x07", 4: b"\x89\x07", 8: b"\x48\x89\x07"}
LOAD = {1: b"\x8a\x07", 2: b"\x66\x8b\x07", 4: b"\x8b\x07", 8: b"\x48\x8b\x07"}


def repeat(body: bytes) -> bytes:
    """Run `body` ecx times."""
    count_down = b"\xff\xc9"  # dec ecx
    return body + count_down + b"\x75" + bytes([0x100 - len(body) - len(count_down) - 2])  # jnz body


class Recorder:
    """A bus that remembers every access, and reads `value`."""

    def __init__(self) -> None:
        self.accesses: list[tuple[object, ...]] = []
        self.value = 0

    def pio_read(self, port: int, size: int) -> int:
        self.accesses.append(("in", port, size))
        return self.value

    def pio_write(self, port: int, size: int, value: int) -> None:
        self.accesses.append(("out", port, size, value))

    def mmio_read(self, address: int, size: int) -> int:
        self.accesses.append(("load", address, size))
        return self.value

    def mmio_write(self, address: int, size: int, value: int) -> None:
        self.accesses.append(("store", address, size, value))


class UntilDone:
    """A bus in front of another: a write to `DONE` stops the vCPU."""

    def __init__(self, bus: Bus, stop: Callable[[], None]) -> None:
        self.pio_read, self.mmio_read, self.mmio_write = bus.pio_read, bus.mmio_read, bus.mmio_write
        self.bus, self.stop = bus, stop

    def pio_write(self, port: int, size: int, value: int) -> None:
        if port == DONE:
            self.stop()
        else:
            self.bus.pio_write(port, size, value)


class Cpu:
    """The one CPU of a freestanding guest. `exits` are its own, without those to `DONE`."""

    def __init__(self, vm: Vm, memory: GuestMemory, bus: Bus) -> None:
        self.memory, self.bus = memory, bus
        self.vcpu: Vcpu = vm.create_vcpu(0)
        self.vcpu.set_cpuid(1)
        self.finished = 0

    def load(self, code: bytes, mode: Mode, registers: dict[str, int]) -> None:
        """Make `code` what runs next; it ends with `EXIT`, or is stopped."""
        self.memory.write(CODE, code + EXIT)
        self.vcpu.set_registers(mode, **({"rip": CODE, "rsp": STACK} | registers))

    def run(self) -> str:
        """Run what is loaded, on this thread, until it exits or is stopped."""
        outcome = self.vcpu.run(UntilDone(self.bus, self.vcpu.stop))
        self.finished += 1
        return outcome

    def execute(self, code: bytes, mode: Mode = "protected", **registers: int) -> dict[str, int]:
        """Run `code` to its end; return the registers."""
        self.load(code, mode, registers)
        watchdog = threading.Timer(HANG, self.vcpu.stop)
        watchdog.start()
        try:
            self.run()
        finally:
            watchdog.cancel()
            watchdog.join()
        return self.vcpu.get_registers()

    def start(self, code: bytes, mode: Mode = "protected", **registers: int) -> Running:
        """Run `code` on a thread of its own."""
        self.load(code, mode, registers)
        return Running(self)

    @property
    def exits(self) -> int:
        """Accesses that left the guest."""
        counted = self.vcpu.exits
        return sum(counted.values()) - counted["other"] - self.finished


class Running:
    """A guest that runs on a thread of its own until it is done, or `stop`."""

    def __init__(self, cpu: Cpu) -> None:
        self.cpu = cpu
        self._thread = threading.Thread(target=cpu.run, daemon=True)
        self._thread.start()

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive()

    def wait(self) -> None:
        """Until the guest is done; `TimeoutError` if it hangs."""
        self._thread.join(HANG)
        if self.is_running:
            where = self.stop()
            raise TimeoutError(f"the guest hangs at {where:#x}")

    def stop(self) -> int:
        """Stop it where it is; return where that is."""
        self.cpu.vcpu.stop()
        self._thread.join(HANG)
        assert not self.is_running, "the vCPU cannot be stopped"
        return self.cpu.vcpu.get_registers()["rip"]


class CpuDrivenKvm(Kvm):
    """The KVM accelerator, and a vCPU that makes each access of the test driver with an instruction."""

    def __init__(self, memory: GuestMemory, bus: Bus) -> None:
        super().__init__(memory)
        self.cpu = Cpu(self.vm, memory, bus)
        self.routes: dict[MsixVector, tuple[int, int]] = {}  # KVM takes the irqfds, so there is nothing to poll
        self.lines = {slot: IrqLine() for slot in range(32)}

    def pio_write(self, port: int, size: int, value: int) -> None:
        self.cpu.execute(OUT[size], rdx=port, rax=value)

    def pio_read(self, port: int, size: int) -> int:
        return self.cpu.execute(IN[size], rdx=port)["rax"] & (1 << 8 * size) - 1

    def mmio_write(self, address: int, size: int, value: int) -> None:
        self.cpu.execute(STORE[size], rdi=address, rax=value)

    def mmio_read(self, address: int, size: int) -> int:
        return self.cpu.execute(LOAD[size], rdi=address)["rax"] & (1 << 8 * size) - 1


class KvmGuest(Guest):
    """The machine of the in-process tests on `/dev/kvm`. Interrupts go into the guest, so queues are to be polled."""

    accel: CpuDrivenKvm  # type: ignore[assignment]

    def __init__(self, *, ioeventfd: bool | None = None) -> None:
        super().__init__(ioeventfd=ioeventfd)
        self.heap = Heap(FREE, self.border)
        self.accel = CpuDrivenKvm(self.memory, self.bus)
