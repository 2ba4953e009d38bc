"""The device types, one file each, and the table of their names."""

from importlib import import_module

from pyvirtio.device import Device

DEVICES = {
    "balloon": "pyvirtio.devices.balloon:Balloon",
    "blk": "pyvirtio.devices.blk:Blk",
    "console": "pyvirtio.devices.console:Console",
    "net": "pyvirtio.devices.net:Net",
    "rng": "pyvirtio.devices.rng:Rng",
}
"""Short name -> `module:Class`; on a PCI bus `blk` is called `virtio-blk-pci`."""


def load(name: str) -> type[Device]:
    """The class behind a short name; imported only when it is asked for."""
    module, _, cls = DEVICES[name].partition(":")
    found: type[Device] = getattr(import_module(module), cls)
    return found
