"""`pyvirtio lab`: runs a command on a machine with a hardware-like /dev/kvm, where this host has none."""

import argparse
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from pyvirtio.errors import ConfigError
from pyvirtio.properties import parse_size

MIB = 1 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "pyvirtio lab [options] [--] COMMAND..."
    parser.description = (
        "Runs COMMAND as root, in this directory and environment, on an emulated machine whose /dev/kvm is the "
        "ordinary hardware KVM. Prints its output (both streams merged, as it comes) and returns its exit status."
    )
    parser.add_argument("--rw", action="store_true", help="COMMAND writes to this host's files (default: to memory)")
    parser.add_argument(
        "--keep", metavar="DIR", type=Path, action="append", default=[], help="COMMAND writes to this directory"
    )
    parser.add_argument("--smp", metavar="N", type=int, default=1, help="CPUs of the machine (1)")
    parser.add_argument("--mem", metavar="SIZE", default="2048M", help="its memory (2048M)")
    parser.add_argument("--timeout", metavar="S", type=float, default=600, help="end COMMAND after S seconds (600)")
    parser.add_argument("--kernel", metavar="VERSION", help="a kernel of /boot (the newest cloud kernel)")
    parser.add_argument("command", metavar="COMMAND", nargs=argparse.REMAINDER)


def main(args: argparse.Namespace) -> int:
    from pyvirtio.lab import Lab, find_kernel

    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not command:
        raise ConfigError("lab: no command; write pyvirtio lab [options] -- COMMAND...")
    _check(args)
    lab = Lab(
        cpus=args.smp,
        memory=_memory(args.mem),
        timeout=args.timeout,
        writable=args.rw,
        keep=args.keep,
        kernel=find_kernel(args.kernel),
    )
    with ended_by_signals():
        return lab.run(command, _print)


def _check(args: argparse.Namespace) -> None:
    if not 1 <= args.smp <= 64:
        raise ConfigError(f"lab: --smp {args.smp} is not allowed: 1 to 64")
    if not args.timeout > 0:
        raise ConfigError(f"lab: --timeout {args.timeout:g} is not allowed: more than 0 seconds")
    for directory in args.keep:
        if not directory.is_dir():
            raise ConfigError(f"lab: --keep {directory}: no such directory")


def _memory(text: str) -> int:
    try:
        size = parse_size(text, unit="m")
    except ValueError:
        raise ConfigError(f"lab: --mem {text} is not allowed: a size such as 2048M") from None
    if size < 512 * MIB or size % MIB:
        raise ConfigError(f"lab: --mem {text} is not allowed: 512M or more, in whole MiB")
    return size


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP unwind this block, as Ctrl-C does, so that what it started ends with it."""

    def end(number: int, _frame: object) -> NoReturn:
        sys.exit(128 + number)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _print(output: bytes) -> None:
    """Write it all at once to standard output, also where that is a pipe that takes less."""
    while output:
        output = output[os.write(sys.stdout.fileno(), output) :]
