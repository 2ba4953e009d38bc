"""Ours and another back-end in turn: what is started, and how ratios come from rounds."""

import os
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from pyvirtio.bench import compare, disk_contest
from pyvirtio.bench.compare import Result
from pyvirtio.bench.disk_contest import DiskContest
from pyvirtio.bench.load import DiskLoad, DiskSample
from pyvirtio.bench.nbd import NbdTarget
from pyvirtio.bench.sample import Spread
from pyvirtio.bench.servers import MEMORY, NATIVE, NBDKIT, PYTHON, QSD, Storage
from pyvirtio.errors import ConfigError, ProtocolError
from pyvirtio.testing.vhost_user import MIB

SAMPLE = DiskSample(
    seconds=1.0, cpu=0.5, rss=(MIB, 2 * MIB), kicks=10, interrupts=10, iodepth=8, requests=1000, errors=0,
    bytes=4096000, p50=1e-5, p99=2e-5, p99_9=3e-5, max=4e-5,
)  # fmt: skip


def rows(results: list[Result], other: str) -> list[compare.Row]:
    return compare.rows(results, other, DiskLoad().compared)


def result(server: str, round_: int, iops: int, cpu: float | None = 0.5, iodepth: int = 8) -> Result:
    return Result("null", server, round_, iodepth, replace(SAMPLE, iodepth=iodepth, requests=iops, cpu=cpu))


def test_ratios_are_of_the_same_round() -> None:
    figures = [(100, 200), (50, 150), (200, 500)]
    results = [
        result(name, round_, iops)
        for round_, pair in enumerate(figures)
        for name, iops in zip((QSD, NATIVE), pair, strict=True)
    ]
    (row,) = rows(results, QSD)
    assert (row.contest, row.at, row.server) == ("null", 8, NATIVE)
    assert row.ratios["iops"] == Spread(2.5, 2.0, 3.0)
    assert row.ours["iops"] == Spread(200, 150, 500)
    assert row.theirs["iops"] == Spread(100, 50, 200)
    assert row.ratios["p50"] == Spread(1, 1, 1)


def test_each_of_our_servers_has_a_row_at_each_depth() -> None:
    results = [result(name, 0, 10, iodepth=depth) for depth in (1, 32) for name in (QSD, NATIVE, PYTHON)]
    assert [(row.at, row.server) for row in rows(results, QSD)] == [
        (1, NATIVE), (1, PYTHON), (32, NATIVE), (32, PYTHON)
    ]  # fmt: skip


def test_a_cpu_time_that_is_not_known_has_no_ratio() -> None:
    (row,) = rows([result(QSD, 0, 10, cpu=None), result(NATIVE, 0, 20)], QSD)
    assert row.ratios["cpu_per_request"] is None
    assert row.ratios["iops"] == Spread(2, 2, 2)


@pytest.fixture
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Storage]:
    yield {
        "null": Storage("null"),
        "file": Storage("file", tmp_path / "disk.img"),
        "disk": Storage("disk", tmp_path / "disk.img", direct=True),
    }[request.param]
    assert list(tmp_path.glob("*.img")) == []


@pytest.mark.parametrize("storage", ["null", "file", "disk"], indirect=True)
def test_every_server_does_every_load(storage: Storage, tmp_path: Path) -> None:
    contest = DiskContest(storage, DiskLoad(rw="mixed", size=4 * MIB, verify=storage.file is not None), (1, 8))
    results = list(compare.run([contest], QSD, rounds=1, seconds=0.01, directory=tmp_path))
    assert len(results) == compare.count(contest, rounds=1)
    servers = [QSD, NATIVE] if storage.direct else [QSD, NATIVE, PYTHON]
    assert [(r.sample.iodepth, r.server) for r in results] == [(depth, name) for depth in (1, 8) for name in servers]
    for result in results:
        assert result.sample.errors == 0
        assert result.sample.cpu is not None


@pytest.mark.parametrize("rw", ["randread", "write", "mixed"])
def test_a_ram_disk_in_python_is_compared_with_that_of_nbdkit(tmp_path: Path, rw: str) -> None:
    contest = DiskContest(Storage(MEMORY), DiskLoad(rw=rw, size=4 * MIB), (1, 8))
    results = list(compare.run([contest], NBDKIT, rounds=1, seconds=0.01, directory=tmp_path))
    assert [(r.sample.iodepth, r.server) for r in results] == [
        (1, NBDKIT), (1, PYTHON), (8, NBDKIT), (8, PYTHON)
    ]  # fmt: skip
    for result in results:
        assert result.sample.errors == 0
        assert result.sample.requests > 0
        assert result.sample.cpu is not None


class Answers:
    """An NBD server that says what it is told to, once."""

    def __init__(self, path: Path, said: bytes) -> None:
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(path))
        self.listener.listen()
        self.said = said

    def __enter__(self) -> None:
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def run(self) -> None:
        with self.listener, self.listener.accept()[0] as connection:
            connection.sendall(self.said)
            connection.shutdown(socket.SHUT_WR)
            with suppress(ConnectionError):
                while connection.recv(4096):
                    pass

    def __exit__(self, *_: object) -> None:
        self.thread.join()


GREETING = b"NBDMAGICIHAVEOPT" + struct.pack(">H", 3)
EXPORT = struct.pack(">QIIIHQH", 0x3E889045565A9, 7, 3, 12, 0, MIB, 0)
AGREED = GREETING + EXPORT + struct.pack(">QIII", 0x3E889045565A9, 7, 1, 0)
NBD = {
    "nothing": (b"", "the NBD server hung up"),
    "http": (b"HTTP/1.1 400 Bad Request", "no NBD server of today"),
    "a refusal": (GREETING + struct.pack(">QIII", 0x3E889045565A9, 7, 0x80000006, 0), "refuses its default export"),
    "an end": (AGREED, "the connection broke"),
    "a stray reply": (AGREED + struct.pack(">IIQ", 0x67446698, 0, 77), "request 77, which was not in flight"),
    "no reply": (AGREED + bytes(16), "reply 0x0 to request 0"),
}


@pytest.mark.parametrize("case", NBD)
def test_an_nbd_server_that_breaks_the_protocol_is_said(tmp_path: Path, case: str) -> None:
    said, message = NBD[case]
    with (
        Answers(tmp_path / "s", said),
        pytest.raises(ProtocolError, match=message),
        NbdTarget(tmp_path / "s", DiskLoad(size=MIB), os.getpid()) as target,
    ):
        target.measure(1, 0.01)


@pytest.mark.parametrize("storage", ["file"], indirect=True)
def test_a_server_that_does_not_start_is_said(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_contest, "command", lambda *_: ["/bin/false"])
    contest = DiskContest(storage, DiskLoad(size=MIB), (1,))
    with pytest.raises(ProtocolError, match="false did not start"):
        list(compare.run([contest], QSD, 1, 0.01, tmp_path))


@pytest.mark.parametrize("storage", ["null"], indirect=True)
def test_a_server_that_is_not_installed_is_said(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", os.fspath(tmp_path))
    with pytest.raises(ConfigError, match="qemu-storage-daemon is not installed"):
        list(compare.run([DiskContest(storage, DiskLoad(size=MIB), (1,))], QSD, 1, 0.01, tmp_path))
