"""What the windows of the demo say together."""

import io
import json
from dataclasses import asdict, replace

import pytest
from rich.console import Console

from pyvirtio.demo.measure import Load, Plan, Window
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


def test_events_that_travelled_as_json_give_the_same_results(results: Results) -> None:
    events = [("boot", {"kernel": "6.1"}), ("measure", {"sha256": SHA256})]
    events += [("window", asdict(window)) for window in results.windows]
    travelled = [(name, json.loads(json.dumps(figures))) for name, figures in events]
    assert Results.of(SHA256, travelled) == results
    assert json.loads(json.dumps(results.as_json()))["rows"][0]["reads_per_second"]["median"] == 75


def test_the_table_fits_a_terminal_of_80_columns(results: Results) -> None:
    console = Console(file=io.StringIO(), width=80)
    console.print(table(results))
    assert isinstance(console.file, io.StringIO)
    rows = [line.split() for line in console.file.getvalue().splitlines()]
    assert ["8", "off", "75", "(50-100)", "10%", "(10-10)", "100", "0", "0", "3.0", "200"] in rows
    assert ["on", "225", "(150-300)", "50%", "(50-50)", "0", "200", "200", "4.5", "600"] in rows
