"""`vhost-user-pyvirtio-blk` and the like: `pyvirtio serve` under the names by which management layers find programs."""

import sys

from pyvirtio.cli.main import main


def blk() -> int:
    return main(["serve", "blk", *sys.argv[1:]])


def console() -> int:
    return main(["serve", "console", *sys.argv[1:]])


def net() -> int:
    return main(["serve", "net", *sys.argv[1:]])


def rng() -> int:
    return main(["serve", "rng", *sys.argv[1:]])
