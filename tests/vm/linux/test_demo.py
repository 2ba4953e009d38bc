"""The demo's measurement, small: what it promises, not how fast it is."""

from pathlib import Path
from typing import Any

from pyvirtio.cli.demo import make_disk
from pyvirtio.demo.measure import Plan, measure
from pyvirtio.demo.network import MODES, SIZES
from pyvirtio.demo.results import Results


def test_the_demo_keeps_its_promises(tmp_path: Path) -> None:
    plan = Plan(str(tmp_path / "disk.img"), readers=(1, 8), rounds=1, seconds=0.5)
    sha256 = make_disk(Path(plan.disk), 4 << 20)
    events: list[tuple[str, dict[str, Any]]] = []
    measure(plan, lambda event, **figures: events.append((event, figures)))
    results = Results.of(sha256, events)

    assert results.problems() == []
    for row in results.rows():
        assert row.reads > 0
        assert row.interrupts > 0
        assert row.ioeventfd or not row.wakeups
        assert (row.notify_exits > 0) is not row.ioeventfd

    assert [(row.size, row.mode) for row in results.net_rows()] == [(size, mode) for size in SIZES for mode in MODES]
    for sent in results.net_rows():
        assert sent.frames > 0
        assert (sent.notify_exits > 0) is (sent.mode == "sync")
        assert sent.exits_per_frame is None or sent.exits_per_frame > 0
