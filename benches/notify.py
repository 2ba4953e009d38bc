"""Cost of a virtqueue notify on /dev/kvm: an exit to a Python bus against an ioeventfd, from the guest's side.

A vCPU notifies in a loop, so the time is what the guest waits for each notify; its loop is part of it, and stands
alone as "store to RAM".
"""

import os
import time
from collections.abc import Callable

from measure import Report, arguments, interleaved

from pyvirtio._core import GuestMemory, Vm

CODE = 0x1000
RAM = 0x2000
PORT, IO_PORT = 0xC000, 0xC010
MMIO, IO_MMIO = 0xE000_0000, 0xE000_1000
DONE = 0xF4

# 32-bit code: ecx notifies of queue ax at [edi] or port dx, then an exit.
COUNT_DOWN = b"\x49\x75"  # dec ecx; jnz
STORE = b"\x66\x89\x07"  # mov [edi], ax
OUT = b"\x66\xef"  # out dx, ax
EXIT = bytes([0xE6, DONE])  # out DONE, al


class Bus:
    """Takes notifies like a transport that has nothing to do."""

    def __init__(self, stop: Callable[[], None]) -> None:
        self.stop = stop

    def pio_read(self, port: int, size: int) -> int:
        return 0

    def pio_write(self, port: int, size: int, value: int) -> None:
        if port == DONE:
            self.stop()

    def mmio_read(self, address: int, size: int) -> int:
        return 0

    def mmio_write(self, address: int, size: int, value: int) -> None:
        pass


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--notifies", type=int, default=2000, help="in one repetition (default %(default)s)")
    args = parser.parse_args()
    memory = GuestMemory.allocate([(0, 1 << 20)])
    vm = Vm()
    vm.create_irqchip()
    vm.set_memory(memory)
    vcpu = vm.create_vcpu(0)
    vcpu.set_cpuid(1)
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    vm.assign_ioeventfd(fd, "mmio", IO_MMIO, 0, None)
    vm.assign_ioeventfd(fd, "pio", IO_PORT, 2, 0)

    notifies: int = args.notifies

    def per_notify(access: bytes, address: int) -> Callable[[], float]:
        def measure() -> float:
            loop = access + COUNT_DOWN
            memory.write(CODE, loop + bytes([0x100 - len(loop) - 1]) + EXIT)
            vcpu.set_registers("protected", rip=CODE, rcx=notifies, rdi=address, rdx=address)
            start = time.perf_counter()
            vcpu.run(Bus(vcpu.stop))
            return (time.perf_counter() - start) * 1e6 / notifies

        return measure

    modes = {
        "store to RAM": per_notify(STORE, RAM),
        "MMIO, exit to Python": per_notify(STORE, MMIO),
        "MMIO, ioeventfd": per_notify(STORE, IO_MMIO),
        "port, exit to Python": per_notify(OUT, PORT),
        "port, ioeventfd with datamatch": per_notify(OUT, IO_PORT),
    }
    report = Report(args.json)
    report.add("one notify", "us", interleaved(modes, args.repetitions))
    report.close()


if __name__ == "__main__":
    main()
