"""The vCPU loop: what exits to the bus, how a CPU is stopped, and how it ends."""

import logging
import os
import threading
import time

import pytest
from freestanding import EXIT, HANG, IN, LOAD, OUT, STORE, Cpu, Recorder, UntilDone, repeat

from pyvirtio._core import GuestMemory, Serial, Vm, supported

MMIO = 0xD000_0000
HLT = b"\xf4"
FOREVER = b"\xeb\xfe"  # jmp to itself
STI = b"\xfb"


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_port_is_written_and_read_with_the_width_of_the_instruction(cpu: Cpu, bus: Recorder, size: int) -> None:
    bus.value = 0x8877_6655_4433_2211
    registers = cpu.execute(OUT[size] + IN[size], rdx=0x510, rax=0x0403_0201)
    assert bus.accesses == [("out", 0x510, size, 0x0403_0201 & (1 << 8 * size) - 1), ("in", 0x510, size)]
    assert registers["rax"] & (1 << 8 * size) - 1 == bus.value & (1 << 8 * size) - 1


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_memory_that_is_no_ram_is_the_bus(cpu: Cpu, bus: Recorder, size: int) -> None:
    bus.value = 0x8877_6655_4433_2211
    registers = cpu.execute(STORE[size] + LOAD[size], "long", rdi=MMIO, rax=0x0807_0605_0403_0201)
    mask = (1 << 8 * size) - 1
    assert bus.accesses == [("store", MMIO, size, 0x0807_0605_0403_0201 & mask), ("load", MMIO, size)]
    assert registers["rax"] & mask == bus.value & mask


def test_string_instructions_reach_the_bus_element_by_element(cpu: Cpu, bus: Recorder, memory: GuestMemory) -> None:
    memory.write(0x20000, b"abcde")
    cpu.execute(b"\xf3\x6e", rsi=0x20000, rcx=5, rdx=0x402)  # rep outsb
    assert bytes(value for _, _, _, value in bus.accesses) == b"abcde"  # type: ignore[misc]
    bus.value = 0x1234
    cpu.execute(b"\xf3\x66\x6d", rdi=0x20000, rcx=3, rdx=0x402)  # rep insw
    assert memory.read(0x20000, 7) == b"\x34\x12" * 3 + b"\0"


def test_an_exception_of_the_bus_is_logged_and_reads_all_ones(
    cpu: Cpu, bus: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(port: int, size: int) -> int:
        raise LookupError("no such port")

    bus.pio_read = fail  # type: ignore[method-assign]
    registers = cpu.execute(IN[4] + OUT[1], rdx=0x60)
    assert registers["rax"] == 0xFFFF_FFFF
    assert bus.accesses == [("out", 0x60, 1, 0xFF)], "the guest did not go on"
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert "0x60" in record.getMessage()
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], LookupError)


def test_exits_are_counted_by_kind(cpu: Cpu, bus: Recorder) -> None:
    cpu.execute(repeat(OUT[2]) + IN[1] + STORE[4] + LOAD[4], rcx=3, rdx=0x510, rdi=MMIO)
    exits = cpu.vcpu.exits
    assert (exits["pio_read"], exits["mmio_read"], exits["mmio_write"]) == (1, 1, 1)
    assert exits["pio_write"] == 4, "three and the one that ended it"


@pytest.mark.parametrize("code", [STI + HLT, FOREVER], ids=["in HLT", "in a loop"])
def test_stop_ends_a_cpu_wherever_it_is(cpu: Cpu, bus: Recorder, code: bytes) -> None:
    running = cpu.start(OUT[1] + code, rdx=0x60)
    while not bus.accesses:
        time.sleep(0.001)
    assert running.is_running
    running.stop()


def test_stop_before_run_is_not_lost(cpu: Cpu, bus: Recorder) -> None:
    cpu.load(FOREVER, "protected", {})
    cpu.vcpu.stop()
    assert cpu.vcpu.run(bus) == "stopped"


def test_a_stopped_cpu_goes_on_where_it_was(cpu: Cpu, bus: Recorder) -> None:
    bus.value = 0x42
    cpu.load(IN[1] + OUT[1], "protected", {"rdx": 0x60})
    cpu.vcpu.stop()
    assert cpu.vcpu.run(bus) == "stopped"
    assert not bus.accesses
    cpu.run()
    assert bus.accesses == [("in", 0x60, 1), ("out", 0x60, 1, 0x42)]


def test_a_cpu_that_is_stopped_all_the_time_still_gets_on(cpu: Cpu, bus: Recorder) -> None:
    """A stop between the two halves of a read must not lose the value."""
    bus.value = 0x17
    cpu.load(repeat(IN[1] + OUT[1]), "protected", {"rdx": 0x60, "rcx": 200})
    done = threading.Event()

    def nag() -> None:
        while not done.wait(0.0005):
            cpu.vcpu.stop()

    def finish() -> None:
        done.set()
        cpu.vcpu.stop()

    nagging = threading.Thread(target=nag)
    nagging.start()
    while not done.is_set():
        cpu.vcpu.run(UntilDone(bus, finish))
    nagging.join(HANG)
    assert bus.accesses == [("in", 0x60, 1), ("out", 0x60, 1, 0x17)] * 200


def test_a_triple_fault_is_a_shutdown(cpu: Cpu, memory: GuestMemory) -> None:
    cpu.load(b"\x0f\x0b", "protected", {})  # ud2, and no interrupt descriptor table
    assert cpu.run() == "shutdown"


def test_hlt_without_an_irqchip_returns(memory: GuestMemory, bus: Recorder) -> None:
    vm = Vm()
    vm.set_memory(memory)
    vcpu = vm.create_vcpu(0)
    vcpu.set_cpuid(1)
    memory.write(0x1000, HLT)
    vcpu.set_registers("real", rip=0x1000)
    assert vcpu.run(bus) == "hlt"


def test_a_cpu_that_runs_is_nobody_elses(cpu: Cpu, bus: Recorder) -> None:
    def meddle(port: int, size: int) -> int:
        for attempt in (lambda: cpu.vcpu.run(bus), cpu.vcpu.get_registers, lambda: cpu.vcpu.set_cpuid(1)):
            with pytest.raises(RuntimeError, match="vcpu 0 is running"):
                attempt()
        return 7

    bus.pio_read = meddle  # type: ignore[method-assign]
    assert cpu.execute(IN[4], rdx=0x60)["rax"] == 7


def test_application_processors_wait_to_be_started(vm: Vm, cpu: Cpu, bus: Recorder) -> None:
    other = vm.create_vcpu(1)
    other.set_cpuid(2)
    outcome: list[str] = []
    thread = threading.Thread(target=lambda: outcome.append(other.run(bus)))
    thread.start()
    cpu.execute(OUT[1], rdx=0x60)
    other.stop()
    thread.join(HANG)
    assert outcome == ["stopped"]
    assert bus.accesses == [("out", 0x60, 1, 0)]


def test_a_rom_reads_its_data_and_exits_on_writes(vm: Vm, cpu: Cpu, bus: Recorder) -> None:
    vm.add_rom(0xFFFF_0000, b"\x12\x34\x56\x78" * 16384)
    registers = cpu.execute(STORE[4] + LOAD[4], rdi=0xFFFF_0000, rax=0xAAAA_AAAA)
    assert bus.accesses == [("store", 0xFFFF_0000, 4, 0xAAAA_AAAA)]
    assert registers["rax"] == 0x7856_3412


def test_the_reset_vector_is_below_4_gib(vm: Vm, memory: GuestMemory) -> None:
    rom = bytearray(b"\xf4" * 0x10000)
    rom[0xFFF0 : 0xFFF0 + len(EXIT)] = EXIT
    vm.add_rom(0xFFFF_0000, bytes(rom))
    vcpu = vm.create_vcpu(0)
    vcpu.set_cpuid(1)
    bus = Recorder()
    assert vcpu.run(UntilDone(bus, vcpu.stop)) == "stopped"
    assert vcpu.get_registers()["rip"] == 0xFFF2


class Terminal:
    """A serial port at 0x3f8 and what it printed."""

    def __init__(self, vm: Vm) -> None:
        self.reader, writer = os.pipe()
        self.port = Serial(vm.irq_line(4), writer)
        vm.attach_serial(self.port, 0x3F8)
        os.close(writer)

    def printed(self, length: int) -> bytes:
        data = b""
        while len(data) < length:
            data += os.read(self.reader, length - len(data))
        return data


def test_the_serial_port_prints_without_the_bus(vm: Vm, cpu: Cpu, bus: Recorder, memory: GuestMemory) -> None:
    terminal = Terminal(vm)
    memory.write(0x20000, b"hello")
    cpu.execute(b"\xf3\x6e", rsi=0x20000, rcx=5, rdx=0x3F8)  # rep outsb
    assert terminal.printed(5) == b"hello"
    assert not bus.accesses
    assert cpu.vcpu.exits["serial"] >= 1


def test_what_somebody_types_is_read_from_the_serial_port(vm: Vm, cpu: Cpu) -> None:
    terminal = Terminal(vm)
    assert terminal.port.receive(b"k") == 1
    assert cpu.execute(IN[1], rdx=0x3FD)["rax"] & 1, "line status: data ready"
    assert cpu.execute(IN[1], rdx=0x3F8)["rax"] == ord("k")
    assert terminal.port.receive(bytes(1000)) == 64, "the FIFO's size"


def test_a_reader_that_takes_nothing_does_not_hang_the_cpu(vm: Vm, cpu: Cpu) -> None:
    terminal = Terminal(vm)
    cpu.execute(repeat(OUT[1]), rcx=66000, rdx=0x3F8, rax=ord("x"))
    assert terminal.printed(4096) == b"x" * 4096, "what fits into the pipe was kept"


def test_supported_names_what_is_wrong() -> None:
    assert supported("/dev/null") == "not a KVM device"
    assert supported("/dev/no-such-kvm") == "No such file or directory"
