"""What the windows of the demo say together."""

import io
import json
import os
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from rich.console import Console

from pyvirtio.demo.measure import Load, Plan, Window
from pyvirtio.demo.network import MODES, NetLoad, NetWindow, vm_exits, windows
from pyvirtio.demo.plot import draw
from pyvirtio.demo.results import Results, Spread
from pyvirtio.demo.table import summary, table

SHA256 = "5" * 64


def window(load: Load) -> Window:
    """With ioeventfd 300 reads in 2 s and half of the CPU left, without 100 and a tenth; twice as fast in round 1."""
    if not load.readers:
        return Window(load, 2.0, 1000.0, 0, 0, 0, 0, 0)
    reads, left, exits, wakeups = (300, 500, 0, 100) if load.ioeventfd else (100, 100, 50, 0)
    speed = 1 + load.round
    return Window(load, 2.0, float(left), reads * speed, exits, wakeups, wakeups, reads)


@pytest.fixture
def results() -> Results:
    """Those of a plan with two rounds."""
    windows = [window(load) for load in Plan("", readers=(1, 8), rounds=2).windows()]
    return Results("6.1", SHA256, SHA256, windows)


def test_a_plan_measures_both_modes_next_to_each_other_and_in_turn() -> None:
    loads = [load for load in Plan("", readers=(4,), rounds=2).windows() if load.backend == "file"]
    assert [(load.round, load.readers, load.ioeventfd) for load in loads] == [
        (0, 0, True), (0, 4, True), (0, 4, False),
        (1, 0, True), (1, 4, False), (1, 4, True),
    ]  # fmt: skip


def test_a_row_has_the_median_and_the_spread_of_all_rounds(results: Results) -> None:
    row = results.row("slow", 8, True)
    assert row.reads_per_second == Spread(225, 150, 300)
    assert row.cpu_left == Spread(0.5, 0.5, 0.5)
    assert (row.reads, row.wakeups, row.notify_exits) == (900, 200, 0)
    assert row.batch == 4.5
    assert results.row("slow", 8, False).batch == 3.0  # for each exit


def test_a_thread_that_never_slept_has_no_batches(results: Results) -> None:
    awake = replace(results, windows=[replace(window, wakeups=0) for window in results.windows])
    assert awake.row("slow", 8, True).batch is None


def test_rows_come_by_backend_and_readers_off_before_on(results: Results) -> None:
    assert [(row.backend, row.readers, row.ioeventfd) for row in results.rows()] == [
        (backend, readers, mode) for backend in ("file", "slow") for readers in (1, 8) for mode in (False, True)
    ]


def test_kept_promises_are_no_problem(results: Results) -> None:
    assert results.problems() == []
    assert "With 8 readers of a plain file, ioeventfd gives 3.0 (3.0-3.0) times the reads per second." in summary(
        results
    )


def test_wrong_data_is_a_problem(results: Results) -> None:
    wrong = Results("6.1", "4" * 64, SHA256, results.windows)
    assert wrong.problems() == [f"the guest read other data: sha256 {SHA256} instead of {'4' * 64}"]


def test_a_notify_exit_with_ioeventfd_on_is_a_problem(results: Results) -> None:
    load = Load("file", 1, True, 2)
    leak = Results("6.1", SHA256, SHA256, [*results.windows, Window(load, 2.0, 500.0, 10, 3, 0, 7, 10)])
    assert leak.problems() == ["3 notifies left the guest although ioeventfd was on"]


def test_events_that_travelled_as_json_give_the_same_results(with_network: Results) -> None:
    events = [("boot", {"kernel": "6.1"}), ("measure", {"sha256": SHA256})]
    events += [("window", asdict(window)) for window in with_network.windows]
    events += [("net-window", asdict(window)) for window in with_network.net_windows]
    travelled = [(name, json.loads(json.dumps(figures))) for name, figures in events]
    assert Results.of(SHA256, travelled) == with_network
    assert json.loads(json.dumps(with_network.as_json()))["rows"][0]["reads_per_second"]["median"] == 75


def net_window(load: NetLoad) -> NetWindow:
    """1000 frames in 2 s where the vCPU serves, twice as many with ioeventfd, four times with vhost."""
    frames, sync = 1000 << MODES.index(load.mode), load.mode == "sync"
    return NetWindow(load, 2.0, frames, 500 if sync else 0, 10 if load.mode == "ioeventfd" else 0, 2000 if sync else 50)


@pytest.fixture
def with_network(results: Results) -> Results:
    return replace(results, net_windows=[net_window(load) for load in windows(2, MODES)])


def test_network_modes_are_measured_next_to_each_other_and_in_turn() -> None:
    loads = [(load.round, load.mode) for load in windows(2, MODES) if load.size == 64]
    assert loads == [*((0, mode) for mode in MODES), *((1, mode) for mode in reversed(MODES))]


def test_a_network_row_compares_with_the_same_round(with_network: Results) -> None:
    rows = with_network.net_rows()
    assert [(row.size, row.mode) for row in rows] == [(size, mode) for size in (64, 1500) for mode in MODES]
    assert [row.frames_per_second.median for row in rows[:3]] == [500, 1000, 2000]
    assert [row.speedup for row in rows[:3]] == [Spread(1, 1, 1), Spread(2, 2, 2), Spread(4, 4, 4)]
    assert (rows[0].notify_exits, rows[1].wakeups) == (1000, 20)
    assert [row.exits_per_frame for row in rows[:2]] == [2, 0.025]


def test_exits_that_kvm_does_not_tell_are_no_figure(with_network: Results, tmp_path: Path) -> None:
    untold = [replace(window, exits=None) for window in with_network.net_windows]
    assert {row.exits_per_frame for row in replace(with_network, net_windows=untold).net_rows()} == {None}
    assert vm_exits(tmp_path) is None
    figures = tmp_path / f"sys/kernel/debug/kvm/{os.getpid()}-12"
    figures.mkdir(parents=True)
    (figures / "exits").write_text("345\n")
    assert vm_exits(tmp_path) == 345


def test_a_notify_exit_with_vhost_is_a_problem(with_network: Results) -> None:
    leak = NetWindow(NetLoad(64, "vhost", 0), 2.0, 10, 3, 0)
    assert with_network.problems() == []
    assert replace(with_network, net_windows=[*with_network.net_windows, leak]).problems() == [
        "3 notifies left the guest although ioeventfd was on"
    ]


def test_a_host_without_taps_is_told_so(results: Results) -> None:
    events = [("boot", {"kernel": "6.1"}), ("measure", {"sha256": SHA256}), ("no-network", {"reason": "not permitted"})]
    events += [("window", asdict(window)) for window in results.windows]
    assert "No network card was measured: not permitted." in summary(Results.of(SHA256, events))


def test_the_drawing_has_all_parts(with_network: Results, results: Results, tmp_path: Path) -> None:
    for name, drawn in (("disks", results), ("all", with_network)):
        draw(drawn, tmp_path / f"{name}.svg")
    disks, everything = ((tmp_path / f"{name}.svg").read_text() for name in ("disks", "all"))
    assert len(everything) > len(disks) > 0


def test_the_table_fits_a_terminal_of_80_columns(results: Results) -> None:
    console = Console(file=io.StringIO(), width=80)
    console.print(table(results))
    assert isinstance(console.file, io.StringIO)
    rows = [line.split() for line in console.file.getvalue().splitlines()]
    assert ["8", "off", "75", "(50-100)", "10%", "(10-10)", "100", "0", "0", "3.0", "200"] in rows
    assert ["on", "225", "(150-300)", "50%", "(50-50)", "0", "200", "200", "4.5", "600"] in rows
