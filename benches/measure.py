"""What the benchmarks share: interleaved repetitions, a table with the spread, JSON.

Figures of a shared machine wander, so the modes take turns: ratios within one run mean more than single times.
"""

import argparse
import json
import os
import platform
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path

Samples = dict[str, list[float]]


def arguments(description: str | None, repetitions: int = 7) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--repetitions", type=int, default=repetitions, help="of each mode (default %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    return parser


def interleaved(modes: Mapping[str, Callable[[], float]], repetitions: int) -> Samples:
    """Measure each mode once, then all again, and so on; the first round warms up and does not count."""
    samples: Samples = {name: [] for name in modes}
    for round_ in range(repetitions + 1):
        for name, measure in modes.items():
            value = measure()
            if round_:
                samples[name].append(value)
    return samples


class Report:
    """Prints median, lowest and highest of each mode; `close` writes the JSON file, if one was asked for."""

    def __init__(self, json_file: Path | None) -> None:
        self.json_file = json_file
        self.tables: list[dict[str, object]] = []

    def add(self, title: str, unit: str, samples: Samples) -> None:
        width = max(len(name) for name in samples)
        print(f"{title}\n  {'':{width}}  {'median':>9} {'lowest':>9} {'highest':>9}  {unit}")
        for name, values in samples.items():
            print(f"  {name:{width}}  {statistics.median(values):9.2f} {min(values):9.2f} {max(values):9.2f}")
        self.tables.append({"title": title, "unit": unit, "samples": samples})

    def close(self) -> None:
        if self.json_file:
            figures = {"kernel": platform.release(), "cpus": os.cpu_count(), "tables": self.tables}
            self.json_file.write_text(json.dumps(figures, indent=2) + "\n")
