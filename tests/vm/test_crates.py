"""Front-ends from other people's crates use what `pyvirtio serve` serves: `vhost` of rust-vmm, and libblkio."""

import os
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
from serving import programs

ROOT = Path(__file__).parents[2]
BUILD_GUARD = 600
BLOCK, BLOCKS = 4096, 96

pytestmark = pytest.mark.skipif(not shutil.which("cargo"), reason="cargo is not installed")


def run(example: str, socket: Path) -> "subprocess.CompletedProcess[bytes]":
    cargo = ["cargo", "run", "--locked", "--quiet", "--package", "pyvirtio-core", "--example", example, "--"]
    return subprocess.run([*cargo, str(socket)], cwd=ROOT, timeout=BUILD_GUARD, capture_output=True)


def test_the_vhost_crate_reads_and_writes_the_disk(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(os.urandom(64 * 512))
    with programs(tmp_path) as start:
        start("blk", "--blk-file", "disk.img", "--socket-path", "s")
        front_end = run("vhost_front_end", tmp_path / "s")
        assert front_end.stdout == b"served\n", front_end.stderr.decode()
    assert image.read_bytes()[3 * 512 : 4 * 512] == b"v" * 512


@pytest.mark.parametrize("aio", ["threads", "io_uring"])
def test_libblkio_fills_the_disk_through_several_queues(tmp_path: Path, aio: str) -> None:
    """Its buffers are in memory that comes and goes meanwhile (ADD_MEM_REG, REM_MEM_REG)."""
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(BLOCKS * BLOCK))
    drive = ("--drive", f"file=disk.img,id=d,aio={aio}")
    with programs(tmp_path) as start:
        start("blk,drive=d,num-queues=3", *drive, "--iothreads", "2", "--socket-path", "s")
        front_end = run("blkio_front_end", tmp_path / "s")
        assert front_end.stdout == b"served\n", front_end.stderr.decode()
    words = (block << 32 | n for block in range(BLOCKS) for n in range(BLOCK // 8))
    assert image.read_bytes() == struct.pack(f"<{BLOCKS * BLOCK // 8}Q", *words)
