"""The blk plane over a backend in Python: whose memory the buffers are, and for how long."""

import os
import resource
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import pytest

from pyvirtio._core import BlkPlane, DeviceState, FileIo, GuestMemory, IoThread, VirtQueue
from pyvirtio.backends.block import BlockBackend
from pyvirtio.testing.queue import HANG
from pyvirtio.testing.ring import NO_NOTIFY, WRITE, Desc, SplitRing

SIZE = 8
HEADER, DATA, STATUS = 0x4000, 0x5000, 0x6000
READ, WRITE_OUT = 0, 1
CAPACITY = 1 << 20


class Keeper(BlockBackend):
    """Keeps what it is given."""

    capacity = CAPACITY

    def __init__(self) -> None:
        self.kept: list[memoryview] = []
        self.parts: list[memoryview] = []
        self.answer: int | None = None

    def keep(self, buffers: list[memoryview], offset: int) -> int | None:
        self.kept += buffers
        self.parts += [buffer[:4] for buffer in buffers]
        return self.answer

    preadv = pwritev = keep


class Disk:
    """A plane on a queue, and the driver's ring for one request at a time."""

    def __init__(self, backend: BlockBackend | FileIo, **options: int) -> None:
        self.memory = GuestMemory.allocate([(0, 1 << 20)])
        self.plane = BlkPlane(backend, capacity=CAPACITY, **options)  # type: ignore[arg-type]
        self.state = DeviceState("blk0", print)
        self.vq = VirtQueue(self.state, "requestq", 0, SIZE)
        self.start()

    def start(self) -> None:
        self.ring = SplitRing(self.memory, SIZE, 0x1000, 0x2000, 0x3000)
        self.vq.start(self.memory, self.plane, size=SIZE, desc=0x1000, avail=0x2000, used=0x3000)

    def do(self, kind: int, data: list[int], sector: int = 0) -> tuple[int, int]:
        """One request with buffers of these sizes; the status and the used length."""
        self.memory.write(HEADER, struct.pack("<IIQ", kind, 0, sector))
        flags = WRITE if kind == READ else 0
        places = [sum(data[:n]) for n in range(len(data))]
        buffers = [Desc(DATA + place, size, flags) for place, size in zip(places, data, strict=True)]
        self.ring.add([Desc(HEADER, 16), *buffers, Desc(STATUS, 1, WRITE)])
        self.ring.publish()
        self.vq.service()
        used = self.ring.pop_used()
        assert used is not None
        return self.memory.read(STATUS, 1)[0], used[1]


@pytest.fixture
def keeper() -> Keeper:
    return Keeper()


@pytest.fixture
def disk(keeper: Keeper) -> Iterator[Disk]:
    disk = Disk(keeper)
    yield disk
    disk.vq.stop()


def test_the_buffers_are_the_guests_own(disk: Disk, keeper: Keeper) -> None:
    disk.memory.write(DATA, b"abcdefgh" + bytes(1016))
    assert disk.do(WRITE_OUT, [512, 512]) == (0, 1)
    assert bytes(keeper.parts[0]) == b"abcd"
    assert keeper.parts[0].readonly
    assert disk.do(READ, [1024]) == (0, 1025)
    keeper.parts[-1][:] = b"wxyz"
    assert disk.memory.read(DATA, 8) == b"wxyzefgh"


def test_a_buffer_is_released_when_the_method_returns(disk: Disk, keeper: Keeper) -> None:
    disk.do(READ, [512])
    with pytest.raises(ValueError, match="released"):
        bytes(keeper.kept[0])


def test_a_part_that_somebody_kept_stays_mapped(keeper: Keeper) -> None:
    """It is not his any more, but it must not crash the process either."""
    disk = Disk(keeper)
    disk.memory.write(DATA, b"mine")
    disk.do(WRITE_OUT, [512])
    disk.vq.stop()
    del disk
    assert bytes(keeper.parts[0]) == b"mine"


@pytest.mark.parametrize(("answer", "status"), [(None, 0), (512, 0), (511, 1), (0, 1)])
def test_a_backend_may_say_how_much_it_did(disk: Disk, keeper: Keeper, answer: int | None, status: int) -> None:
    keeper.answer = answer
    assert disk.do(READ, [512]) == (status, 513 if status == 0 else 1)


def test_a_large_request_comes_in_pieces() -> None:
    """Nobody has to hold more than 1 MiB of a request, however large it is."""

    class Counting(BlockBackend):
        """Remembers the sizes."""

        def __init__(self) -> None:
            self.calls: list[tuple[int, int]] = []

        def pread(self, length: int, offset: int) -> bytes:
            self.calls.append((length, offset))
            return bytes(length)

    backend = Counting()
    disk = Disk(backend)
    disk.plane = BlkPlane(backend, capacity=16 << 20)
    disk.vq.stop()
    disk.ring = SplitRing(disk.memory, SIZE, 0x1000, 0x2000, 0x3000)
    disk.memory.write(0x1000, bytes(0x3000))
    disk.vq.start(disk.memory, disk.plane, size=SIZE, desc=0x1000, avail=0x2000, used=0x3000)
    half = 0x80000
    # Descriptors may overlap, so little memory describes a large request.
    disk.memory.write(HEADER, struct.pack("<IIQ", READ, 0, 0))
    disk.ring.add([Desc(HEADER, 16), *[Desc(half, half, WRITE)] * 5, Desc(STATUS, 1, WRITE)])
    disk.ring.publish()
    disk.vq.service()
    assert disk.ring.pop_used() == (0, 5 * half + 1)
    assert backend.calls == [(1 << 20, 0), (1 << 20, 1 << 20), (half, 2 << 20)]
    disk.vq.stop()


def test_requests_are_whole_blocks() -> None:
    disk = Disk(Keeper(), block_size=4096)
    assert disk.do(READ, [4096], sector=8) == (0, 4097)
    assert disk.do(READ, [4096], sector=1) == (1, 1)
    assert disk.do(READ, [512], sector=8) == (1, 1)
    disk.vq.stop()


def test_a_queue_that_gets_no_ring_of_its_own_is_served_without(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "disk.img").write_bytes(b"z" * CAPACITY)
    with (tmp_path / "disk.img").open("rb") as file:
        disk = Disk(FileIo(file.fileno(), aio="io_uring"))
        disk.vq.stop()
        with no_more_files():
            disk.start()
        assert disk.do(READ, [512]) == (0, 513)
        assert disk.memory.read(DATA, 512) == b"z" * 512
    assert [record.getMessage() for record in caplog.records] == [
        "requestq: no io_uring, served with aio=threads: Too many open files (os error 24)"
    ]


@contextmanager
def no_more_files() -> Iterator[None]:
    """Nothing can be opened."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + HANG
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


class Observer(BlockBackend):
    """Notes how many requests the driver knows to be done, whenever it is asked to read."""

    capacity = CAPACITY

    def __init__(self) -> None:
        self.known: list[int] = []

    def preadv(self, buffers: list[memoryview], offset: int) -> None:
        self.known.append(self.ring.used_idx)

    ring: SplitRing


Kind = TypeVar("Kind", bound=Observer)


def observed(backend: Kind, requests: int) -> Kind:
    """A backend that was asked to read so often, in one batch."""
    memory = GuestMemory.allocate([(0, 1 << 20)])
    vq = VirtQueue(DeviceState("blk0", print), "requestq", 0, 1024)
    backend.ring = ring = SplitRing(memory, 1024, 0x10000, 0x20000, 0x30000)
    vq.start(memory, BlkPlane(backend, capacity=CAPACITY), size=1024, desc=0x10000, avail=0x20000, used=0x30000)
    memory.write(HEADER, struct.pack("<IIQ", READ, 0, 0))
    for _ in range(requests):
        ring.add([Desc(HEADER, 16), Desc(DATA, 512, WRITE), Desc(STATUS, 1, WRITE)])
    ring.publish()
    vq.service()
    assert ring.used_idx == requests
    return backend


def test_the_driver_may_go_on_before_a_large_batch_is_done() -> None:
    known = observed(Observer(), requests=150).known
    assert known == sorted(known)
    assert max(index - done for index, done in enumerate(known)) < 64


class Slowing(Observer):
    """Quick at first, then not any more."""

    def preadv(self, buffers: list[memoryview], offset: int) -> None:
        super().preadv(buffers, offset)
        if len(self.known) > 40:
            time.sleep(0.002)


def test_a_request_that_took_long_does_not_wait_for_its_batch() -> None:
    backend = observed(Slowing(), requests=60)
    assert backend.known[58:] == [58, 59]


@pytest.mark.parametrize("end", ["set_handler", "detach", "hold", "stop"])
def test_who_takes_a_queue_over_waits_for_what_the_host_was_asked_for(end: str) -> None:
    reader, writer = os.pipe()
    disk = Disk(FileIo(reader, aio="io_uring"))
    disk.vq.attach()  # so that the service leaves the answer to whoever polls
    disk.memory.write(HEADER, struct.pack("<IIQ", READ, 0, 0))
    disk.ring.add([Desc(HEADER, 16), Desc(DATA, 512, WRITE), Desc(STATUS, 1, WRITE)])
    disk.ring.publish()
    disk.vq.service()
    assert (disk.vq.in_flight, disk.ring.used_idx) == (1, 0)
    answer = threading.Timer(0.1, os.write, (writer, b"w" * 512))
    answer.start()
    arguments = (disk.plane,) if end == "set_handler" else ()
    getattr(disk.vq, end)(*arguments)
    assert disk.ring.used_idx == 1
    assert disk.memory.read(DATA, 512) == b"w" * 512
    assert disk.memory.read(STATUS, 1) == b"\0"
    answer.join()
    os.close(reader)
    os.close(writer)


@pytest.mark.parametrize("aio", ["threads", "io_uring"])
def test_a_request_without_a_status_byte_is_the_drivers_fault(tmp_path: Path, aio: str) -> None:
    (tmp_path / "disk.img").write_bytes(b"z" * CAPACITY)
    with (tmp_path / "disk.img").open("rb") as file:
        disk = Disk(FileIo(file.fileno(), aio=aio))
        disk.memory.write(HEADER, struct.pack("<IIQ", READ, 0, 0))
        disk.ring.add([Desc(HEADER, 16)])
        disk.ring.publish()
        disk.vq.service()
        assert disk.state.broken == "requestq: a request without a writable status byte"
        disk.vq.stop()


def test_a_driver_that_is_told_twice_gets_no_more_requests_under_way() -> None:
    reader, writer = os.pipe()
    disk = Disk(FileIo(reader, aio="io_uring"))
    disk.vq.set_tap(lambda batch: disk.vq.give_back([*batch, *batch]))
    disk.vq.attach()  # so that the service leaves the answers to whoever polls
    disk.memory.write(HEADER, struct.pack("<IIQ", READ, 0, 0))

    head = disk.ring.add([Desc(HEADER, 16), Desc(DATA, 512, WRITE), Desc(STATUS, 1, WRITE)])
    disk.ring.next_avail -= 1

    def read_one() -> None:
        disk.ring.offer(head)
        disk.ring.publish()
        disk.vq.service()

    for _ in range(SIZE):
        read_one()
    os.write(writer, b"w" * 512)
    while disk.vq.in_flight > SIZE - 2:
        disk.vq.service()
    read_one()
    read_one()
    assert disk.state.broken == f"requestq: more requests under way than the queue has entries ({SIZE})"
    os.close(writer)
    disk.vq.stop()
    os.close(reader)


def test_an_answer_of_the_host_is_no_kick() -> None:
    reader, writer = os.pipe()
    disk = Disk(FileIo(reader, aio="io_uring"))
    loop = IoThread(poll_max_ns=0)
    thread = threading.Thread(target=loop.run)
    thread.start()
    disk.memory.write(HEADER, struct.pack("<IIQ", READ, 0, 0))
    disk.ring.add([Desc(HEADER, 16), Desc(DATA, 512, WRITE), Desc(STATUS, 1, WRITE)])
    disk.ring.publish()
    disk.vq.attach()  # which leaves a kick, the only one
    loop.add(disk.vq)
    wait_until(lambda: disk.vq.in_flight == 1)
    wait_until(lambda: not disk.ring.used_flags & NO_NOTIFY)
    before = disk.vq.counters
    os.write(writer, b"w" * 512)
    wait_until(lambda: disk.ring.used_idx == 1)
    loop.close()
    thread.join()
    after = disk.vq.counters
    changed = {name for name in after if after[name] != before[name]}
    assert changed == {"answers", "interrupts"}
    loop.remove(disk.vq)
    disk.vq.stop()
    os.close(reader)
    os.close(writer)
