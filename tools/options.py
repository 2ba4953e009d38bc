"""Writes docs/options.md from the properties of the devices, the transport and the objects; `--check` only compares."""

import sys
from pathlib import Path

from pyvirtio.backends.chardev import CHARDEVS
from pyvirtio.cli import netdev
from pyvirtio.cli.devices import NAMES, transport_properties
from pyvirtio.dataplane import IoThread
from pyvirtio.devices import load
from pyvirtio.properties import Property, properties_of
from pyvirtio.serve.vhost_user import Rings

PAGE = Path(__file__).resolve().parent.parent / "docs" / "options.md"
INTRODUCTION = """\
# Options

Written by `python tools/options.py` from the signatures of the classes; `pyvirtio run --device NAME,help` shows the
same.

Option strings are QEMU's: `KEY=VALUE,KEY=VALUE`; the name comes first, a bare key means `=on`, `,,` stands for a comma
in a value, and `-` and `_` in keys are alike. Sizes take the suffixes k, M, G and T (powers of 1024).
"""


def table(title: str, properties: list[Property]) -> str:
    rows = [f"| `{p.name}` | {p.type} | {p.default_text} | {p.meaning or '-'} | {p.allowed} |" for p in properties]
    head = ["| property | type | default | meaning | allowed |", "|---|---|---|---|---|"]
    return "\n".join([f"\n## {title}\n", *(head if rows else ["None of its own."]), *rows, ""])


def page() -> str:
    devices = [table(f"`--device {name}`", properties_of(load(short))) for name, short in NAMES.items()]
    transport = table("Every device on the PCI bus", transport_properties())
    served = table("Every device that is served (`pyvirtio serve`)", properties_of(Rings))
    iothread = table("`--object iothread`", properties_of(IoThread, ["name"]))
    chardevs = [table(f"`--chardev {name}`", properties_of(cls, ["name"])) for name, cls in CHARDEVS.items()]
    netdevs = [table(f"`--netdev {kind}`", netdev.properties(kind)) for kind in netdev.KINDS]
    return "".join([INTRODUCTION, *devices, transport, served, iothread, *chardevs, *netdevs])


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(0 if PAGE.read_text() == page() else "docs/options.md is stale: run python tools/options.py")
    PAGE.write_text(page())
