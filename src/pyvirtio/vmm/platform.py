"""The few chips of a PC that a kernel or firmware insists on: power management, reset, clock, debug port."""

import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import Protocol

from pyvirtio.vmm import acpi, layout
from pyvirtio.vmm.layout import KIB, MIB

PM_TIMER_HZ = 3_579_545
SLEEP_ENABLE = 1 << 13
SCI_ENABLE = 1 << 0


class PortDevice(Protocol):
    """Registers in the I/O space. `port` is an absolute address."""

    @property
    def ports(self) -> Iterable[int]: ...
    def read(self, port: int, size: int) -> int: ...
    def write(self, port: int, size: int, value: int) -> None: ...


class PowerManagement:
    """The PM1a event and control blocks and the PM timer (ACPI 6.5, 4.8.3). Entering S5 calls `power_off`."""

    def __init__(self, power_off: Callable[[], object]) -> None:
        self.power_off = power_off
        self._timer_start = 0
        self.reset()
        self.ports = range(layout.PM_EVENT_PORT, layout.PM_TIMER_PORT + 4)

    def reset(self) -> None:
        self.enable = 0
        self.control = SCI_ENABLE

    @property
    def _timer(self) -> int:
        return time.monotonic_ns() * PM_TIMER_HZ // 10**9 - self._timer_start

    def save(self) -> dict[str, int]:
        return {"enable": self.enable, "control": self.control, "timer": self._timer}

    def restore(self, state: dict[str, int]) -> None:
        """The timer goes on from where it was."""
        self.enable, self.control = state["enable"], state["control"]
        self._timer_start += self._timer - state["timer"]

    def read(self, port: int, size: int) -> int:
        """PM1 status is always 0: no event ever happens. The enable register reads back what was written."""
        registers = {
            layout.PM_EVENT_PORT: self.enable << 16 if size == 4 else 0,
            layout.PM_EVENT_PORT + 2: self.enable,
            layout.PM_CONTROL_PORT: self.control,
            layout.PM_TIMER_PORT: self._timer & 0xFFFFFF,
        }
        return registers.get(port, 0)

    def write(self, port: int, size: int, value: int) -> None:
        if port == layout.PM_EVENT_PORT and size == 4:
            self.enable = value >> 16
        elif port == layout.PM_EVENT_PORT + 2:
            self.enable = value & 0xFFFF
        elif port == layout.PM_CONTROL_PORT:
            self.control = value & 0xFFFF & ~SLEEP_ENABLE | SCI_ENABLE
            if value & SLEEP_ENABLE and value >> 10 & 7 == acpi.S5_SLEEP_TYPE:
                self.power_off()


class ResetControl:
    """Port 0xcf9, and the reset line of an 8042 that is not there otherwise (0x64 reads 0xff)."""

    KEYBOARD, PULSE_RESET = 0x64, 0xFE
    CPU_RESET = 1 << 2

    def __init__(self, reset: Callable[[], object]) -> None:
        self.reset = reset
        self.ports = (layout.RESET_PORT, self.KEYBOARD)

    def read(self, port: int, size: int) -> int:
        return (1 << 8 * size) - 1 if port == self.KEYBOARD else 0

    def write(self, port: int, size: int, value: int) -> None:
        if (port == self.KEYBOARD and value == self.PULSE_RESET) or (
            port == layout.RESET_PORT and size == 1 and value & self.CPU_RESET
        ):
            self.reset()


class SystemControlB:
    """Port 0x61: the output of timer channel 2 reads as expired, so that nobody waits for it."""

    ports = (0x61,)

    def read(self, port: int, size: int) -> int:
        return 1 << 5

    def write(self, port: int, size: int, value: int) -> None:
        pass


class Cmos:
    """The clock and the 128 bytes behind it. `settings` are bytes that stay: what firmware asks for."""

    INDEX, DATA = 0x70, 0x71
    STATUS_A, STATUS_B, STATUS_C, STATUS_D, CENTURY = 0x0A, 0x0B, 0x0C, 0x0D, 0x32

    def __init__(self, settings: dict[int, int]) -> None:
        self.settings = {self.STATUS_A: 0x26, self.STATUS_B: 0x02, self.STATUS_D: 0x80, **settings}
        self.index = 0
        self.ports = (self.INDEX, self.DATA)

    def read(self, port: int, size: int) -> int:
        if port == self.INDEX:
            return 0xFF
        return self.settings.get(self.index) or self._clock().get(self.index, 0)

    def write(self, port: int, size: int, value: int) -> None:
        if port == self.INDEX:
            self.index = value & 0x7F

    def _clock(self) -> dict[int, int]:
        """The time of day (UTC), binary coded decimal, 24 hours."""
        now = datetime.now(UTC)
        fields = {
            0: now.second, 2: now.minute, 4: now.hour, 6: now.isoweekday() % 7 + 1,
            7: now.day, 8: now.month, 9: now.year % 100, self.CENTURY: now.year // 100,
        }  # fmt: skip
        return {index: value // 10 << 4 | value % 10 for index, value in fields.items()}


class DebugPort:
    """Port 0x402: firmware writes its log here, after it has read 0xe9."""

    PRESENT = 0xE9

    def __init__(self, write_log: Callable[[bytes], object]) -> None:
        self.write_log = write_log
        self.ports = (0x402,)

    def read(self, port: int, size: int) -> int:
        return self.PRESENT

    def write(self, port: int, size: int, value: int) -> None:
        self.write_log(bytes([value & 0xFF]))


def firmware_settings(memory_size: int, cpus: int) -> dict[int, int]:
    """The bytes of the CMOS from which SeaBIOS learns the size of the memory, the CPUs and the boot order."""
    low = min(memory_size, layout.LOW_RAM_MAX)
    above_1m = min(low - MIB, 63 * MIB) // KIB
    above_16m = max(low - 16 * MIB, 0) // (64 * KIB)
    above_4g = max(memory_size - layout.LOW_RAM_MAX, 0) // (64 * KIB)
    boot_disk_only = 0x02
    return {
        0x30: above_1m & 0xFF, 0x31: above_1m >> 8,
        0x34: above_16m & 0xFF, 0x35: above_16m >> 8,
        0x5B: above_4g & 0xFF, 0x5C: above_4g >> 8 & 0xFF, 0x5D: above_4g >> 16,
        0x3D: boot_disk_only, 0x5F: cpus - 1,
    }  # fmt: skip
