"""The front-end of rust-vmm's `vhost` crate uses what `pyvirtio serve` serves."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from serving import programs

ROOT = Path(__file__).parents[2]
BUILD_GUARD = 600
CARGO = ["cargo", "run", "--locked", "--quiet", "--package", "pyvirtio-core", "--example", "vhost_front_end", "--"]


@pytest.mark.skipif(not shutil.which("cargo"), reason="cargo is not installed")
def test_the_vhost_crate_reads_and_writes_the_disk(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(os.urandom(64 * 512))
    with programs(tmp_path) as start:
        start("blk", "--blk-file", "disk.img", "--socket-path", "s")
        front_end = subprocess.run([*CARGO, tmp_path / "s"], cwd=ROOT, timeout=BUILD_GUARD, capture_output=True)
        assert front_end.stdout == b"served\n", front_end.stderr.decode()
    assert image.read_bytes()[3 * 512 : 4 * 512] == b"v" * 512
