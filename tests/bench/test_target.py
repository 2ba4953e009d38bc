"""A load on a served disk: what is counted, and what is noticed when the back-end does wrong."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
from serving import Serve

from pyvirtio.backends.block import File, Memory
from pyvirtio.bench.load import DiskLoad
from pyvirtio.bench.target import Target
from pyvirtio.devices.blk import Blk
from pyvirtio.devices.rng import Rng
from pyvirtio.errors import ConfigError, ProtocolError
from pyvirtio.serve.vhost_user import Rings
from pyvirtio.testing.serving import serve_in_process
from pyvirtio.testing.vhost_user import MIB

LOAD = DiskLoad(size=MIB)
SECONDS = 0.02


@pytest.mark.parametrize("poll", [False, True], ids=["interrupts", "polled"])
@pytest.mark.parametrize("indirect", [False, True], ids=["direct", "indirect"])
@pytest.mark.parametrize("rw", ["read", "write", "randread", "randwrite", "mixed"])
@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_every_pattern_reads_back_what_it_wrote(
    tmp_path: Path, packed: bool, rw: str, indirect: bool, poll: bool
) -> None:
    disk = Blk(Memory(MIB), queue_size=64)
    load = replace(LOAD, rw=rw, packed=packed, indirect=indirect, poll=poll, verify=True)
    served = serve_in_process(disk, tmp_path / "s", Rings(packed=packed))
    with served, Target(tmp_path / "s", load, iodepth=16) as target:
        before = disk.plane.counters
        samples = [target.measure(iodepth, SECONDS) for iodepth in (1, 16)]
        after = disk.plane.counters
        target.check()
    for kind, expected in (("reads", load.write_percent < 100), ("writes", load.write_percent > 0)):
        assert (after[kind] > before[kind]) == expected
    for sample in samples:
        assert sample.requests > 0
        assert sample.bytes == sample.requests * 4096
        assert sample.errors == 0
        assert 0 < sample.p50 <= sample.p99 <= sample.p99_9 <= sample.max
        assert sample.cpu is not None
        assert sample.cpu > 0
        assert sample.interrupts == 0 or not poll


@pytest.mark.parametrize("rw", ["mixed", "read"])
def test_all_queues_are_loaded_and_each_has_its_part_of_the_disk(serve: Serve, tmp_path: Path, rw: str) -> None:
    (tmp_path / "disk.img").write_bytes(bytes(MIB))
    disk = Blk(File(tmp_path / "disk.img"), num_queues=4, queue_size=64)
    with Target(serve(disk), replace(LOAD, rw=rw, block_size=512, num_queues=4, verify=True), iodepth=8) as target:
        target.measure(8, SECONDS)
        target.check()
    content = (tmp_path / "disk.img").read_bytes()
    assert len({content[at : at + 512] for at in range(0, MIB, 512)}) == MIB // 512


def test_only_the_beginning_of_the_disk_is_used(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "disk.img").write_bytes(b"x" * MIB)
    load = replace(LOAD, rw="randwrite", size=MIB // 2)
    with Target(serve(Blk(File(tmp_path / "disk.img"))), load, iodepth=4) as target:
        target.measure(4, SECONDS)
    content = (tmp_path / "disk.img").read_bytes()
    assert content[MIB // 2 :] == b"x" * (MIB // 2)
    assert content[: MIB // 2].count(b"x") < MIB // 4


class Corrupting(Memory):
    """Loses the last byte of what is written to the fifth block."""

    def pwritev(self, buffers: list[memoryview], offset: int) -> None:
        super().pwritev(buffers, offset)
        if offset == 4 * 4096:
            self.data[offset + 4095] ^= 1


@pytest.mark.parametrize("rw", ["mixed", "write", "randread"])
def test_a_corrupted_block_is_found(serve: Serve, rw: str) -> None:
    path = serve(Blk(Corrupting(MIB)))
    with (
        pytest.raises(ProtocolError, match=f"wrong data at byte {5 * 4096 - 1}: "),
        Target(path, replace(LOAD, rw=rw, verify=True), iodepth=4) as target,
    ):
        target.check()


class Forgetful(Memory):
    """Completes every write, and does every other one only."""

    writes = 0

    def pwritev(self, buffers: list[memoryview], offset: int) -> None:
        self.writes += 1
        if self.writes % 2:
            super().pwritev(buffers, offset)


def test_a_lost_write_is_found(serve: Serve) -> None:
    path = serve(Blk(Forgetful(MIB)))
    with pytest.raises(ProtocolError, match="wrong data"), Target(path, replace(LOAD, verify=True), 4) as target:
        target.check()


class Failing(Memory):
    """Cannot read one of its blocks."""

    def preadv(self, buffers: list[memoryview], offset: int) -> None:
        if offset == 0:
            raise OSError("bad block")
        super().preadv(buffers, offset)


def test_requests_that_fail_are_counted(serve: Serve) -> None:
    load = replace(LOAD, rw="read", size=8 * 4096)
    with Target(serve(Blk(Failing(MIB))), load, iodepth=4) as target:
        sample = target.measure(4, SECONDS)
    assert 0 < sample.errors <= sample.requests / 8 + 1


def test_with_verify_a_failing_request_is_a_fault(serve: Serve) -> None:
    path = serve(Blk(Failing(MIB)))
    with (
        pytest.raises(ProtocolError, match="1 of 256 requests failed"),
        Target(path, replace(LOAD, verify=True), 4) as t,
    ):
        t.check()


class Breaking(Memory):
    """Has a defect."""

    def preadv(self, buffers: list[memoryview], offset: int) -> None:
        raise ZeroDivisionError


def test_a_device_that_breaks_ends_the_run(serve: Serve) -> None:
    path = serve(Blk(Breaking(MIB)))
    with pytest.raises(ProtocolError, match="the device is broken"), Target(path, LOAD, iodepth=4) as target:
        target.measure(4, SECONDS)


def test_the_cpu_time_is_that_of_who_listens_or_of_a_process_that_is_named(serve: Serve) -> None:
    path = serve(Blk(Memory(MIB)))
    for given, pid in ((None, os.getpid()), (1, 1)):
        with Target(path, LOAD, iodepth=1, pid=given) as target:
            assert target.pid == pid
            assert target.measure(1, SECONDS).cpu is not None
    with pytest.raises(ConfigError, match="process 99999999: "), Target(path, LOAD, 1, pid=99999999) as target:
        target.measure(1, SECONDS)


REFUSED = {
    "more queues than there are": (replace(LOAD, num_queues=3), 1, ConfigError, "--num-queues 3 is more than .* (1)"),
    "blocks smaller than the disk's": (replace(LOAD, block_size=512), 1, ConfigError, "--bs 512 is no multiple"),
    "less than the requests in flight": (
        replace(LOAD, size=16384),
        4,
        ConfigError,
        "4 blocks of 4096 bytes are too few",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_disk_cannot_be_asked_is_refused(serve: Serve, case: str) -> None:
    load, iodepth, error, message = REFUSED[case]
    with pytest.raises(error, match=message.replace("(", r"\(").replace(")", r"\)")):
        Target(serve(Blk(Memory(MIB), queue_size=64, logical_block_size=4096)), load, iodepth)


def test_a_ring_that_is_not_offered_is_refused(serve: Serve) -> None:
    with pytest.raises(ConfigError, match="--packed is not offered by this back-end"):
        Target(serve(Blk(Memory(MIB))), replace(LOAD, packed=True), 1)


def test_a_read_only_disk_is_not_written(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "disk.img").write_bytes(bytes(MIB))
    path = serve(Blk(File(tmp_path / "disk.img", readonly=True)))
    with pytest.raises(ConfigError, match="the disk is read-only, and --rw mixed"):
        Target(path, replace(LOAD, rw="mixed"), 1)


def test_what_is_no_disk_is_refused(serve: Serve) -> None:
    with pytest.raises(ProtocolError, match="there is no disk"):
        Target(serve(Rng(source=bytes)), LOAD, 1)
