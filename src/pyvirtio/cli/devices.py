"""The device names of `--device`, and what a device takes."""

from collections.abc import Mapping
from dataclasses import replace

from pyvirtio.cli.classes import Catalogue
from pyvirtio.cli.options import print_properties, print_table
from pyvirtio.device import Device
from pyvirtio.devices import DEVICES
from pyvirtio.properties import Property, properties_of
from pyvirtio.transports.pci import VirtioPci

NAMES = {f"virtio-{short}-pci": short for short in DEVICES}
GIVEN = ("name", "device", "accel")
"""The parameters of `VirtioPci` that are not options: `id=` is the name."""
CHOSEN = ("iothread", "slot")
"""Those that the machine chooses unless it is told."""


def catalogue(names: Mapping[str, str] = NAMES) -> Catalogue:
    """`names` are those of the table, each with its short name; on no bus that is its name."""
    table = {name: DEVICES[short] for name, short in names.items()}
    return Catalogue("--device", "device", Device, table, "pyvirtio.devices")


def device_class(name: str, names: Mapping[str, str] = NAMES) -> type[Device]:
    """The class behind a name of `--device`. ConfigError, in one line, for everything that can be wrong with it."""
    found: type[Device] = catalogue(names).find(name)
    return found


def device_properties(name: str) -> list[Property]:
    """What a device takes: its own properties, then those of its transport."""
    cls = device_class(name)
    own = {"ioeventfd": cls.ioeventfd}
    pci = [replace(p, default=own.get(p.parameter, p.default)) for p in transport_properties()]
    return [*properties_of(cls), *pci]


def transport_properties() -> list[Property]:
    found = properties_of(VirtioPci, GIVEN)
    return [replace(p, default=None) if p.parameter in CHOSEN else p for p in found]


def print_devices(names: Mapping[str, str] = NAMES) -> None:
    print_table("--device", ("name", "what it is"), catalogue(names).rows())


def print_device(name: str) -> None:
    print_properties(f"--device {name}", device_properties(name))
