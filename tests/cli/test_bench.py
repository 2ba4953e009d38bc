"""`pyvirtio bench`: what it refuses, what it prints and writes, and its exit status."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import Start, programs

from pyvirtio.cli.main import main
from pyvirtio.testing.plugin import nothing_left_behind
from pyvirtio.testing.vhost_user import MIB

QUICK = ["--seconds", "0.01", "--rounds", "2", "--iodepth", "4,1"]

REFUSED = {
    "": "say what: `bench blk --socket-path PATH` or `bench --against qemu-storage-daemon`",
    "blk": "say what: `bench blk --socket-path PATH`",
    "--against bochs": "--against bochs is not known: qemu-storage-daemon, nbdkit, dpdk-testpmd",
    "--against nbdkit --verify": "--against nbdkit has one queue, and no --verify",
    "--against qemu-storage-daemon --storage tape": "--storage tape is not known: null, tmpfs, disk",
    "--against qemu-storage-daemon --socket-path s": "leave --socket-path out",
    "--against qemu-storage-daemon --dir nowhere --storage disk": "nowhere",
    "tape --socket-path s": "invalid choice: 'tape'",
    "blk --socket-path nowhere": "nowhere: No such file or directory",
    "blk --socket-path s --rw trim": "--rw trim is not allowed: read, write, randread, randwrite, mixed",
    "blk --socket-path s --bs 100": "--bs 100 is not allowed: multiples of 512 up to 1M",
    "blk --socket-path s --bs big": "--bs big is not a size",
    "blk --socket-path s --iodepth 1,129": "--iodepth 1,129 is not allowed: numbers from 1 to 128",
    "blk --socket-path s --iodepth 1,,2": "--iodepth 1,,2 is not allowed",
    "blk --socket-path s --num-queues 0": "--num-queues 0 is not allowed: 1 to 64",
    "blk --socket-path s --rounds 0": "--rounds 0 is not allowed: 1 to 1000",
    "blk --socket-path s --seconds nan": "--seconds nan is not allowed: 0.01 to 86400",
    "blk --socket-path s --json nowhere/j": "nowhere/j cannot be written",
    "blk --socket-path s --burst 8": "--burst is an option of `bench net`, not of `bench blk`",
    "--against nbdkit --frame-size 64": "--frame-size is an option of `bench net`, not of `bench blk`",
    "net": "say what: `bench blk --socket-path PATH`",
    "net --against nbdkit": "nbdkit does not serve net",
    "net --socket-path s --rw read": "--rw is an option of `bench blk`, not of `bench net`",
    "net --socket-path nowhere": "nowhere: No such file or directory",
    "net --socket-path s --direction up": "--direction up is not allowed: tx, rx, both",
    "net --socket-path s --frame-size 59": "--frame-size 59 is not allowed: numbers from 60 to 65535",
    "net --socket-path s --queue-size 100": "--queue-size 100 is not allowed: powers of two to 1024",
    "net --socket-path s --burst 512": "--burst 512 is not allowed: 1 to the size of the queue, 256",
    "net --socket-path s --verify": "--verify needs frames that come back",
    "net --socket-path s --direction rx --frame-size 64,128": "give the largest --frame-size",
    "--against dpdk-testpmd --network tape": "--network tape is not known: sink, source, echo",
    "--against dpdk-testpmd --direction tx": "the --network says in which direction frames go",
}


@pytest.mark.parametrize(("line", "message"), REFUSED.items())
def test_a_mistake_is_one_line_and_status_2(line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with nothing_left_behind():
        assert main(["bench", *line.split()]) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.err.count("\n") == 1


@pytest.fixture
def socket_path(tmp_path: Path) -> Path:
    return tmp_path / "s"


def test_the_figures_of_a_server(tmp_path: Path, socket_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "disk.img").write_bytes(bytes(MIB))
    with programs(tmp_path) as start:
        server = start("blk", "--blk-file", "disk.img", "--num-queues", "2", "--socket-path", "s")
        options = ["--num-queues", "2", "--indirect", "--rw", "mixed", "--verify", "--json", str(tmp_path / "j")]
        assert main(["bench", "blk", "--socket-path", str(socket_path), *QUICK, *options]) == 0
        cpu = [sample["cpu"] for sample in json.loads((tmp_path / "j").read_text())["samples"]]
        memory = [sample["rss"] for sample in json.loads((tmp_path / "j").read_text())["samples"]]
        assert server.poll() is None
    shown = capsys.readouterr().out
    assert "mixed of 4k, 2 queues, split ring, indirect descriptors, interrupts, verified." in shown
    assert [line.split()[0] for line in shown.splitlines() if "(" in line and ")" in line][:2] == ["1", "4"]
    assert all(value > 0 for value in cpu)
    assert all(MIB < value < 1000 * MIB for pair in memory for value in pair)
    first, last = (f"{memory[at][at] / MIB:.1f} MiB" for at in (0, -1))
    assert f"The back-end had {first} of memory resident at the start, {last} at the end." in shown


def test_the_json_has_the_load_and_every_sample(tmp_path: Path, socket_path: Path) -> None:
    (tmp_path / "disk.img").write_bytes(bytes(MIB))
    with programs(tmp_path) as start:
        start("blk", "--blk-file", "disk.img", "--socket-path", "s")
        main(["bench", "blk", "--socket-path", str(socket_path), *QUICK, "--json", str(tmp_path / "j")])
    figures = json.loads((tmp_path / "j").read_text())
    assert figures["socket"] == str(socket_path)
    assert figures["load"] == {
        "rw": "randread", "block_size": 4096, "num_queues": 1, "size": 1 << 28, "packed": False, "indirect": False,
        "poll": False, "verify": False,
    }  # fmt: skip
    assert [sample["iodepth"] for sample in figures["samples"]] == [1, 4, 1, 4]
    for sample in figures["samples"]:
        assert set(sample) == {
            "iodepth", "requests", "errors", "seconds", "bytes", "p50", "p99", "p99_9", "max", "cpu", "rss",
            "kicks", "interrupts",
        }  # fmt: skip


CORRUPTING = """
from pyvirtio.backends.block import Memory
from pyvirtio.devices.blk import Blk

class Disk(Memory):
    def preadv(self, buffers, offset):
        super().preadv(buffers, offset)
        buffers[0][0] ^= 1

class Broken(Disk):
    def preadv(self, buffers, offset):
        raise OSError("worn out")

class Corrupting(Blk):
    def __init__(self, kind: str = "Disk") -> None:
        super().__init__(globals()[kind](1 << 20))
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    (tmp_path / "disks.py").write_text(CORRUPTING)
    with programs(tmp_path) as start:
        yield start


def test_wrong_content_is_one_line_and_status_1(
    start: Start, socket_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start("disks.py:Corrupting", "--socket-path", "s")
    assert main(["bench", "blk", "--socket-path", str(socket_path), *QUICK, "--verify"]) == 1
    error = capsys.readouterr().err
    assert "wrong data at byte" in error
    assert error.count("\n") == 1


def test_requests_that_failed_are_status_1(start: Start, socket_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start("disks.py:Corrupting,kind=Broken", "--socket-path", "s")
    assert main(["bench", "blk", "--socket-path", str(socket_path), *QUICK]) == 1
    assert "requests failed\n" in capsys.readouterr().err


def test_a_comparison_is_printed_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--storage", "null", "--size", "16m", "--json", str(tmp_path / "j")]
    assert main(["bench", "--against", "qemu-storage-daemon", *QUICK, *options]) == 0
    shown = capsys.readouterr().out
    assert "Ours against qemu-storage-daemon" in shown
    for server in ("qemu-storage-daemon", "native", "python"):
        assert len(re.findall(rf"null, {server}: [\d.]+ MiB of memory resident at the start, [\d.]+ MiB", shown)) == 1
    figures = json.loads((tmp_path / "j").read_text())
    assert set(figures) == {"against", "loads", "rows", "results"}
    assert figures["loads"]["null"]["size"] == 16 * MIB
    assert [(row["iodepth"], row["server"]) for row in figures["rows"]] == [
        (1, "native"), (1, "python"), (4, "native"), (4, "python")
    ]  # fmt: skip
    assert len(figures["results"]) == 2 * 2 * 3
    for row in figures["rows"]:
        for name in ("iops", "cpu_per_request", "p50"):
            assert row["ratios"][name]["low"] <= row["ratios"][name]["median"] <= row["ratios"][name]["high"]


def test_the_figures_of_a_network_card(tmp_path: Path, socket_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--seconds", "0.01", "--rounds", "2", "--frame-size", "1500,64", "--num-queues", "2"]
    files = ["--json", str(tmp_path / "j"), "--plot", str(tmp_path / "s.svg")]
    with programs(tmp_path) as start:
        start("pyvirtio.bench.networks:NativeEcho,num-queues=2", "--socket-path", "s")
        line = ["bench", "net", "--socket-path", str(socket_path), "--direction", "both", "--verify"]
        assert main([*line, *options, *files]) == 0
    shown = capsys.readouterr().out
    assert "both, 2 queue pairs, split ring of 256, bursts of 32, interrupts, verified." in shown
    assert [line.split()[0] for line in shown.splitlines() if line.endswith("0         0       0 ")] == ["64", "1500"]
    assert "</svg>" in (tmp_path / "s.svg").read_text()
    figures = json.loads((tmp_path / "j").read_text())
    assert figures["load"] == {
        "direction": "both", "peer": None, "num_queues": 2, "queue_size": 256, "burst": 32, "packed": False,
        "poll": False, "verify": True,
    }  # fmt: skip
    assert [sample["frame_size"] for sample in figures["samples"]] == [64, 1500, 64, 1500]
    for sample in figures["samples"]:
        assert set(sample) == {
            "frame_size", "tx_frames", "rx_frames", "tx_bytes", "rx_bytes", "seconds", "cpu", "rss", "kicks",
            "interrupts", "lost", "reordered", "damaged", "foreign",
        }  # fmt: skip


DAMAGING = """
from pyvirtio.bench.networks import Returning
from pyvirtio.devices.net import Net

class Network(Returning):
    def send(self, frame):
        super().send(frame[:-1] + b"x")

class Damaging(Net):
    def __init__(self) -> None:
        super().__init__(Network(1))
"""


def test_frames_that_are_damaged_are_status_1(
    tmp_path: Path, socket_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "networks.py").write_text(DAMAGING)
    with programs(tmp_path) as start:
        start("networks.py:Damaging", "--socket-path", "s")
        line = ["bench", "net", "--socket-path", str(socket_path), "--direction", "both", "--verify"]
        assert main([*line, "--seconds", "0.01", "--rounds", "1"]) == 1
    error = capsys.readouterr().err
    assert "frames were damaged or out of order\n" in error
    assert error.count("\n") == 1


def test_a_network_that_sends_nothing_is_one_line_and_status_1(
    tmp_path: Path, socket_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with programs(tmp_path) as start:
        start("pyvirtio.bench.networks:NativeSink", "--socket-path", "s")
        line = ["bench", "net", "--socket-path", str(socket_path), "--direction", "rx"]
        assert main([*line, "--seconds", "0.01"]) == 1
    error = capsys.readouterr().err
    assert f"{socket_path}: no frame came: " in error
    assert error.count("\n") == 1


@pytest.mark.skipif(not shutil.which("dpdk-testpmd"), reason="dpdk-testpmd is not installed (package dpdk-dev)")
def test_network_cards_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--seconds", "0.01", "--rounds", "2", "--network", "echo", "--json", str(tmp_path / "j")]
    plot = tmp_path / "ratios.svg"
    assert main(["bench", "--against", "dpdk-testpmd", *options, "--plot", str(plot)]) == 0
    assert "Ours against dpdk-testpmd" in capsys.readouterr().out
    assert "</svg>" in plot.read_text()
    figures = json.loads((tmp_path / "j").read_text())
    assert [(row["frame_size"], row["server"]) for row in figures["rows"]] == [
        (64, "native"), (64, "python"), (1500, "native"), (1500, "python")
    ]  # fmt: skip
    for row in figures["rows"]:
        for name in ("frames_per_second", "cpu_per_frame"):
            assert row["ratios"][name]["low"] <= row["ratios"][name]["median"] <= row["ratios"][name]["high"]


def test_plots_are_drawn(tmp_path: Path) -> None:
    options = ["--storage", "null", "--plot", str(tmp_path / "ratios.svg")]
    assert main(["bench", "--against", "qemu-storage-daemon", *QUICK, *options]) == 0
    (tmp_path / "disk.img").write_bytes(bytes(MIB))
    with programs(tmp_path) as start:
        start("blk", "--blk-file", "disk.img", "--socket-path", "s")
        assert (
            main(["bench", "blk", "--socket-path", str(tmp_path / "s"), *QUICK, "--plot", str(tmp_path / "s.svg")]) == 0
        )
    for name in ("ratios.svg", "s.svg"):
        assert "</svg>" in (tmp_path / name).read_text()
