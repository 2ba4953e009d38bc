"""Mechanism 1, where BARs are placed, and who answers an access."""

import itertools

import pytest

from pyvirtio import ConfigError
from pyvirtio.transports.pci_config import Bar, BarKind, Command, PciFunction
from pyvirtio.vmm.pci_bus import IO_WINDOW, MEMORY_WINDOW, HostBridge, PciBus, irq_of

ADDRESS, DATA = 0xCF8, 0xCFC


class Scratch(PciFunction):
    """A function whose BARs remember the last write."""

    def __init__(self, slot: int, *bars: Bar) -> None:
        super().__init__(slot, device=0x1000 + slot, class_code=0x00FF00)
        self.set_commands(Command.IO | Command.MEMORY)
        self.last = (0, 0, 0, 0)
        for bar in bars:
            self.add_bar(bar)

    def bar_read(self, bar: int, offset: int, size: int) -> int:
        return self.slot << 8 | bar

    def bar_write(self, bar: int, offset: int, size: int, value: int) -> None:
        self.last = (bar, offset, size, value)


def scratch(slot: int) -> Scratch:
    return Scratch(slot, Bar(0, BarKind.IO, 32), Bar(1, BarKind.MEM32, 4096), Bar(4, BarKind.MEM64_PREFETCH, 1 << 14))


def select(bus: PciBus, slot: int, offset: int = 0, *, function: int = 0, number: int = 0) -> None:
    bus.pio_write(ADDRESS, 4, 1 << 31 | number << 16 | slot << 11 | function << 8 | offset)


def test_every_width_and_offset_of_the_data_register() -> None:
    bus = PciBus([HostBridge()])
    select(bus, 0)
    assert bus.pio_read(ADDRESS, 4) == 1 << 31
    assert bus.pio_read(DATA, 4) == 0x12378086
    assert bus.pio_read(DATA + 2, 2) == 0x1237
    assert [bus.pio_read(DATA + n, 1) for n in range(4)] == [0x86, 0x80, 0x37, 0x12]


@pytest.mark.parametrize("where", [{"slot": 5}, {"slot": 0, "function": 1}, {"slot": 0, "number": 1}])
def test_a_function_that_is_not_there_reads_all_ones(where: dict[str, int]) -> None:
    bus = PciBus([HostBridge()])
    select(bus, **where)
    bus.pio_write(DATA, 4, 0)
    assert bus.pio_read(DATA, 4) == 0xFFFFFFFF


def test_nothing_is_selected_without_the_enable_bit() -> None:
    bus = PciBus([HostBridge()])
    bus.pio_write(ADDRESS, 4, 0)
    assert bus.pio_read(DATA, 2) == 0xFFFF


def test_other_widths_do_not_reach_the_address_register() -> None:
    bus = PciBus([HostBridge()])
    select(bus, 0)
    bus.pio_write(ADDRESS + 1, 1, 6)
    bus.pio_write(ADDRESS, 2, 0)
    assert bus.pio_read(ADDRESS, 4) == 1 << 31
    assert bus.pio_read(ADDRESS, 1) == 0xFF


def test_the_host_bridge_is_the_one_firmware_looks_for() -> None:
    bus = PciBus([HostBridge()])
    select(bus, 0, 0x2C)
    assert bus.pio_read(DATA, 4) == 0x11001AF4
    select(bus, 0, 0x08)
    assert bus.pio_read(DATA + 2, 2) == 0x0600
    select(bus, 0, 0x58)
    bus.pio_write(DATA, 4, 0x33333333)
    assert bus.pio_read(DATA, 4) == 0x33333300


@pytest.mark.parametrize("slot", [3, 32, -1])
def test_a_slot_that_cannot_be_used(slot: int) -> None:
    bus = PciBus([scratch(3)])
    with pytest.raises(ConfigError, match=f"slot {slot} is"):
        bus.add(scratch(slot))


def test_placed_bars_are_aligned_inside_the_windows_and_apart() -> None:
    functions = [scratch(slot) for slot in range(1, 32)]
    PciBus(functions).assign_bars()
    regions = sorted((r.space, r.start, r.end) for f in functions for r in f.regions())
    assert len(regions) == 3 * 31
    for space, start, end in regions:
        window = IO_WINDOW if space == "pio" else MEMORY_WINDOW
        assert start % (end - start) == 0
        assert window.start <= start < end <= window.stop
    for (space, _, end), (next_space, start, _) in itertools.pairwise(regions):
        assert space != next_space or end <= start


def test_bars_that_do_not_fit_are_refused() -> None:
    bus = PciBus([Scratch(4, Bar(4, BarKind.MEM64_PREFETCH, 1 << 30))])
    with pytest.raises(ConfigError, match="slot 4: BAR4 of 0x40000000 bytes"):
        bus.assign_bars()


def test_the_interrupt_line_is_where_inta_is_wired() -> None:
    functions = [scratch(slot) for slot in (1, 7, 9)]
    PciBus(functions).assign_bars()
    assert [f.config_read(0x3C, 1) for f in functions] == [irq_of(1), irq_of(7), irq_of(9)] == [17, 23, 17]


def test_an_access_reaches_the_bar_that_is_there() -> None:
    function = scratch(2)
    bus = PciBus([scratch(1), function])
    bus.assign_bars()
    at = {region.bar: region.start for region in function.regions()}
    assert bus.pio_read(at[0] + 4, 2) == 0x200
    assert bus.mmio_read(at[4], 4) == 0x204
    bus.mmio_write(at[1] + 8, 4, 99)
    assert function.last == (1, 8, 4, 99)
    bus.pio_write(at[0] + 16, 2, 7)
    assert function.last == (0, 16, 2, 7)


def test_what_nobody_answers_reads_all_ones() -> None:
    function = scratch(2)
    bus = PciBus([function])
    assert bus.pio_read(0xC000, 1) == 0xFF
    bus.assign_bars()
    assert bus.mmio_read(MEMORY_WINDOW.stop - 8, 8) == (1 << 64) - 1
    end = next(region.end for region in function.regions() if region.bar == 1)
    assert bus.mmio_read(end - 2, 4) == 0xFFFFFFFF, "an access across the end of a BAR reaches nobody"
    bus.mmio_write(end, 4, 1)
    assert function.last == (0, 0, 0, 0)


def test_an_unplugged_function_answers_no_more() -> None:
    function = scratch(2)
    bus = PciBus([function])
    bus.assign_bars()
    at = next(region.start for region in function.regions() if region.space == "mmio")
    bus.remove(function)
    select(bus, 2)
    assert bus.pio_read(DATA, 4) == bus.mmio_read(at, 4) == 0xFFFFFFFF


def test_reset_takes_the_bars_away_until_they_are_placed_again() -> None:
    function = scratch(2)
    bus = PciBus([function])
    bus.assign_bars()
    bus.reset()
    assert list(function.regions()) == []
    bus.assign_bars()
    assert len(list(function.regions())) == 3


def test_every_function_is_closed_even_if_one_fails() -> None:
    class Closing(Scratch):
        """Fails to close, after all."""

        closed = False

        def close(self) -> None:
            self.closed = True
            raise OSError(5, "Input/output error")

    functions = [Closing(1), Closing(2)]
    with pytest.raises(OSError, match="Input/output error"):
        PciBus(functions).close()
    assert all(function.closed for function in functions)
