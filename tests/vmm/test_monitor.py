import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyvirtio.accel.inproc import InProcess
from pyvirtio.backends.block import Memory
from pyvirtio.backends.net import NetBackend
from pyvirtio.devices.balloon import Balloon
from pyvirtio.devices.blk import Blk
from pyvirtio.devices.net import Net
from pyvirtio.devices.rng import Rng
from pyvirtio.errors import ConfigError
from pyvirtio.spec import Status
from pyvirtio.vmm.board import Board, allocate
from pyvirtio.vmm.layout import MIB
from pyvirtio.vmm.monitor import HELP, Monitor, format_table

KNOWN = "info, set, fault, balloon, block_resize, set_link, snapshot, stop, cont, help, quit"
THINGS = "blk0, rng0, io0, iothread"


class Paper(Board):
    """A board that notes what a machine would be told."""

    def __init__(self) -> None:
        super().__init__(InProcess(allocate(16 * MIB)))
        self.told: list[str] = []

    def pause(self) -> None:
        self.told.append("pause")

    def resume(self) -> None:
        self.told.append("resume")

    def quit(self) -> None:
        self.told.append("quit")

    def snapshot(self, path: Path) -> None:
        if path.name == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if path.name == "early":
            raise ConfigError("the guest is not running")
        self.told.append(f"snapshot {path}")


@pytest.fixture
def board() -> Iterator[Paper]:
    with Paper() as board:
        board.add_iothread("io0")
        board.add(Blk(Memory(1 << 20), num_queues=2, logical_block_size=4096), "blk0")
        board.add(Rng(), "rng0")
        yield board


@pytest.fixture
def monitor(board: Paper) -> Monitor:
    return Monitor(board)


def table(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


def test_info_devices(monitor: Monitor, board: Paper) -> None:
    assert table(monitor.execute("info devices"))[1:] == [
        ["blk0", "1", "blk", "-", "intx", "on"],
        ["rng0", "2", "rng", "-", "intx", "off"],
    ]
    board.devices[1].driver.write_status(Status.ACKNOWLEDGE | Status.DRIVER)
    assert "ACKNOWLEDGE+DRIVER" in monitor.execute("info devices")


def test_info_queues_of_a_machine_without_drivers(monitor: Monitor) -> None:
    header, *rows = table(monitor.execute("info queues"))
    assert header[:3] == ["queue", "size", "notifies"]
    assert [row[0] for row in rows] == ["blk0.requestq0", "blk0.requestq1", "rng0.requestq"]
    assert {row[-1] for row in rows} == {"-"}


def test_set_switches_ioeventfd(monitor: Monitor, board: Paper) -> None:
    assert monitor.execute("set blk0.ioeventfd off") == ""
    assert monitor.execute("set rng0.ioeventfd on") == ""
    assert [device.ioeventfd for device in board.devices] == [False, True]


def test_set_changes_the_busy_wait_of_an_iothread(monitor: Monitor, board: Paper) -> None:
    assert monitor.execute("set io0.poll_max_ns 1000") == ""
    assert board.iothreads["io0"].loop.poll_max_ns == 1000


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("nonsense", f"unknown command 'nonsense'; known are: {KNOWN}"),
        ("quit now", f"unknown command 'quit'; known are: {KNOWN}"),
        ("info", "info: known are: devices, queues, network, faults, balloon"),
        ("info weather", "info: known are: devices, queues, network, faults, balloon"),
        ("set", "set: write for example: set blk0.ioeventfd off"),
        ("set blk9.ioeventfd off", "set blk9.ioeventfd: no such device or I/O thread; there are: " + THINGS),
        ("set ioeventfd off", "set ioeventfd: no such device or I/O thread; there are: " + THINGS),
        ("balloon 5", "balloon: the machine has no virtio-balloon-pci"),
        ("info balloon", "info balloon: the machine has no virtio-balloon-pci"),
        ("balloon", "balloon: write for example: balloon 256"),
        ("balloon much", "balloon: much is not allowed: MiB from 1 to 16, all that the guest has"),
        ("balloon 17", "balloon: 17 is not allowed: MiB from 1 to 16, all that the guest has"),
        ("block_resize blk0", "block_resize: write for example: block_resize blk0 2G"),
        ("block_resize rng0 1M", "block_resize: rng0 is no disk"),
        ("block_resize blk9 1M", "block_resize: no device blk9; there are: blk0, rng0"),
        ("block_resize blk0 big", "block_resize: big is not a size such as 512M or 2G"),
        ("block_resize blk0 1026k", "block_resize: 1050624 bytes; a disk is whole blocks of 4096 bytes, at least one"),
        ("block_resize blk0 0", "block_resize: 0 bytes; a disk is whole blocks of 4096 bytes, at least one"),
        ("set_link rng0 off", "set_link: rng0 is no network device"),
        ("snapshot", "snapshot: write for example: snapshot /tmp/guest.snapshot"),
        ("snapshot /full", "snapshot: No space left on device"),
        ("snapshot /early", "snapshot: the guest is not running"),
        ("set blk0.vectors 3", "set blk0.vectors: only ioeventfd can be switched while the machine runs"),
        ("set blk0.ioeventfd maybe", "set blk0.ioeventfd maybe: allowed are on and off"),
        ("set io0.poll-grow 3", "set io0.poll-grow: only poll-max-ns can be changed while the machine runs"),
        ("set io0.poll-max-ns -1", "set io0.poll-max-ns -1: allowed is a number of ns up to 1000000000"),
    ],
)  # fmt: skip
def test_mistakes_are_answered_in_one_line(monitor: Monitor, line: str, answer: str) -> None:
    assert monitor.execute(line) == answer + "\n"


def test_stop_cont_and_quit(monitor: Monitor, board: Paper) -> None:
    assert monitor.execute("stop") == monitor.execute("cont") == monitor.execute("quit") == ""
    assert board.told == ["pause", "resume", "quit"]


def test_help_and_nothing(monitor: Monitor) -> None:
    assert monitor.execute("help") == HELP
    assert monitor.execute("  ") == ""


def test_columns_line_up() -> None:
    assert format_table([("a", "bb"), ("ccc", "d")]) == "a    bb\nccc  d\n"


def test_faults_are_switched_while_the_machine_runs(monitor: Monitor, board: Paper) -> None:
    assert monitor.execute("fault blk0:late=5ms@1%,lost@0.1%,seed=7") == ""
    assert table(monitor.execute("info faults")) == [
        ["device", "fault", "times", "seed"],
        ["blk0", "late=5ms@1%", "0", "7"],
        ["blk0", "lost@0.1%", "0", "7"],
    ]
    assert monitor.execute("fault blk0:off") == ""
    assert table(monitor.execute("info faults")) == [["device", "fault", "times", "seed"]]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("fault blk0:latte", "fault: unknown fault 'latte', did you mean late?"),
        ("fault disk:late", "fault disk:late: unknown device 'disk' (known: blk0, rng0)"),
        ("fault rng0:flip", "rng0: Rng has no disk that could go wrong"),
        ("fault", "fault: write for example: fault blk0:late=5ms@1%"),
    ],
)
def test_a_mistake_about_faults_is_one_line(monitor: Monitor, line: str, message: str) -> None:
    answer = monitor.execute(line)
    assert answer.startswith(message)
    assert answer.count("\n") == 1


def test_a_snapshot_may_have_spaces_in_its_name(monitor: Monitor, board: Paper) -> None:
    assert monitor.execute("snapshot /tmp/my guest ") == ""
    assert board.told == ["snapshot /tmp/my guest"]


def test_the_balloon(monitor: Monitor, board: Paper) -> None:
    balloon = Balloon()
    board.add(balloon, "balloon0")
    assert monitor.execute("balloon 10") == ""
    assert balloon.target == 6 * MIB // 4096
    balloon.config.actual = balloon.target // 2
    balloon.stats = {"free-memory": 12345}
    assert table(monitor.execute("info balloon")) == [["balloon:", "actual=13"], ["free-memory", "12345"]]


def test_a_disk_is_given_another_size(monitor: Monitor, board: Paper) -> None:
    assert monitor.execute("block_resize blk0 2M") == ""
    assert board.devices[0].device.config.capacity == 4096


def test_info_network(monitor: Monitor, board: Paper) -> None:
    net = Net(NetBackend(), mac="52:54:00:12:34:56")
    board.add(net, "net0")
    net.plane.inject([bytes(60)] * 3)
    head, row = table(monitor.execute("info network"))
    assert head == ["device", "address", "link", "sent", "bytes", "received", "bytes", "dropped"]
    assert row == ["net0", "52:54:00:12:34:56", "up", "0", "0", "0", "0", "3", "rx_overflow"]
    assert monitor.execute("set_link net0 off") == ""
    assert table(monitor.execute("info network"))[1][2] == "down"
