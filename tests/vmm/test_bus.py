from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvirtio.accel.inproc import InProcess
from pyvirtio.backends.block import Memory
from pyvirtio.devices.blk import Blk
from pyvirtio.devices.rng import Rng
from pyvirtio.vmm import platform
from pyvirtio.vmm.board import Board, allocate
from pyvirtio.vmm.bus import SystemBus
from pyvirtio.vmm.layout import MIB
from pyvirtio.vmm.pci_bus import IO_WINDOW, MEMORY_WINDOW


class Scratch:
    """A chip of two ports that remembers what was written."""

    ports = (0x500, 0x501)

    def __init__(self) -> None:
        self.written: list[tuple[int, int, int]] = []

    def read(self, port: int, size: int) -> int:
        return port

    def write(self, port: int, size: int, value: int) -> None:
        self.written.append((port, size, value))


@pytest.fixture(scope="module")
def board() -> Iterator[Board]:
    with Board(InProcess(allocate(16 * MIB))) as board:
        board.add(Blk(Memory(1 << 20)), "blk0")
        board.add(Rng(), "rng0")
        board.pci.assign_bars()
        yield board


def test_a_port_belongs_to_its_chip(board: Board) -> None:
    scratch = Scratch()
    bus = SystemBus(board.pci, [scratch])
    bus.pio_write(0x501, 2, 0xABCD)
    assert scratch.written == [(0x501, 2, 0xABCD)]
    assert bus.pio_read(0x500, 1) == 0x500


@pytest.mark.parametrize(("size", "ones"), [(1, 0xFF), (2, 0xFFFF), (4, 0xFFFF_FFFF)])
def test_what_nobody_answers_reads_all_ones(board: Board, size: int, ones: int) -> None:
    bus = SystemBus(board.pci, [])
    bus.pio_write(0x2F8, size, 0)
    bus.mmio_write(0xD000_0000, size, 0)
    assert bus.pio_read(0x2F8, size) == ones
    assert bus.mmio_read(0xD000_0000, size) == ones


def all_chips() -> list[platform.PortDevice]:
    return [
        platform.PowerManagement(lambda: None),
        platform.ResetControl(lambda: None),
        platform.SystemControlB(),
        platform.Cmos(platform.firmware_settings(16 * MIB, 1)),
        platform.DebugPort(lambda data: None),
    ]


CLAIMED = [*(port for chip in all_chips() for port in chip.ports), *IO_WINDOW[:256]]
PORTS = st.integers(0, 0xFFFF) | st.sampled_from(CLAIMED)
ADDRESSES = st.integers(0, (1 << 64) - 1) | st.integers(MEMORY_WINDOW.start, MEMORY_WINDOW.start + 0x10000)
VALUES = st.integers(0, (1 << 64) - 1)


@given(port=PORTS, size=st.sampled_from([1, 2, 4]), value=VALUES)
def test_any_port_access_is_answered(board: Board, port: int, size: int, value: int) -> None:
    bus = SystemBus(board.pci, all_chips())
    bus.pio_write(port, size, value % (1 << 8 * size))
    assert 0 <= bus.pio_read(port, size) < 1 << 32


@given(address=ADDRESSES, size=st.sampled_from([1, 2, 4, 8]), value=VALUES)
def test_any_memory_access_is_answered(board: Board, address: int, size: int, value: int) -> None:
    bus = SystemBus(board.pci, [])
    bus.mmio_write(address, size, value % (1 << 8 * size))
    assert 0 <= bus.mmio_read(address, size) < 1 << 64
