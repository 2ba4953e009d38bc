from collections.abc import Callable

import pytest

from pyvirtio.vmm import layout
from pyvirtio.vmm.layout import GIB, MIB
from pyvirtio.vmm.platform import Cmos, DebugPort, PowerManagement, ResetControl, SystemControlB, firmware_settings


class Called:
    """Counts how often it was called."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self) -> None:
        self.times += 1


@pytest.fixture
def called() -> Called:
    return Called()


def test_s5_powers_off_and_other_sleep_types_do_not(called: Called) -> None:
    power = PowerManagement(called)
    power.write(layout.PM_CONTROL_PORT, 2, 5 << 10)
    power.write(layout.PM_CONTROL_PORT, 2, 1 << 13 | 3 << 10)
    assert called.times == 0
    power.write(layout.PM_CONTROL_PORT, 2, 1 << 13 | 5 << 10)
    assert called.times == 1


def test_acpi_is_always_enabled_and_the_event_block_reads_back(called: Called) -> None:
    power = PowerManagement(called)
    power.write(layout.PM_CONTROL_PORT, 2, 0)
    assert power.read(layout.PM_CONTROL_PORT, 2) == 1
    power.write(layout.PM_EVENT_PORT + 2, 2, 0x0120)
    power.write(layout.PM_EVENT_PORT, 2, 0xFFFF)
    assert power.read(layout.PM_EVENT_PORT + 2, 2) == 0x0120
    assert power.read(layout.PM_EVENT_PORT, 2) == 0
    power.write(layout.PM_EVENT_PORT, 4, 0x0001_FFFF)
    assert power.read(layout.PM_EVENT_PORT, 4) == 0x0001_0000
    power.reset()
    assert power.read(layout.PM_EVENT_PORT + 2, 2) == 0


def test_pm_timer_has_24_bits_and_its_frequency(called: Called, monkeypatch: pytest.MonkeyPatch) -> None:
    power = PowerManagement(called)
    monkeypatch.setattr("time.monotonic_ns", lambda: 10**9)
    assert power.read(layout.PM_TIMER_PORT, 4) == 3_579_545
    monkeypatch.setattr("time.monotonic_ns", lambda: 10**15)
    assert power.read(layout.PM_TIMER_PORT, 4) < 1 << 24


@pytest.mark.parametrize(("port", "value"), [(0xCF9, 0x06), (0xCF9, 0x0E), (0x64, 0xFE)])
def test_reset_ports(called: Called, port: int, value: int) -> None:
    ResetControl(called).write(port, 1, value)
    assert called.times == 1


@pytest.mark.parametrize(("port", "size", "value"), [(0xCF9, 1, 0x02), (0xCF9, 4, 0x06), (0x64, 1, 0xD1)])
def test_writes_that_do_not_reset(called: Called, port: int, size: int, value: int) -> None:
    ResetControl(called).write(port, size, value)
    assert called.times == 0


def test_there_is_no_8042(called: Called) -> None:
    assert ResetControl(called).read(0x64, 1) == 0xFF


def test_timer_channel_2_has_always_expired() -> None:
    assert SystemControlB().read(0x61, 1) & 1 << 5


def cmos_reader(cmos: Cmos) -> Callable[[int], int]:
    def read(index: int) -> int:
        cmos.write(0x70, 1, index | 0x80)  # bit 7 masks NMIs
        return cmos.read(0x71, 1)

    return read


def test_clock_is_valid_and_not_updating() -> None:
    read = cmos_reader(Cmos({}))
    assert not read(0x0A) & 0x80
    assert read(0x0D) & 0x80
    assert read(0x32) == 0x20  # the century, binary coded decimal
    assert all(digit < 10 for index in (0, 2, 4, 7, 8, 9) for digit in divmod(read(index), 16))


def test_firmware_learns_the_size_of_the_memory() -> None:
    read = cmos_reader(Cmos(firmware_settings(512 * MIB, 3)))
    assert read(0x34) | read(0x35) << 8 == (512 - 16) * MIB // 65536
    assert read(0x5B) | read(0x5C) << 8 | read(0x5D) << 16 == 0
    assert read(0x5F) == 2
    read = cmos_reader(Cmos(firmware_settings(5 * GIB, 1)))
    assert read(0x34) | read(0x35) << 8 == (3 * GIB - 16 * MIB) // 65536
    assert read(0x5B) | read(0x5C) << 8 | read(0x5D) << 16 == 2 * GIB // 65536


def test_debug_port_says_that_it_is_there_and_logs() -> None:
    log: list[bytes] = []
    port = DebugPort(log.append)
    assert port.read(0x402, 1) == 0xE9
    port.write(0x402, 1, ord("S"))
    assert log == [b"S"]
