"""The `pyvirtio` command: finds the sub-command, and turns the user's mistakes into one line and exit status 2."""

import argparse
import importlib
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from pyvirtio.errors import ConfigError

COMMANDS = {
    "run": "boot a virtual machine",
    "serve": "serve devices to other virtual machine monitors over vhost-user",
    "bench": "measure a back-end of vhost-user, or two of them in turn",
    "lab": "run a command on a machine with hardware-like KVM",
    "demo": "compare ioeventfd on and off in one boot",
}
"""Each is the module `pyvirtio.cli.NAME`: `add_arguments(parser)` and `main(args) -> exit status`."""


class _Parser(argparse.ArgumentParser):
    """Leaves it to `main` to report errors, in one line."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


class _Version(argparse.Action):
    """Looks the version up only when asked: importing that module takes longer than all the rest."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from importlib.metadata import version

        print("pyvirtio", version("pyvirtio"))
        parser.exit()


def main(argv: Sequence[str] | None = None) -> int:
    """Run `argv` (by default the command line of the process); return the exit status."""
    logging.basicConfig(level=logging.WARNING, format="pyvirtio: %(message)s")
    arguments = sys.argv[1:] if argv is None else list(argv)
    try:
        return _run(arguments)
    except ConfigError as error:
        if sys.flags.dev_mode and error.__cause__:  # python -X dev, or PYTHONDEVMODE=1
            traceback.print_exception(error.__cause__)
        print("pyvirtio:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # somebody closed our standard output: `pyvirtio ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _run(arguments: list[str]) -> int:
    chosen = arguments[0] if arguments else ""
    args = make_parser(chosen).parse_args(arguments)
    status: int = importlib.import_module(f"pyvirtio.cli.{chosen}").main(args)
    print(end="", flush=True)  # does nothing where standard output is closed
    return status


def make_parser(chosen: str) -> argparse.ArgumentParser:
    """The parser, with the options of the chosen sub-command; the others are not even imported."""
    parser = _Parser(
        prog="pyvirtio", description="Userspace virtio for KVM, programmable in Python.", allow_abbrev=False
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, purpose in COMMANDS.items():
        command = commands.add_parser(name, help=purpose, description=purpose, allow_abbrev=False)
        if name == chosen:
            importlib.import_module(f"pyvirtio.cli.{name}").add_arguments(command)
    return parser
