"""Configuration space and BARs of a function, before any virtio."""

import pytest

from pyvirtio.transports.pci_config import Bar, BarKind, Command, PciFunction

BAR0, BAR1, BAR4 = 0x10, 0x14, 0x20
ALL_ONES = 0xFFFFFFFF


@pytest.fixture
def function() -> PciFunction:
    function = PciFunction(3, device=0x1001, class_code=0x010000)
    function.set_commands(Command.IO | Command.MEMORY | Command.BUS_MASTER)
    function.add_bar(Bar(0, BarKind.IO, 32))
    function.add_bar(Bar(1, BarKind.MEM32, 4096))
    function.add_bar(Bar(4, BarKind.MEM64_PREFETCH, 16384))
    return function


def addresses(function: PciFunction) -> dict[int, int]:
    return {region.bar: region.start for region in function.regions()}


@pytest.mark.parametrize(
    ("register", "reads"), [(BAR0, 0xFFFFFFE1), (BAR1, 0xFFFFF000), (BAR4, 0xFFFFC00C), (BAR4 + 4, ALL_ONES)]
)
def test_a_bar_of_ones_reads_back_its_size(function: PciFunction, register: int, reads: int) -> None:
    function.config_write(register, 4, ALL_ONES)
    assert function.config_read(register, 4) == reads


@pytest.mark.parametrize("register", [BAR0 + 8, BAR0 + 12])
def test_a_bar_that_is_not_there_reads_0(function: PciFunction, register: int) -> None:
    function.config_write(register, 4, ALL_ONES)
    assert function.config_read(register, 4) == 0


def test_a_bar_answers_where_it_is_placed_while_its_command_bit_is_set(function: PciFunction) -> None:
    for register, address in ((BAR0, 0xC000), (BAR1, 0xE0000000), (BAR4, 0xE0004000)):
        function.config_write(register, 4, address)
    assert addresses(function) == {}
    function.config_write(4, 2, Command.IO)
    assert addresses(function) == {0: 0xC000}
    function.config_write(4, 2, Command.MEMORY)
    assert addresses(function) == {1: 0xE0000000, 4: 0xE0004000}


def test_a_64_bit_bar_can_be_above_4_gib(function: PciFunction) -> None:
    function.config_write(BAR4 + 4, 4, 0x12)
    function.config_write(4, 2, Command.MEMORY)
    assert addresses(function) == {4: 0x12_0000_0000}


@pytest.mark.parametrize("value", [0, ALL_ONES])
def test_a_bar_that_is_not_placed_or_being_sized_answers_nothing(function: PciFunction, value: int) -> None:
    function.config_write(4, 2, Command.IO | Command.MEMORY)
    for register in (BAR0, BAR1, BAR4, BAR4 + 4):
        function.config_write(register, 4, value)
    assert addresses(function) == {}


def test_changes_of_decoding_are_told_and_nothing_else_is(function: PciFunction) -> None:
    told: list[dict[int, int]] = []
    function.decoding_changed = lambda: told.append(addresses(function))
    function.config_write(BAR1, 4, 0xE0000000)
    function.config_write(4, 2, Command.MEMORY)
    function.config_write(4, 2, Command.MEMORY | Command.BUS_MASTER)
    function.config_write(BAR1, 4, 0xE0000000)
    function.config_write(0x3C, 1, 11)
    assert told == [{}, {1: 0xE0000000}]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_read_only_bytes_stay(function: PciFunction, size: int) -> None:
    before = function.config_read(0, 4)
    function.config_write(0, size, (1 << 8 * size) - 1)
    function.config_write(8, size, (1 << 8 * size) - 1)
    assert function.config_read(0, 4) == before == 0x10011AF4
    assert function.config_read(8, 4) == 0x01000000


def test_capabilities_are_a_list_of_aligned_entries(function: PciFunction) -> None:
    first = function.config.add_capability(0x09, b"\x05abc")
    second = function.config.add_capability(0x11, b"xy", b"\xff")
    assert function.config_read(0x06, 2) == 1 << 4
    assert function.config_read(0x34, 1) == first
    assert function.config_read(first, 2) == second << 8 | 0x09
    assert function.config_read(second, 2) == 0x11
    assert first % 4 == second % 4 == 0
    function.config_write(second, 4, 0)
    assert function.config_read(second, 4) == 0x79000011


def test_reset_forgets_what_software_wrote(function: PciFunction) -> None:
    function.config_write(BAR4, 4, 0xE0000000)
    function.config_write(0x3C, 1, 11)
    function.config_write(4, 2, Command.MEMORY)
    function.reset()
    assert addresses(function) == {}
    assert [function.config_read(at, 4) for at in (4, BAR0, BAR4, 0x3C)] == [0, 1, 0xC, 0]
