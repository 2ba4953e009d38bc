"""DPDK's driver of its own (virtio-user) sends frames through what `pyvirtio serve net` serves, without any guest."""

import os
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import IO

import pytest
from serving import programs

TESTPMD = "dpdk-testpmd"
HANG_GUARD = 60
ENOUGH = 2_000
"""Frames that each of the two cards has to receive."""

pytestmark = pytest.mark.skipif(not shutil.which(TESTPMD), reason=f"{TESTPMD} is not installed (package dpdk-dev)")


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_frames_go_round_a_cable_between_two_cards(tmp_path: Path, packed: bool) -> None:
    """What one card receives the other sends, so that frames go round and round, until a full card drops them."""
    rings = "packed=on" if packed else "packed=off"
    cards = [f"--vdev=net_virtio_user{n},path={tmp_path / name},packed_vq={packed:d}" for n, name in enumerate("ab")]
    command = [TESTPMD, "--no-huge", "--single-file-segments", "--no-pci", "-m", "256", *cards]
    command += [
        f"--file-prefix=pyvirtio{os.getpid()}",
        "--",
        "--interactive",
        "--total-num-mbufs=4096",
        "--forward-mode=io",
        "--no-flush-rx",
    ]
    with programs(tmp_path) as start:
        devices = [option for name in "ab" for option in ("--device", f"net,netdev={name},{rings},socket-path={name}")]
        start("--netdev", "pair,id=a", "--netdev", "pair,id=b,peer=a", *devices)
        printed = tmp_path / "printed"
        with (
            printed.open("wb") as out,
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=out, stderr=out, cwd=tmp_path) as testpmd,
        ):
            try:
                assert testpmd.stdin is not None
                received = wait_for_frames(testpmd, testpmd.stdin, printed)
            finally:
                testpmd.kill()
    assert all(errors == 0 for _, errors in received)


def tell(testpmd: IO[bytes], command: str) -> None:
    testpmd.write(command.encode() + b"\n")
    testpmd.flush()


def wait_for_frames(testpmd: "subprocess.Popen[bytes]", commands: IO[bytes], printed: Path) -> list[tuple[int, int]]:
    """Frames received, and errors, of the two cards, once both have received enough."""
    deadline = time.monotonic() + HANG_GUARD
    while True:
        for command in ("start tx_first 4", "stop", "show port stats all"):
            tell(commands, command)
            time.sleep(0.2)
        shown = printed.read_text(errors="replace")
        counts = [(int(a), int(b)) for a, b in re.findall(r"RX-packets: (\d+).*\n\s*RX-errors: (\d+)", shown)][-2:]
        if len(counts) == 2 and min(frames for frames, _ in counts) > ENOUGH:
            return counts
        assert testpmd.poll() is None, shown
        assert time.monotonic() < deadline, shown
