"""`pyvirtio bench`: measures a vhost-user-blk back-end, or compares ours with that of others."""

import argparse
import importlib.util
import json
import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyvirtio.bench.load import PATTERNS, Load
from pyvirtio.errors import ConfigError, ProtocolError
from pyvirtio.properties import parse_size, show_size

if TYPE_CHECKING:
    from pyvirtio.bench.compare import Contest
    from pyvirtio.bench.load import Sample
    from pyvirtio.bench.target import Target

SERVERS = ["qemu-storage-daemon", "nbdkit"]
STORAGES = {"null": (32, 128), "tmpfs": (1, 32, 128), "disk": (32,)}
"""What the servers of a comparison can have below them, and the depths at which they are compared on it."""
MAX_IODEPTH = 128
MAX_BLOCK = 1 << 20
MAX_SECONDS = 86400
WIDTH_OF_A_FILE = 120  # columns, where the output is no terminal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Drives a vhost-user-blk socket without a virtual machine: requests and bytes per second, latencies, the CPU "
        "time that the back-end's process takes for each request, and its memory. Writes go to the disk! Exit status 1 "
        "if a request failed or the content was wrong."
    )
    parser.add_argument("device", nargs="?", choices=["blk"], help="what is behind the socket")
    parser.add_argument("--socket-path", type=Path, metavar="PATH", help="a socket of any back-end")
    parser.add_argument("--against", metavar="SERVER", help=f"compare ours with another one: {', '.join(SERVERS)}")
    names = ",".join(STORAGES)
    parser.add_argument("--storage", default=names, metavar="NAME,...", help=f"then: what is below them ({names})")
    parser.add_argument("--dir", type=Path, default=Path(), metavar="DIR", help="then: where `disk` has its file (.)")
    parser.add_argument("--pid", type=int, metavar="N", help="its process, unless that is who listens")
    parser.add_argument("--rw", default="randread", metavar="PATTERN", help=f"{', '.join(PATTERNS)} (randread)")
    parser.add_argument("--bs", default="4k", metavar="SIZE", help="bytes of a request (4k)")
    parser.add_argument("--iodepth", type=_iodepths, metavar="N,...", help="requests in flight, 1 to 128 (1,32)")
    parser.add_argument("--num-queues", type=int, default=1, metavar="N", help="queues, each with its iodepth (1)")
    parser.add_argument("--size", default="256m", metavar="SIZE", help="how much of the disk is used, at most (256m)")
    parser.add_argument("--packed", action="store_true", help="packed rings")
    parser.add_argument("--indirect", action="store_true", help="indirect descriptors, as Linux uses them")
    parser.add_argument("--poll", action="store_true", help="look for completions all the time; no interrupts")
    parser.add_argument(
        "--verify", action="store_true", help="write to all of --size first, and check all that is read"
    )
    parser.add_argument("--seconds", type=float, default=1.0, metavar="S", help="length of a measurement (1)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="measurements of each depth, in turn (3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="draw them (needs matplotlib)")


def main(args: argparse.Namespace) -> int:
    load = _load(args)
    _check(args)
    try:
        return _compare(args, load) if args.against else _measure_one(args, load)
    except ProtocolError as error:
        print("pyvirtio:", error, file=sys.stderr)
        return 1


def _measure_one(args: argparse.Namespace, load: Load) -> int:
    from pyvirtio.bench.table import samples_table
    from pyvirtio.bench.target import Target

    iodepths = args.iodepth or (1, 32)
    with Target(args.socket_path, load, max(iodepths), args.pid) as target:
        samples = _in_turn(target, iodepths, args.rounds, args.seconds)
        target.check()
    _console().print(samples_table(str(args.socket_path), load, samples))
    _write(args, {"socket": str(args.socket_path), "load": asdict(load), "samples": [asdict(s) for s in samples]})
    if args.plot:
        from pyvirtio.bench.plot import draw_samples

        draw_samples(samples, str(args.socket_path), args.plot)
    failed = sum(sample.errors for sample in samples)
    if failed:
        print(f"pyvirtio: {args.socket_path}: {failed} requests failed", file=sys.stderr)
    return 1 if failed else 0


def _compare(args: argparse.Namespace, load: Load) -> int:
    from rich.progress import track

    from pyvirtio.bench.compare import as_json, rows, run
    from pyvirtio.bench.table import ratios_table
    from pyvirtio.cli.lab import ended_by_signals

    contests, console = _contests(args, load), _console()
    with ended_by_signals(), tempfile.TemporaryDirectory(prefix="pyvirtio-bench-") as directory:
        measured = run(contests, args.against, args.rounds, args.seconds, Path(directory))
        total = sum(contest.samples(args.rounds) for contest in contests)
        results = list(track(measured, "measuring", total, console=console, transient=True))
    found = rows(results, args.against)
    console.print(ratios_table(found, args.against, results))
    _write(args, as_json(args.against, contests, results))
    if args.plot:
        from pyvirtio.bench.plot import draw_ratios

        draw_ratios(found, args.against, args.plot)
    failed = sum(result.sample.errors for result in results)
    if failed:
        print(f"pyvirtio: {failed} requests failed", file=sys.stderr)
    return 1 if failed else 0


def _contests(args: argparse.Namespace, load: Load) -> "list[Contest]":
    from pyvirtio.bench.compare import Contest
    from pyvirtio.bench.servers import MEMORY, NBDKIT, Storage

    if args.against == NBDKIT:
        return [Contest(Storage(MEMORY), load, args.iodepth or (32,))]
    name = f"pyvirtio-bench-{os.getpid()}.img"
    storages = {
        "null": Storage("null"),
        "tmpfs": Storage("tmpfs", Path("/dev/shm") / name),
        "disk": Storage("disk", args.dir.absolute() / name, direct=True),
    }
    return [Contest(storages[chosen], load, args.iodepth or STORAGES[chosen]) for chosen in args.storage.split(",")]


def _in_turn(target: "Target", iodepths: tuple[int, ...], rounds: int, seconds: float) -> "list[Sample]":
    return [target.measure(iodepth, seconds, seed=2 * round_ + 1) for round_ in range(rounds) for iodepth in iodepths]


def _load(args: argparse.Namespace) -> Load:
    if args.rw not in PATTERNS:
        raise ConfigError(f"bench: --rw {args.rw} is not allowed: {', '.join(PATTERNS)}")
    block_size, size = _size(args, "bs"), _size(args, "size")
    if not 512 <= block_size <= MAX_BLOCK or block_size % 512:
        raise ConfigError(f"bench: --bs {args.bs} is not allowed: multiples of 512 up to {show_size(MAX_BLOCK)}")
    if not 1 <= args.num_queues <= 64:
        raise ConfigError(f"bench: --num-queues {args.num_queues} is not allowed: 1 to 64")
    return Load(args.rw, block_size, args.num_queues, size, args.packed, args.indirect, args.poll, args.verify)


def _size(args: argparse.Namespace, option: str) -> int:
    text: str = getattr(args, option)
    try:
        return parse_size(text)
    except ValueError:
        raise ConfigError(f"bench: --{option} {text} is not a size") from None


def _iodepths(text: str) -> tuple[int, ...]:
    """The depths of a list, lowest first."""
    depths = {int(item) if item.isdecimal() else 0 for item in text.split(",")}
    if not all(1 <= depth <= MAX_IODEPTH for depth in depths):
        raise ConfigError(f"bench: --iodepth {text} is not allowed: numbers from 1 to {MAX_IODEPTH}, with commas")
    return tuple(sorted(depths))


def _check(args: argparse.Namespace) -> None:
    """ConfigError before anything has started."""
    if args.against is None and (args.device is None or args.socket_path is None):
        raise ConfigError(f"bench: say what: `bench blk --socket-path PATH` or `bench --against {SERVERS[0]}`")
    if args.against is not None and args.against not in SERVERS:
        raise ConfigError(f"bench: --against {args.against} is not known: {', '.join(SERVERS)}")
    if args.against == "nbdkit" and (args.verify or args.num_queues > 1):
        raise ConfigError("bench: --against nbdkit has one queue, and no --verify")
    if args.against is not None and args.socket_path:
        raise ConfigError("bench: --against starts all servers itself: leave --socket-path out")
    for name in args.storage.split(","):
        if name not in STORAGES:
            raise ConfigError(f"bench: --storage {name} is not known: {', '.join(STORAGES)}")
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
