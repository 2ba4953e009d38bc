"""The in-process accelerator keeps the rules of KVM_IOEVENTFD, so that what passes here passes there."""

import errno
import os
from collections.abc import Iterator

import pytest

from pyvirtio._core import GuestMemory, MsixVector
from pyvirtio.accel.inproc import InProcess
from pyvirtio.transports.base import IoAddress


class Bus:
    """Remembers the accesses that reach it."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int, int, int]] = []

    def pio_write(self, port: int, size: int, value: int) -> None:
        self.seen.append(("pio", port, size, value))

    def mmio_write(self, address: int, size: int, value: int) -> None:
        self.seen.append(("mmio", address, size, value))

    def pio_read(self, port: int, size: int) -> int:
        return port + size

    def mmio_read(self, address: int, size: int) -> int:
        return address + size


@pytest.fixture
def accel() -> InProcess:
    machine = InProcess(GuestMemory.allocate([(0, 4096)]))
    machine.bus = Bus()
    return machine


@pytest.fixture
def fd() -> Iterator[int]:
    eventfd = os.eventfd(0, os.EFD_NONBLOCK)
    yield eventfd
    os.close(eventfd)


def signals(fd: int) -> int:
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0


@pytest.mark.parametrize(
    ("at", "write", "matches"),
    [
        (IoAddress("pio", 16, 2, 3), ("pio", 16, 2, 3), True),
        (IoAddress("pio", 16, 2, 3), ("pio", 16, 2, 4), False),
        (IoAddress("pio", 16, 2, 3), ("pio", 16, 4, 3), False),
        (IoAddress("pio", 16, 2, 3), ("pio", 17, 2, 3), False),
        (IoAddress("pio", 16, 2, 3), ("mmio", 16, 2, 3), False),
        (IoAddress("pio", 16, 2, None), ("pio", 16, 2, 4), True),
        (IoAddress("mmio", 64, 0, None), ("mmio", 64, 1, 9), True),
        (IoAddress("mmio", 64, 0, None), ("mmio", 64, 8, 9), True),
        (IoAddress("mmio", 64, 0, None), ("mmio", 65, 1, 9), False),
    ],
)
def test_a_write_matches_or_exits(
    accel: InProcess, fd: int, at: IoAddress, write: tuple[str, int, int, int], matches: bool
) -> None:
    accel.assign_ioeventfd(fd, at)
    space, address, size, value = write
    (accel.pio_write if space == "pio" else accel.mmio_write)(address, size, value)
    assert signals(fd) == matches
    assert accel.bus.seen == ([] if matches else [write])  # type: ignore[union-attr]
    assert accel.exits == (not matches)


@pytest.mark.parametrize(
    ("first", "second", "collide"),
    [
        ((2, 3), (2, 3), True),
        ((2, 3), (2, 4), False),
        ((2, 3), (4, 3), False),
        ((2, None), (2, 3), True),
        ((2, 3), (2, None), True),
        ((2, None), (4, None), False),
        ((0, None), (0, None), True),
        ((0, None), (2, 3), True),
        ((2, 3), (0, None), True),
    ],
)
def test_two_that_could_match_one_write_collide(
    accel: InProcess, fd: int, first: tuple[int, int | None], second: tuple[int, int | None], collide: bool
) -> None:
    accel.assign_ioeventfd(fd, IoAddress("mmio", 64, *first))
    if collide:
        with pytest.raises(FileExistsError):
            accel.assign_ioeventfd(fd, IoAddress("mmio", 64, *second))
    else:
        accel.assign_ioeventfd(fd, IoAddress("mmio", 64, *second))
    accel.assign_ioeventfd(fd, IoAddress("pio", 64, *second))
    accel.assign_ioeventfd(fd, IoAddress("mmio", 72, *second))


@pytest.mark.parametrize(("length", "datamatch"), [(3, None), (16, None), (0, 5)])
def test_what_kvm_does_not_know_is_invalid(accel: InProcess, fd: int, length: int, datamatch: int | None) -> None:
    with pytest.raises(OSError, match="Invalid argument"):
        accel.assign_ioeventfd(fd, IoAddress("pio", 16, length, datamatch))
    assert accel.ioeventfds == set()


def test_undo_removes_that_one_only(accel: InProcess, fd: int) -> None:
    undo = [accel.assign_ioeventfd(fd, IoAddress("pio", 16, 2, n)) for n in range(3)]
    undo[1]()
    assert {at.datamatch for at in accel.ioeventfds} == {0, 2}
    accel.pio_write(16, 2, 1)
    assert signals(fd) == 0
    accel.pio_write(16, 2, 2)
    assert signals(fd) == 1
    accel.assign_ioeventfd(fd, IoAddress("pio", 16, 2, 1))


def test_an_injected_failure_assigns_nothing(accel: InProcess, fd: int) -> None:
    accel.fail_ioeventfd_at = {1: errno.ENOSPC}
    accel.assign_ioeventfd(fd, IoAddress("pio", 16, 2, 0))
    with pytest.raises(OSError, match="No space left"):
        accel.assign_ioeventfd(fd, IoAddress("pio", 16, 2, 1))
    accel.assign_ioeventfd(fd, IoAddress("pio", 16, 2, 2))
    assert {at.datamatch for at in accel.ioeventfds} == {0, 2}


def test_a_saturated_eventfd_does_not_block_the_vcpu(accel: InProcess, fd: int) -> None:
    os.eventfd_write(fd, (1 << 64) - 2)
    accel.assign_ioeventfd(fd, IoAddress("pio", 16, 2, 0))
    accel.pio_write(16, 2, 0)
    assert signals(fd) == (1 << 64) - 2


def test_reads_always_exit(accel: InProcess, fd: int) -> None:
    accel.assign_ioeventfd(fd, IoAddress("pio", 16, 2, 0))
    assert (accel.pio_read(16, 2), accel.mmio_read(64, 4)) == (18, 68)
    assert accel.exits == 2


def test_a_vector_is_routed_until_it_is_released(accel: InProcess) -> None:
    vector = MsixVector()
    accel.route_msi(vector, 0xFEE00000, 1)
    accel.route_msi(vector, 0xFEE00000, 2)
    assert accel.routes == {vector: (0xFEE00000, 2)}
    accel.release_msi(vector)
    accel.release_msi(vector)
    assert accel.routes == {}


def test_the_line_of_a_slot_is_high_while_an_input_is(accel: InProcess) -> None:
    first, second = accel.intx_line(3), accel.intx_line(3)
    first.set(True)
    second.set(True)
    first.set(False)
    assert accel.lines[3].level
    second.set(False)
    assert not accel.lines[3].level
    assert not accel.intx_line(4).level
