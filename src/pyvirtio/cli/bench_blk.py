"""The half of `pyvirtio bench` that is about disks."""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from pyvirtio.bench.load import PATTERNS, DiskLoad
from pyvirtio.errors import ConfigError
from pyvirtio.properties import parse_size, show_size

if TYPE_CHECKING:
    from pyvirtio.bench.disk_contest import DiskContest
    from pyvirtio.bench.target import Target

QSD, NBDKIT = SERVERS = ("qemu-storage-daemon", "nbdkit")
STORAGES = {"null": (32, 128), "tmpfs": (1, 32, 128), "disk": (32,)}
"""What the servers of a comparison can have below them, and the depths at which they are compared on it."""
IODEPTHS = (1, 32)
MAX_IODEPTH = 128
MAX_BLOCK = 1 << 20
DEFAULTS = {
    "rw": "randread", "bs": "4k", "iodepth": (), "size": "256m", "indirect": False,
    "storage": ",".join(STORAGES), "dir": Path(),
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("disks")
    group.add_argument("--rw", metavar="PATTERN", help=f"{', '.join(PATTERNS)} (randread)")
    group.add_argument("--bs", metavar="SIZE", help="bytes of a request (4k)")
    group.add_argument("--iodepth", type=_iodepths, metavar="N,...", help="requests in flight, 1 to 128 (1,32)")
    group.add_argument("--size", metavar="SIZE", help="how much of the disk is used, at most (256m)")
    group.add_argument("--indirect", action="store_true", default=None, help="indirect descriptors, as Linux uses them")
    names = DEFAULTS["storage"]
    group.add_argument("--storage", metavar="NAME,...", help=f"with --against: what is below them ({names})")
    group.add_argument("--dir", type=Path, metavar="DIR", help="with --against: where `disk` has its file (.)")


def load_of(args: argparse.Namespace) -> DiskLoad:
    if args.rw not in PATTERNS:
        raise ConfigError(f"bench: --rw {args.rw} is not allowed: {', '.join(PATTERNS)}")
    block_size, size = _size(args, "bs"), _size(args, "size")
    if not 512 <= block_size <= MAX_BLOCK or block_size % 512:
        raise ConfigError(f"bench: --bs {args.bs} is not allowed: multiples of 512 up to {show_size(MAX_BLOCK)}")
    if args.against == NBDKIT and (args.verify or args.num_queues > 1):
        raise ConfigError("bench: --against nbdkit has one queue, and no --verify")
    for name in args.storage.split(","):
        if name not in STORAGES:
            raise ConfigError(f"bench: --storage {name} is not known: {', '.join(STORAGES)}")
    return DiskLoad(args.rw, block_size, args.num_queues, size, args.packed, args.indirect, args.poll, args.verify)


def points(args: argparse.Namespace) -> tuple[int, ...]:
    return args.iodepth or IODEPTHS


def connected(args: argparse.Namespace, load: DiskLoad) -> "Target":
    from pyvirtio.bench.target import Target

    return Target(args.socket_path, load, max(points(args)), args.pid)


def contests(args: argparse.Namespace, load: DiskLoad) -> "list[DiskContest]":
    from pyvirtio.bench.disk_contest import DiskContest
    from pyvirtio.bench.servers import MEMORY, Storage

    if args.against == NBDKIT:
        return [DiskContest(Storage(MEMORY), load, args.iodepth or (32,))]
    name = f"pyvirtio-bench-{os.getpid()}.img"
    storages = {
        "null": Storage("null"),
        "tmpfs": Storage("tmpfs", Path("/dev/shm") / name),
        "disk": Storage("disk", args.dir.absolute() / name, direct=True),
    }
    chosen = args.storage.split(",")
    return [DiskContest(storages[storage], load, args.iodepth or STORAGES[storage]) for storage in chosen]


def failure(failed: int) -> str:
    return f"{failed} requests failed"


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
