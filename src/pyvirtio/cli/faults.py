"""`--fault`, of `pyvirtio run` and `pyvirtio serve`."""

import argparse
from collections.abc import Mapping

from pyvirtio.cli.options import print_table
from pyvirtio.device import Device

HELP = """\
what goes wrong on purpose, such as blk0:late=5ms@1%%,lost@0.1%%,seed=7; may be repeated. `help` lists the faults"""


def add_argument(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--fault", action="append", default=[], metavar="DEVICE:FAULTS", help=HELP)


def show_help(args: argparse.Namespace) -> bool:
    """Print the table of faults if it is asked for; whether it was."""
    if "help" not in args.fault:
        return False
    from pyvirtio.faults.options import explain

    columns = ("fault", "value", "what goes wrong")
    print_table("--fault DEVICE:FAULT[=VALUE][@CHANCE],...[,seed=NUMBER]", columns, explain())
    return True


def switch_on(devices: Mapping[str, Device], args: argparse.Namespace) -> None:
    """Switch the faults on that the options name."""
    if args.fault:
        from pyvirtio.faults.options import switch

        for text in args.fault:
            switch(devices, text)
