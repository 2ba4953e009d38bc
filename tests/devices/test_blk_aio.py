"""How a disk in a file is read and written: through the page cache or past it, in the loop or through io_uring."""

import logging
import os
import random
import threading
from pathlib import Path

import pytest
from serving import Serve

from pyvirtio._core import FileIo
from pyvirtio.backends import block
from pyvirtio.backends.block import BlockBackend, File
from pyvirtio.devices.blk import Blk
from pyvirtio.errors import ConfigError
from pyvirtio.testing import Guest
from pyvirtio.testing.blk import SECTOR, Disk, Kind, Request, Verdict
from pyvirtio.testing.vhost_user import FrontEnd

MIB = 1 << 20
WAYS = [
    ("writeback", "threads"), ("writeback", "io_uring"), ("writethrough", "io_uring"), ("none", "threads"),
    ("none", "io_uring"),
]  # fmt: skip


def opened(path: Path, cache: str, aio: str) -> File:
    try:
        return File(path, cache=cache, aio=aio)
    except ConfigError as error:
        if "not possible on its file system" in str(error):
            pytest.skip(f"O_DIRECT: {error}")
        raise


@pytest.fixture(params=WAYS, ids=["-".join(way) for way in WAYS])
def file(request: pytest.FixtureRequest, tmp_path: Path) -> File:
    cache, aio = request.param
    (tmp_path / "disk.img").write_bytes(os.urandom(MIB))
    file = opened(tmp_path / "disk.img", cache, aio)
    assert file.aio == aio
    return file


def pieces(length: int, chance: random.Random) -> list[int]:
    """Sizes of buffers, seldom aligned, that are so many bytes together."""
    if chance.random() < 0.4:
        return [length]
    cut = sorted(chance.randrange(length + 1) for _ in range(chance.randrange(6)))
    return [end - start for start, end in zip([0, *cut], [*cut, length], strict=True)]


def test_random_requests_are_done_as_on_a_plain_array(guest: Guest, file: File) -> None:
    chance = random.Random(4)
    disk = Disk(guest.plug(Blk(file, queue_size=128), name="blk0"))
    model = bytearray(file.path.read_bytes())
    unit = file.block_size
    for _ in range(30):
        under_way: list[tuple[Request, int, bytes | None]] = []
        places = chance.sample(range(0, MIB, MIB // 16), 8)  # no two requests touch the same bytes
        for place in places:
            offset = place + chance.randrange(8) * unit
            length = chance.randrange(1, 9) * unit
            sizes = pieces(length, chance)
            if chance.random() < 0.5:
                data = chance.randbytes(length)
                starts = [sum(sizes[:n]) for n in range(len(sizes))]
                parts = [data[start : start + size] for start, size in zip(starts, sizes, strict=True)]
                under_way.append((disk.submit(Kind.WRITE, offset // SECTOR, parts, kick=False), offset, data))
            else:
                under_way.append((disk.submit(Kind.READ, offset // SECTOR, room=sizes, kick=False), offset, None))
        disk.queues[0].kick()
        for request, offset, written in under_way:
            assert request.wait() is Verdict.OK
            if written is not None:
                model[offset : offset + len(written)] = written
            else:
                assert request.data == model[offset : offset + request.room]
        if chance.random() < 0.2:
            disk.flush()
    assert file.path.read_bytes() == model


def test_a_large_request_and_the_other_kinds(guest: Guest, file: File) -> None:
    blk = Blk(file, serial="mine")
    disk = Disk(guest.plug(blk, name="blk0"))
    content = os.urandom(MIB // 2)
    before = blk.plane.counters
    disk.write(0, content)
    assert disk.read(0, MIB // 2) == content
    assert blk.plane.counters["flushes"] - before["flushes"] == file.writethrough
    disk.flush()
    assert disk.get_id() == "mine"
    disk.discard(0, 64)
    disk.write_zeroes(64, 64)
    assert disk.read(0, 128 * SECTOR) == bytes(128 * SECTOR)
    assert disk.read(128, SECTOR) == content[128 * SECTOR : 129 * SECTOR]
    after = blk.plane.counters
    assert after["bytes_read"] - before["bytes_read"] == MIB // 2 + 129 * SECTOR
    assert after["bytes_written"] - before["bytes_written"] == MIB // 2 + 64 * SECTOR
    assert after["errors"] == 0


def test_a_file_that_became_shorter_fails_the_requests_past_its_end(guest: Guest, file: File) -> None:
    disk = Disk(guest.plug(Blk(file), name="blk0"))
    os.truncate(file.path, MIB // 2)
    requests = [disk.submit(Kind.READ, sector, room=8192, kick=False) for sector in (0, MIB // 2 // SECTOR)]
    requests.append(disk.submit(Kind.READ, (MIB // 2 - 4096) // SECTOR, room=8192, kick=False))
    disk.queues[0].kick()
    assert [request.wait() for request in requests] == [Verdict.OK, Verdict.IOERR, Verdict.IOERR]
    assert disk.read(0, 4096) == file.path.read_bytes()[:4096]


def neighbours(disk: Disk, kind: Kind, parts: list[bytes]) -> list[Request]:
    """Requests that follow one another from the beginning of the disk, all available at once."""
    requests, sector = [], 0
    for part in parts:
        data, room = ([part], []) if kind is Kind.WRITE else ([], [len(part)])
        requests.append(disk.submit(kind, sector, data, room=room, kick=False))
        sector += len(part) // SECTOR
    disk.queues[0].kick()
    return requests


def test_neighbours_are_done_together(guest: Guest, file: File) -> None:
    blk = Blk(file, queue_size=128)
    disk = Disk(guest.plug(blk, name="blk0"))
    parts = [os.urandom(n * file.block_size) for n in (1, 3, 2, 1, 5, 8, 1, 1)]
    assert [request.wait() for request in neighbours(disk, Kind.WRITE, parts)] == [Verdict.OK] * 8
    assert disk.read(0, 22 * file.block_size) == b"".join(parts)
    reads = neighbours(disk, Kind.READ, parts)
    assert [request.wait() for request in reads] == [Verdict.OK] * 8
    assert [request.data for request in reads] == parts
    # Written through, each write is flushed before it is answered.
    assert blk.plane.counters["merged"] == (7 if file.writethrough else 14)


def test_neighbours_that_fail_together_fail_each_for_itself(guest: Guest, file: File) -> None:
    disk = Disk(guest.plug(Blk(file), name="blk0"))
    content = file.path.read_bytes()
    os.truncate(file.path, 3 * 4096 + file.block_size)
    reads = neighbours(disk, Kind.READ, [bytes(8192)] * 4)
    assert [request.wait() for request in reads] == [Verdict.OK, Verdict.IOERR, Verdict.IOERR, Verdict.IOERR]
    assert reads[0].data == content[:8192]
    assert reads[1].buffer.used_len == 4096 + file.block_size + 1
    assert reads[2].buffer.used_len == 1


def test_the_methods_in_python_do_the_same(file: File) -> None:
    content = file.path.read_bytes()
    data = os.urandom(2 * file.block_size)
    assert file.pread(100, file.block_size) == content[file.block_size : file.block_size + 100]
    file.pwrite(data, file.block_size)
    assert file.pread(4 * file.block_size, 0)[file.block_size : 3 * file.block_size] == data
    file.close()


class Full(BlockBackend):
    """What is written finds no room."""

    capacity = MIB
    readonly = False

    def __init__(self, aio: str) -> None:
        self._file = open("/dev/full", "r+b", buffering=0)  # noqa: SIM115 - closed with the device
        self._aio = aio

    def native(self) -> FileIo:
        return FileIo(self._file.fileno(), aio=self._aio)

    def close(self) -> None:
        self._file.close()


@pytest.mark.parametrize("aio", ["threads", "io_uring"])
def test_the_hosts_errors_fail_the_request_and_nothing_more(guest: Guest, aio: str) -> None:
    disk = Disk(guest.plug(Blk(Full(aio)), name="blk0"))
    requests = [disk.submit(Kind.WRITE, n, b"x" * SECTOR, kick=False) for n in range(8)]
    disk.queues[0].kick()
    assert [request.wait() for request in requests] == [Verdict.IOERR] * 8
    assert disk.read(0, SECTOR) == bytes(SECTOR)


class Slow(BlockBackend):
    """A disk whose reads are answered when the test says so."""

    capacity = MIB

    def __init__(self) -> None:
        self._reader, self._writer = os.pipe()
        self.answered = threading.Event()

    def native(self) -> FileIo:
        return FileIo(self._reader, aio="io_uring")

    def answer_soon(self) -> threading.Thread:
        """From another thread, for whoever waits on this one."""
        thread = threading.Timer(0.2, self.answer)
        thread.start()
        return thread

    def answer(self) -> None:
        self.answered.set()
        os.write(self._writer, b"y" * SECTOR)

    def close(self) -> None:
        os.close(self._reader)
        os.close(self._writer)


def test_a_reset_waits_for_requests_that_the_host_has_not_answered(guest: Guest) -> None:
    slow = Slow()
    driver = guest.plug(Blk(slow), name="blk0")
    thread = slow.answer_soon()
    request = Disk(driver).submit(Kind.READ, room=SECTOR)
    (address, length), _ = request.buffer.writable
    driver.reset()
    assert slow.answered.is_set()
    assert driver.memory.read(address, length) == b"y" * SECTOR
    thread.join()


def test_a_ring_that_is_stopped_has_answered_everything(serve: Serve) -> None:
    slow = Slow()
    blk = Blk(slow)
    with FrontEnd(serve(blk)) as vm:
        disk = Disk(vm.start())
        request = disk.submit(Kind.READ, room=SECTOR)
        vm.requestq.wait_until(lambda: blk.plane.counters["reads"] == 1, "it is taken")
        thread = slow.answer_soon()
        base = vm.stop_ring(vm.requestq)
        assert slow.answered.is_set()
        assert request.wait() is Verdict.OK
        assert request.data == b"y" * SECTOR
        vm.start_ring(vm.requestq, base)
        slow.answer()
        assert disk.read(0, SECTOR) == b"y" * SECTOR
        thread.join()


def test_a_front_end_that_goes_takes_its_memory_after_the_answer(serve: Serve) -> None:
    slow = Slow()
    path = serve(Blk(slow))
    with FrontEnd(path) as vm:
        Disk(vm.start()).submit(Kind.READ, room=SECTOR)
        thread = slow.answer_soon()
    with FrontEnd(path) as vm:
        slow.answer()
        assert Disk(vm.start()).read(0, SECTOR) == b"y" * SECTOR
    assert slow.answered.is_set()
    thread.join()


def test_ioeventfd_is_switched_while_the_host_has_requests(guest: Guest) -> None:
    slow = Slow()
    driver = guest.plug(Blk(slow), name="blk0")
    thread = slow.answer_soon()
    request = Disk(driver).submit(Kind.READ, room=SECTOR)
    driver.function.ioeventfd = not driver.function.ioeventfd
    assert request.wait() is Verdict.OK
    assert request.data == b"y" * SECTOR
    thread.join()


def test_without_io_uring_there_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "disk.img").write_bytes(bytes(MIB))
    monkeypatch.setattr(block, "io_uring_missing", lambda: "Function not implemented (os error 38)")
    with caplog.at_level(logging.WARNING):
        file = File(tmp_path / "disk.img", aio="io_uring")
    assert file.aio == "threads"
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path / 'disk.img'}: aio=threads, because there is no io_uring: Function not implemented (os error 38)"
    ]
    file.close()


@pytest.mark.parametrize(
    ("cache", "aio"), [("writeback", "threads"), ("writethrough", "threads"), ("none", "io_uring")]
)
def test_auto_is_io_uring_past_the_page_cache_only(tmp_path: Path, cache: str, aio: str) -> None:
    (tmp_path / "disk.img").write_bytes(bytes(MIB))
    file = opened(tmp_path / "disk.img", cache, "auto")
    assert file.aio == aio
    file.close()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"cache": "unsafe"}, "cache=unsafe is not allowed: writeback, writethrough, none"),
        ({"aio": "native"}, "aio=native is not allowed: auto, threads, io_uring"),
    ],
)
def test_other_words_are_refused(tmp_path: Path, options: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        File(tmp_path / "disk.img", **options)  # type: ignore[arg-type]


def test_a_file_system_without_direct_io_is_said() -> None:
    path = Path(f"/proc/{os.getpid()}/comm")  # opens, but not so
    with pytest.raises(ConfigError, match="cache=none is not possible on its file system"):
        File(path, cache="none")
