"""Guest memory from Python."""

import os
from array import array

import pytest

from pyvirtio._core import GuestMemory
from pyvirtio.errors import GuestError

KIB = 1024


@pytest.fixture
def memory() -> GuestMemory:
    return GuestMemory.allocate([(0, 64 * KIB), (64 * KIB, 64 * KIB), (1 << 32, 64 * KIB)])


def test_what_is_written_is_read_across_adjacent_regions(memory: GuestMemory) -> None:
    memory.write(64 * KIB - 2, b"abcd")
    assert memory.read(64 * KIB - 2, 4) == b"abcd"


@pytest.mark.parametrize("data", [bytearray(b"ab"), memoryview(b"ab"), array("H", [0x6261])])
def test_any_buffer_can_be_written(memory: GuestMemory, data: bytearray) -> None:
    memory.write(0, data)
    assert memory.read(0, 2) == b"ab"


def test_a_buffer_with_gaps_is_refused(memory: GuestMemory) -> None:
    with pytest.raises(BufferError, match="not contiguous"):
        memory.write(0, memoryview(b"abcd")[::2])


@pytest.mark.parametrize("address", [128 * KIB, (1 << 32) - 1, (1 << 32) + 64 * KIB - 1, (1 << 64) - 1])
def test_outside_ram_is_the_guests_fault(memory: GuestMemory, address: int) -> None:
    with pytest.raises(GuestError, match=r"2 bytes at 0x[0-9a-f]+ are not guest memory"):
        memory.read(address, 2)
    with pytest.raises(GuestError):
        memory.view(address, 2)


def test_an_impossible_length_is_refused_before_it_is_allocated(memory: GuestMemory) -> None:
    with pytest.raises(GuestError):
        memory.read(0, 1 << 60)


def test_a_view_is_the_memory_itself(memory: GuestMemory) -> None:
    view = memory.view((1 << 32) + 16, 4)
    view[:] = b"wxyz"
    assert memory.read((1 << 32) + 16, 4) == b"wxyz"
    memory.write((1 << 32) + 16, b"1")
    assert view.tobytes() == b"1xyz"
    assert len(view) == 4


def test_a_view_lies_in_one_region(memory: GuestMemory) -> None:
    with pytest.raises(GuestError):
        memory.view(64 * KIB - 2, 4)


def test_words_are_little_endian_and_aligned(memory: GuestMemory) -> None:
    memory.store16(8, 0x1234)
    assert memory.read(8, 2) == b"\x34\x12"
    assert memory.load16(8) == 0x1234
    with pytest.raises(GuestError, match="0x9 is not a multiple of 2"):
        memory.load16(9)


def test_memory_of_a_file_is_shared_with_the_file() -> None:
    fd = os.memfd_create("ram")
    os.truncate(fd, 8 * KIB)
    memory = GuestMemory([(0x1000, 4 * KIB, fd, 4 * KIB)])
    memory.write(0x1002, b"hello")
    assert os.pread(fd, 5, 4 * KIB + 2) == b"hello"
    os.close(fd)
    assert memory.view(0x1000, 8).tobytes() == b"\0\0hello\0"
    assert [(address, size, offset) for address, size, _, offset in memory.regions] == [(0x1000, 4 * KIB, 4 * KIB)]


def test_what_cannot_be_mapped_is_an_error() -> None:
    with pytest.raises(OSError, match="Bad file descriptor"):
        GuestMemory([(0, 4 * KIB, -1, 0)])
    with pytest.raises(ValueError, match="overlap"):
        GuestMemory.allocate([(0, 8 * KIB), (4 * KIB, 4 * KIB)])
