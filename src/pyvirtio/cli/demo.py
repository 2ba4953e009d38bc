"""`pyvirtio demo`: Linux on a virtio-blk disk, compared with ioeventfd on and off in one boot."""

import argparse
import hashlib
import importlib.util
import json
import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyvirtio.accel.host import linux_capable
from pyvirtio.errors import ConfigError
from pyvirtio.properties import parse_size

if TYPE_CHECKING:
    from pyvirtio.demo.measure import Plan, Report
    from pyvirtio.demo.results import Results

MIB = 1 << 20
MIN_SIZE, MAX_SIZE = 64 * MIB, 1024 * MIB
LAB_TIMEOUT = 900
WIDTH_OF_A_FILE = 120  # columns, where the output is no terminal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Boots Linux with a disk of random data behind virtio-blk-pci and compares, in one boot, ioeventfd on and "
        "off: reads per second, the share of the vCPU left to the guest, exits, wake-ups and interrupts. Then, where a "
        "tap is permitted, frames sent through virtio-net-pci, with vhost-net as well. Uses the lab where this host's "
        "KVM cannot run Linux. Exit status 1 if the guest read wrong data, or if a notify left it with ioeventfd on."
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="draw them (needs matplotlib)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="how often each load is measured (3)")
    parser.add_argument("--seconds", type=float, default=1.5, metavar="S", help="length of one measurement (1.5)")
    parser.add_argument("--size", default="64M", metavar="SIZE", help="size of the disk (64M, the smallest)")


def main(args: argparse.Namespace) -> int:
    size = _check(args)
    from rich.console import Console

    from pyvirtio.cli.lab import ended_by_signals
    from pyvirtio.demo.measure import Plan
    from pyvirtio.demo.progress import Steps
    from pyvirtio.demo.results import Results
    from pyvirtio.demo.table import table

    console = Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH_OF_A_FILE)
    events: list[tuple[str, dict[str, Any]]] = []
    with ended_by_signals(), tempfile.TemporaryDirectory(prefix="pyvirtio-demo-") as directory:
        plan = Plan(f"{directory}/disk.img", rounds=args.rounds, seconds=args.seconds)
        with Steps(console, len(list(plan.windows()))) as steps:

            def report(event: str, **figures: Any) -> None:
                events.append((event, figures))
                steps.show(event, figures)

            steps.step(f"a disk of {size // MIB} MiB of random data")
            sha256 = make_disk(Path(plan.disk), size)
            reason = linux_capable()
            if reason:
                steps.step(f"the lab starts, because {reason}")
            status = _run_in_lab(plan, report) if reason else _run_here(plan, report)
    if status:
        return status
    results = Results.of(sha256, events)
    console.print(table(results))
    _write(args, results)
    return 1 if results.problems() else 0


def make_disk(path: Path, size: int) -> str:
    """Fill a file with random data; return its sha256."""
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for _ in range(size // MIB):
            data = os.urandom(MIB)
            digest.update(data)
            file.write(data)
    return digest.hexdigest()


class EventLines:
    """Turns what the measurement prints in the lab back into events; other lines go to standard error."""

    def __init__(self, report: "Report") -> None:
        self._report = report
        self._held = b""

    def feed(self, data: bytes) -> None:
        *lines, self._held = (self._held + data).split(b"\n")
        for line in lines:
            if line.startswith(b'{"event": '):
                figures = json.loads(line)
                self._report(figures.pop("event"), **figures)
            else:
                print(line.decode(errors="replace"), file=sys.stderr)


def _run_here(plan: "Plan", report: "Report") -> int:
    from pyvirtio.demo.measure import measure
    from pyvirtio.testing.linux import GuestFailed

    try:
        measure(plan, report)
    except GuestFailed as failure:
        print(failure, file=sys.stderr)
        return 1
    return 0


def _run_in_lab(plan: "Plan", report: "Report") -> int:
    """The same program on the lab's machine, which sees the same files."""
    from pyvirtio.lab import Lab

    command = [sys.executable, "-m", "pyvirtio.demo.measure", json.dumps(asdict(plan))]
    # One for the guest's only CPU, one for the I/O thread.
    return Lab(cpus=2, timeout=LAB_TIMEOUT).run(command, EventLines(report).feed)


def _check(args: argparse.Namespace) -> int:
    """The size of the disk; ConfigError before anything has started."""
    if not 1 <= args.rounds <= 100:
        raise ConfigError(f"demo: --rounds {args.rounds} is not allowed: 1 to 100")
    if not 0.1 <= args.seconds <= 60:
        raise ConfigError(f"demo: --seconds {args.seconds:g} is not allowed: 0.1 to 60")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("demo: --plot needs matplotlib: pip install 'pyvirtio[plot]'")
    if args.plot and args.plot.suffix != ".svg":
        raise ConfigError(f"demo: --plot {args.plot} is not allowed: the name has to end in .svg")
    for file in filter(None, (args.json, args.plot)):
        if not file.absolute().parent.is_dir() or file.is_dir():
            raise ConfigError(f"demo: {file} cannot be written: no such directory, or one itself")
    try:
        size = parse_size(args.size, unit="m")
    except ValueError:
        size = 0
    if not MIN_SIZE <= size <= MAX_SIZE or size % MIB:
        raise ConfigError(f"demo: --size {args.size} is not allowed: whole MiB from 64M to 1G")
    return size


def _write(args: argparse.Namespace, results: "Results") -> None:
    if args.json:
        args.json.write_text(json.dumps(results.as_json(), indent=2) + "\n")
    if args.plot:
        from pyvirtio.demo.plot import draw

        draw(results, args.plot)
