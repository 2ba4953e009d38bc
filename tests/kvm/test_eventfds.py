"""ioeventfds and irqfds of KVM itself: what matches, what is refused, and interrupts that reach a guest."""

import errno
import os
import struct
from collections.abc import Iterator

import pytest
from freestanding import EXIT, FREE, OUT, STORE, Cpu, Recorder, repeat

from pyvirtio._core import GuestMemory, Vm

PORT = 0xC010
MMIO = 0xE000_3000


@pytest.fixture
def fd() -> Iterator[int]:
    eventfd = os.eventfd(0, os.EFD_NONBLOCK)
    yield eventfd
    os.close(eventfd)


def signals(fd: int) -> int:
    """How often it was signalled since it was last asked."""
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0


def test_a_notify_without_an_ioeventfd_exits(cpu: Cpu, bus: Recorder) -> None:
    cpu.execute(OUT[2] + STORE[2], rdx=PORT, rdi=MMIO, rax=3)
    assert bus.accesses == [("out", PORT, 2, 3), ("store", MMIO, 2, 3)]
    assert cpu.exits == 2


def test_a_port_ioeventfd_matches_the_value(vm: Vm, cpu: Cpu, bus: Recorder, fd: int) -> None:
    vm.assign_ioeventfd(fd, "pio", PORT, 2, 1)
    cpu.execute(OUT[2], rdx=PORT, rax=1)
    assert (signals(fd), bus.accesses) == (1, [])
    cpu.execute(OUT[2], rdx=PORT, rax=2)
    assert (signals(fd), bus.accesses) == (0, [("out", PORT, 2, 2)])


def test_a_port_ioeventfd_matches_the_width(vm: Vm, cpu: Cpu, bus: Recorder, fd: int) -> None:
    vm.assign_ioeventfd(fd, "pio", PORT, 2, 1)
    cpu.execute(OUT[1] + OUT[4], rdx=PORT, rax=1)
    assert (signals(fd), bus.accesses) == (0, [("out", PORT, 1, 1), ("out", PORT, 4, 1)])


def test_queues_of_one_port_are_told_apart_by_the_value(vm: Vm, cpu: Cpu, bus: Recorder) -> None:
    fds = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(4)]
    for index, fd in enumerate(fds):
        vm.assign_ioeventfd(fd, "pio", PORT, 2, index)
    cpu.execute(OUT[2], rdx=PORT, rax=2)
    assert [signals(fd) for fd in fds] == [0, 0, 1, 0]
    for fd in fds:
        os.close(fd)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_an_ioeventfd_of_length_0_matches_any_width(vm: Vm, cpu: Cpu, bus: Recorder, fd: int, size: int) -> None:
    vm.assign_ioeventfd(fd, "mmio", MMIO, 0, None)
    cpu.execute(STORE[size], "long", rdi=MMIO, rax=0x77)
    assert (signals(fd), bus.accesses) == (1, [])


def test_a_burst_is_one_wake_up_that_counts_all(vm: Vm, cpu: Cpu, bus: Recorder, fd: int) -> None:
    vm.assign_ioeventfd(fd, "mmio", MMIO, 0, None)
    cpu.execute(repeat(STORE[2]), rdi=MMIO, rcx=100)
    assert (signals(fd), cpu.exits) == (100, 0)


def test_one_eventfd_may_stand_at_several_addresses(vm: Vm, cpu: Cpu, fd: int) -> None:
    vm.assign_ioeventfd(fd, "mmio", MMIO, 0, None)
    vm.assign_ioeventfd(fd, "pio", PORT, 2, 0)
    cpu.execute(OUT[2] + STORE[2], rdx=PORT, rdi=MMIO)
    assert signals(fd) == 2


def test_the_same_address_twice_is_refused(vm: Vm, fd: int) -> None:
    vm.assign_ioeventfd(fd, "pio", PORT, 2, 1)
    with pytest.raises(OSError, match="KVM_IOEVENTFD") as refused:
        vm.assign_ioeventfd(fd, "pio", PORT, 2, 1)
    assert refused.value.errno == errno.EEXIST
    vm.assign_ioeventfd(fd, "pio", PORT, 2, 2)


def test_after_a_deassign_the_notify_exits_again(vm: Vm, cpu: Cpu, bus: Recorder, fd: int) -> None:
    vm.assign_ioeventfd(fd, "mmio", MMIO, 0, None)
    vm.deassign_ioeventfd(fd, "mmio", MMIO, 0, None)
    cpu.execute(STORE[2], rdi=MMIO, rax=5)
    assert (signals(fd), bus.accesses) == (0, [("store", MMIO, 2, 5)])
    with pytest.raises(OSError, match="KVM_IOEVENTFD") as refused:
        vm.deassign_ioeventfd(fd, "mmio", MMIO, 0, None)
    assert refused.value.errno == errno.ENOENT


def test_what_is_no_eventfd_is_refused(vm: Vm) -> None:
    with open("/dev/null") as file:
        with pytest.raises(OSError, match="Invalid argument: 'KVM_IOEVENTFD'"):
            vm.assign_ioeventfd(file.fileno(), "pio", PORT, 2, None)
        with pytest.raises(OSError, match="Invalid argument: 'KVM_IRQFD'"):
            vm.assign_irqfd(file.fileno(), GSI)


def test_a_thousand_queues_fit_into_one_vm(vm: Vm, cpu: Cpu) -> None:
    fds = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(1024)]
    for index, fd in enumerate(fds):
        vm.assign_ioeventfd(fd, "mmio", MMIO + 4 * index, 0, None)
    cpu.execute(STORE[2] + b"\x83\xc7\x04" + STORE[2], rdi=MMIO + 4 * 1022)  # add edi, 4
    assert [index for index, fd in enumerate(fds) if signals(fd)] == [1022, 1023]
    for fd in fds:
        os.close(fd)


VECTOR = 0x41
GSI = 24
LAPIC = 0xFEE0_0000
READY = 0xF5
IDT, IDT_REGISTER, HANDLER, COUNTER = FREE, FREE + 0x1000, FREE + 0x2000, FREE + 0x3000

# Registers throughout: rbx = IDT_REGISTER, rdi = COUNTER, rsi = LAPIC.
MAIN = (
    b"\x0f\x01\x1b"  # lidt [rbx]
    b"\xc7\x86\xf0\x00\x00\x00\xff\x01\x00\x00"  # mov dword [rsi + 0xf0], 0x1ff: enable the local APIC
    b"\xe6\xf5"  # out READY, al
    b"\xfb\xf4"  # sti; hlt
    b"\xeb\xfd"  # jmp hlt
)
# It does not return: `iret` does not work in every software KVM.
COUNT_AND_EXIT = b"\xff\x07" + EXIT  # inc dword [rdi]


class SignalWhenReady(Recorder):
    """Signals an eventfd when the guest says that it takes interrupts."""

    def __init__(self, fd: int) -> None:
        super().__init__()
        self.fd = fd

    def pio_write(self, port: int, size: int, value: int) -> None:
        assert port == READY
        os.eventfd_write(self.fd, 1)


def interrupts_taken(vm: Vm, memory: GuestMemory, fd: int) -> int:
    """Let a guest wait for one interrupt on `VECTOR`, which a signal of `fd` is to send; how many it took."""
    gate = struct.pack("<HHBBHII", HANDLER & 0xFFFF, 0x10, 0, 0x8E, HANDLER >> 16, 0, 0)
    memory.write(IDT + 16 * VECTOR, gate)
    memory.write(IDT_REGISTER, struct.pack("<HQ", 16 * (VECTOR + 1) - 1, IDT))
    memory.write(HANDLER, COUNT_AND_EXIT)
    cpu = Cpu(vm, memory, SignalWhenReady(fd))
    cpu.start(MAIN, "long", rdi=COUNTER, rsi=LAPIC, rbx=IDT_REGISTER).wait()
    return int.from_bytes(memory.read(COUNTER, 4), "little")


def test_an_irqfd_sends_its_msi_into_the_guest(vm: Vm, memory: GuestMemory, fd: int) -> None:
    vm.set_msi_routes([(GSI, LAPIC, VECTOR)])
    vm.assign_irqfd(fd, GSI)
    assert interrupts_taken(vm, memory, fd) == 1


def test_the_route_of_an_irqfd_may_change(vm: Vm, memory: GuestMemory, fd: int) -> None:
    vm.set_msi_routes([(GSI, LAPIC, 0x99), (GSI + 1, LAPIC, 0x98)])
    vm.assign_irqfd(fd, GSI)
    vm.set_msi_routes([(GSI, LAPIC, VECTOR)])
    assert interrupts_taken(vm, memory, fd) == 1


def test_an_irqfd_is_assigned_once(vm: Vm, fd: int) -> None:
    vm.set_msi_routes([(GSI, LAPIC, VECTOR)])
    vm.assign_irqfd(fd, GSI)
    with pytest.raises(OSError, match="KVM_IRQFD") as refused:
        vm.assign_irqfd(fd, GSI)
    assert refused.value.errno == errno.EBUSY
    vm.deassign_irqfd(fd, GSI)
    vm.assign_irqfd(fd, GSI)
