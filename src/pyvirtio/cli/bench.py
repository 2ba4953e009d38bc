"""`pyvirtio bench`: measures a vhost-user back-end, or compares ours with that of others."""

import argparse
import importlib.util
import json
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

from pyvirtio.cli import bench_blk, bench_net
from pyvirtio.errors import ConfigError, ProtocolError

DEVICES = {"blk": bench_blk, "net": bench_net}
SERVERS = {server: device for device, half in DEVICES.items() for server in half.SERVERS}
"""Others, and what they serve."""
MAX_SECONDS = 86400
MAX_QUEUES = 64
WIDTH_OF_A_FILE = 120  # columns, where the output is no terminal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Drives a vhost-user-blk or vhost-user-net socket without a virtual machine: requests or frames and bytes per "
        "second, latencies, the CPU time that the back-end's process takes for each request or frame, and its memory. "
        "Writes go to the disk! Exit status 1 if a request failed or the content was wrong."
    )
    parser.add_argument("device", nargs="?", choices=list(DEVICES), help="what is behind the socket")
    parser.add_argument("--socket-path", type=Path, metavar="PATH", help="a socket of any back-end")
    parser.add_argument("--against", metavar="SERVER", help=f"compare ours with another one: {', '.join(SERVERS)}")
    parser.add_argument("--pid", type=int, metavar="N", help="its process, unless that is who listens")
    help_ = "queues, each with its iodepth, or queue pairs (1)"
    parser.add_argument("--num-queues", type=int, default=1, metavar="N", help=help_)
    parser.add_argument("--packed", action="store_true", help="packed rings")
    parser.add_argument("--poll", action="store_true", help="look for completions all the time; no interrupts")
    help_ = "disks: write to all of --size first, and check all that is read; cards: number frames, and look for them"
    parser.add_argument("--verify", action="store_true", help=help_)
    parser.add_argument("--seconds", type=float, default=1.0, metavar="S", help="length of a measurement (1)")
    help_ = "measurements of each depth or size, in turn (3)"
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help=help_)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="draw them (needs matplotlib)")
    for half in DEVICES.values():
        half.add_arguments(parser)


def main(args: argparse.Namespace) -> int:
    _check(args)
    half = _half(args)
    load = half.load_of(args)
    try:
        return _compare(args, half, load) if args.against else _measure(args, half, load)
    except ProtocolError as error:
        print("pyvirtio:", error, file=sys.stderr)
        return 1


def _measure(args: argparse.Namespace, half: ModuleType, load: Any) -> int:
    from pyvirtio.bench.table import samples_table

    title, points = str(args.socket_path), half.points(args)
    with half.connected(args, load) as target:
        steps = [(at, args.seconds, round_) for round_ in range(args.rounds) for at in points]
        samples = _tracked((target.measure(*step) for step in steps), len(steps))
        target.check()
    _console().print(samples_table(title, load, samples))
    _write(args, {"socket": title, "load": asdict(load), "samples": [asdict(sample) for sample in samples]})
    if args.plot:
        from pyvirtio.bench.plot import draw_samples

        draw_samples(samples, load, title, args.plot)
    return _status(half, samples, f"{title}: ")


def _compare(args: argparse.Namespace, half: ModuleType, load: Any) -> int:
    from pyvirtio.bench import compare
    from pyvirtio.bench.table import ratios_table
    from pyvirtio.cli.lab import ended_by_signals

    contests = half.contests(args, load)
    with ended_by_signals(), tempfile.TemporaryDirectory(prefix="pyvirtio-bench-") as directory:
        measured = compare.run(contests, args.against, args.rounds, args.seconds, Path(directory))
        results = _tracked(measured, sum(compare.count(contest, args.rounds) for contest in contests))
    rows = compare.rows(results, args.against, load.compared)
    _console().print(ratios_table(rows, load, args.against, results))
    _write(args, compare.as_json(args.against, contests, results, rows))
    if args.plot:
        from pyvirtio.bench.plot import draw_ratios

        draw_ratios(rows, load, args.against, args.plot)
    return _status(half, [result.sample for result in results])


def _status(half: ModuleType, samples: list[Any], where: str = "") -> int:
    failed = sum(sample.failed for sample in samples)
    if failed:
        print(f"pyvirtio: {where}{half.failure(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _tracked(measured: Iterable[Any], total: int) -> list[Any]:
    """All of them, with a bar that shows how many there are already."""
    from rich.progress import track

    return list(track(measured, "measuring", total, console=_console(), transient=True))


def _half(args: argparse.Namespace) -> ModuleType:
    """What is about the device; the options of other devices are refused, and those of this one have their defaults."""
    device = args.device or SERVERS[args.against]
    for name, half in DEVICES.items():
        for option, default in half.DEFAULTS.items():
            given = getattr(args, option) is not None
            if given and name != device:
                option = option.replace("_", "-")
                raise ConfigError(f"bench: --{option} is an option of `bench {name}`, not of `bench {device}`")
            if not given:
                setattr(args, option, default)
    return DEVICES[device]


def _check(args: argparse.Namespace) -> None:
    """ConfigError before anything has started."""
    if args.against is None and (args.device is None or args.socket_path is None):
        known = f"`bench blk --socket-path PATH` or `bench --against {next(iter(SERVERS))}`"
        raise ConfigError(f"bench: say what: {known}")
    if args.against is not None and args.against not in SERVERS:
        raise ConfigError(f"bench: --against {args.against} is not known: {', '.join(SERVERS)}")
    if args.against is not None and args.device not in (None, SERVERS[args.against]):
        raise ConfigError(f"bench: {args.against} does not serve {args.device}")
    if args.against is not None and args.socket_path:
        raise ConfigError("bench: --against starts all servers itself: leave --socket-path out")
    if not 1 <= args.num_queues <= MAX_QUEUES:
        raise ConfigError(f"bench: --num-queues {args.num_queues} is not allowed: 1 to {MAX_QUEUES}")
    if not 1 <= args.rounds <= 1000:
        raise ConfigError(f"bench: --rounds {args.rounds} is not allowed: 1 to 1000")
    if not 0.01 <= args.seconds <= MAX_SECONDS:
        raise ConfigError(f"bench: --seconds {args.seconds:g} is not allowed: 0.01 to {MAX_SECONDS}")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("bench: --plot needs matplotlib: pip install 'pyvirtio[plot]'")
    if args.plot and args.plot.suffix != ".svg":
        raise ConfigError(f"bench: --plot {args.plot} is not allowed: the name has to end in .svg")
    for file in filter(None, (args.json, args.plot)):
        if not file.absolute().parent.is_dir() or file.is_dir():
            raise ConfigError(f"bench: {file} cannot be written: no such directory, or one itself")


def _console() -> Any:
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH_OF_A_FILE)


def _write(args: argparse.Namespace, figures: dict[str, Any]) -> None:
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")
