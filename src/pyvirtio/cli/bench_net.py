"""The half of `pyvirtio bench` that is about network cards."""

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING

from pyvirtio.bench.frames import DIRECTIONS, FrameLoad
from pyvirtio.errors import ConfigError

if TYPE_CHECKING:
    from pyvirtio.bench.net import NetTarget
    from pyvirtio.bench.net_contest import NetContest

SERVERS = ("dpdk-testpmd",)
NETWORKS = ("sink", "source", "echo")
FRAME_SIZES = (64, 1500)
LEAST, MOST = 60, 65535
MAX_QUEUE_SIZE = 1024
DEFAULTS = {
    "frame_size": (), "direction": None, "burst": 32, "queue_size": 256, "peer_socket": None,
    "network": ",".join(NETWORKS),
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("network cards")
    group.add_argument("--frame-size", type=_frame_sizes, metavar="N,...", help="bytes without FCS (64,1500)")
    directions = ", ".join(DIRECTIONS)
    group.add_argument("--direction", metavar="WHICH", help=f"as the driver sees it: {directions} (tx)")
    group.add_argument("--burst", type=int, metavar="N", help="frames that are offered at a time, at most (32)")
    group.add_argument("--queue-size", type=int, metavar="N", help="descriptors of each ring (256)")
    help_ = "where the frames of `tx` come out: a second card on the same network"
    group.add_argument("--peer-socket", metavar="PATH", help=help_)
    names = DEFAULTS["network"]
    group.add_argument("--network", metavar="NAME,...", help=f"with --against: what is behind the cards ({names})")


def load_of(args: argparse.Namespace) -> FrameLoad:
    if args.direction not in (None, *DIRECTIONS):
        raise ConfigError(f"bench: --direction {args.direction} is not allowed: {', '.join(DIRECTIONS)}")
    if not 2 <= args.queue_size <= MAX_QUEUE_SIZE or args.queue_size & (args.queue_size - 1):
        raise ConfigError(f"bench: --queue-size {args.queue_size} is not allowed: powers of two to {MAX_QUEUE_SIZE}")
    if not 1 <= args.burst <= args.queue_size:
        raise ConfigError(f"bench: --burst {args.burst} is not allowed: 1 to the size of the queue, {args.queue_size}")
    if args.against and (args.direction or args.peer_socket):
        raise ConfigError("bench: with --against the --network says in which direction frames go, and where they end")
    for name in args.network.split(","):
        if name not in NETWORKS:
            raise ConfigError(f"bench: --network {name} is not known: {', '.join(NETWORKS)}")
    if args.direction == "rx" and not args.peer_socket and len(points(args)) > 1 and args.frame_size:
        raise ConfigError("bench: --direction rx takes frames as they come: give the largest --frame-size")
    direction = args.direction or "tx"
    if args.verify and direction == "tx" and not args.peer_socket and not args.against:
        raise ConfigError("bench: --verify needs frames that come back: --direction both or rx, or a --peer-socket")
    return FrameLoad(
        direction, args.peer_socket, args.num_queues, args.queue_size, args.burst, args.packed, args.poll, args.verify
    )  # fmt: skip


def points(args: argparse.Namespace) -> tuple[int, ...]:
    if args.direction == "rx" and not args.peer_socket and not args.frame_size:
        return FRAME_SIZES[-1:]
    return args.frame_size or FRAME_SIZES


def connected(args: argparse.Namespace, load: FrameLoad) -> "NetTarget":
    from pyvirtio.bench.net import NetTarget

    return NetTarget(args.socket_path, load, max(points(args)), args.pid)


def contests(args: argparse.Namespace, load: FrameLoad) -> "list[NetContest]":
    from pyvirtio.bench.net_contest import NETWORKS, NetContest

    found = []
    for name in args.network.split(","):
        each = replace(load, direction=NETWORKS[name][0])
        sizes = [(size,) for size in points(args)] if name == "source" else [points(args)]
        found += [NetContest(name, each, chosen) for chosen in sizes]
    return found


def failure(failed: int) -> str:
    return f"{failed} frames were damaged or out of order"


def _frame_sizes(text: str) -> tuple[int, ...]:
    """The sizes of a list, smallest first."""
    sizes = {int(item) if item.isdecimal() else 0 for item in text.split(",")}
    if not all(LEAST <= size <= MOST for size in sizes):
        raise ConfigError(f"bench: --frame-size {text} is not allowed: numbers from {LEAST} to {MOST}, with commas")
    return tuple(sorted(sizes))
