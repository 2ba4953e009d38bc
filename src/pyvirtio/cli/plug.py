"""From `--object`, `--drive` and `--device` to a board with its devices, and the description of one."""

import argparse
import json
import logging
from collections import Counter
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pyvirtio.backends.block import BlockBackend
from pyvirtio.backends.chardev import Chardev
from pyvirtio.backends.net import NetBackend
from pyvirtio.cli import chardev, classes, faults, netdev
from pyvirtio.cli.devices import GIVEN, device_class, print_device, print_devices
from pyvirtio.cli.drives import Drive, open_drives
from pyvirtio.cli.drives import show_help as show_drive_help
from pyvirtio.cli.netdev import Netdev
from pyvirtio.cli.options import parse, print_properties, print_table, take, take_id, wants_help
from pyvirtio.cli.outputs import Outputs
from pyvirtio.dataplane import IoThread
from pyvirtio.device import Device
from pyvirtio.errors import ConfigError
from pyvirtio.properties import bind, bind_each, properties_of, show_size, unknown
from pyvirtio.transports.pci import VirtioPci
from pyvirtio.transports.pci_config import Bar, BarKind
from pyvirtio.vmm.board import Board

DISK = "virtio-blk-pci"

log = logging.getLogger("pyvirtio")


@dataclass
class Backends:
    """What devices can name, by id."""

    drives: dict[str, Drive]
    netdevs: dict[str, Netdev]
    chardevs: dict[str, Chardev]

    @property
    def references(self) -> dict[type, Mapping[str, object]]:
        return {
            BlockBackend: {name: drive.backend for name, drive in self.drives.items()},
            NetBackend: {name: network.backend for name, network in self.netdevs.items()},
            Chardev: self.chardevs,
        }


def show_help(args: argparse.Namespace) -> bool:
    """Print the tables that the options ask for with `help`; whether there were any."""
    asked = chardev.show_help(args.chardev)
    asked = show_drive_help(args.drive) or asked
    for text in args.device:
        options = parse(text, implied="driver")
        if wants_help(options):
            asked = True
            driver = options.get("driver", "help")
            print_devices() if driver in ("help", "?") else print_device(driver)
    for text in args.object:
        if wants_help(parse(text, implied="qom-type")):
            asked = True
            print_properties("--object iothread", properties_of(IoThread, ("name",)))
    return netdev.show_help(args.netdev) or asked


def plug(board: Board, args: argparse.Namespace, outputs: Outputs) -> None:
    """Add to the board everything that the options name; it closes it all."""
    for text in args.object:
        _add_iothread(board, parse(text, implied="qom-type"))
    backends = Backends(
        open_drives(args.drive, board.on_close),
        netdev.open_netdevs(args.netdev, outputs, board.on_close),
        chardev.open_chardevs(args.chardev, outputs, board.on_close),
    )
    for text in args.device:
        _add_device(board, backends, parse(text, implied="driver"))
    for drive in backends.drives.values():
        if drive.used_by is None and drive.on_its_own:
            _add_device(board, backends, {"driver": DISK, "drive": drive.id})
    for network in backends.netdevs.values():
        if network.used_by is None:
            log.warning("%s: no device is on this network; give one netdev=%s", network.id, network.id)
    faults.switch_on({function.name: function.device for function in board.devices}, args)


def _add_iothread(board: Board, options: dict[str, str]) -> None:
    kind = take(options, "qom-type", "--object")
    if kind != "iothread":
        raise ConfigError(unknown("--object", "type", kind, ["iothread"]))
    name = take_id(options, board.iothreads, "--object iothread")
    board.add_iothread(name, **bind(IoThread, options, name, given=("name",)))


def _add_device(board: Board, backends: Backends, options: dict[str, str]) -> None:
    driver = take(options, "driver", "--device")
    cls = device_class(driver)
    taken = {function.name: function for function in board.devices}
    name = take_id(options, taken, driver, otherwise=next_name(cls, taken))
    if "slot" not in options:
        options["slot"] = str(board.free_slot(name))
    if {"iothread", "iothread-vq-mapping"} <= options.keys():
        raise ConfigError(f"{name}: give either iothread= or iothread-vq-mapping=")
    options.setdefault("iothread", board.iothread.name)
    own, pci = bind_each((cls, VirtioPci), options, name, backends.references | {IoThread: board.iothreads}, GIVEN)
    board.add(make(cls, own, name, [*backends.drives.values(), *backends.netdevs.values()]), name, **pci)


def make(cls: type[Device], properties: dict[str, object], name: str, backends: Iterable[Drive | Netdev]) -> Device:
    """The device; each backend may belong to one only."""
    for each in backends:
        if each.backend in properties.values():
            if each.used_by:
                raise ConfigError(f"{name}: {each.option}={each.id} is in use by {each.used_by}")
            each.used_by = name
    device: Device = classes.make(cls, properties, name)
    return device


def next_name(cls: type[Device], taken: Container[str]) -> str:
    """blk0, blk1, ... as messages and the monitor call devices without an id."""
    kind, number = cls.__name__.lower(), 0
    while f"{kind}{number}" in taken:
        number += 1
    return f"{kind}{number}"


def describe(board: Board, args: argparse.Namespace) -> None:
    """What `--dry-run` prints: the machine, its devices and where they are."""
    board.pci.assign_bars()
    devices = [_description(function) for function in board.devices]
    boots = str(args.kernel or args.firmware)
    if args.json:
        machine = {"boots": boots, "memory": args.memory, "cpus": args.smp, "iothreads": [*board.iothreads]}
        print(json.dumps({**machine, "devices": devices}, indent=2))
        return
    cpus = "1 CPU" if args.smp == 1 else f"{args.smp} CPUs"
    print(f"{boots}: {cpus}, {show_size(args.memory)} of memory; I/O threads: {', '.join(board.iothreads) or 'none'}")
    columns = ("device", "slot", "type", "queues", "vectors", "ioeventfd", "iothread", "backend")
    print_table("devices", columns, [[_cell(device[column]) for column in columns] for device in devices])
    rows = [(device["device"], *map(str, bar.values())) for device in devices for bar in device["bars"]]
    print_table("BARs", ("device", "bar", "space", "address", "size"), rows)


def _description(function: VirtioPci) -> dict[str, Any]:
    dataplane = function.dataplane
    return {
        "device": function.name,
        "slot": function.slot,
        "type": type(function.device).__name__,
        "queues": {vq.name: vq.max_size for vq in dataplane.queues},
        "vectors": function.msix.count if function.msix else 0,
        "ioeventfd": function.ioeventfd,
        "iothread": ", ".join(dict.fromkeys(iothread.name for iothread in dataplane.iothreads)),
        "backend": _backend_text(function.device),
        "bars": [_bar_description(function, bar) for bar in function.bars],
    }


def _backend_text(device: Device) -> str | None:
    """Of its drive or its network."""
    backend = getattr(device, "drive", None)
    if backend is None:
        network = getattr(device, "netdev", None)
        return network and str(network)
    what = getattr(backend, "path", type(backend).__name__)
    return f"{what} ({show_size(backend.capacity)}{', read-only' if backend.readonly else ''})"


def _bar_description(function: VirtioPci, bar: Bar) -> dict[str, Any]:
    space = "I/O" if bar.kind is BarKind.IO else "memory"
    return {"bar": bar.index, "space": space, "address": f"{function.bar_address(bar):#x}", "size": show_size(bar.size)}


def _cell(value: object) -> str:
    if isinstance(value, dict):
        sizes = Counter(value.values())
        return ", ".join(str(size) if count == 1 else f"{count} x {size}" for size, count in sizes.items())
    if isinstance(value, bool):
        return "on" if value else "off"
    return "-" if value is None else str(value)
