"""`pyvirtio serve`: devices for QEMU and others over vhost-user, by QEMU's conventions for such programs."""

import argparse
import json
import os
import select
import signal
import socket
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from pyvirtio.backends.block import BlockBackend
from pyvirtio.cli.devices import device_class
from pyvirtio.cli.options import parse, print_properties, take, take_id, wants_help
from pyvirtio.cli.plug import Drive, make, next_name, open_drives
from pyvirtio.dataplane import IoThread
from pyvirtio.device import Device
from pyvirtio.devices import DEVICES
from pyvirtio.errors import ConfigError
from pyvirtio.properties import bind, properties_of
from pyvirtio.serve.server import Server, inherited, listen
from pyvirtio.spec import DeviceId

ORDERLY = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
BLK_FILE = "blk-file"
"""The id of the drive that --blk-file opens."""
NAMES = {short: short for short in DEVICES}
TYPES = {DeviceId.NET: "net", DeviceId.BLOCK: "block", DeviceId.CONSOLE: "console", DeviceId.ENTROPY: "rng"}
"""What QEMU's vhost-user.json calls the device types."""
FRONT_ENDS = {DeviceId.BLOCK: "vhost-user-blk-pci", DeviceId.ENTROPY: "vhost-user-rng-pci"}
QUEUES = {DeviceId.BLOCK: "num-queues"}
"""The property of QEMU's front-end that must not be more than the device has queues."""

DEVICE_HELP = """\
a device of its own: NAME[,OPTIONS],socket-path=PATH; may be repeated. `NAME,help` lists its properties"""
DRIVE_HELP = "a disk image for drive=ID of a device: file=PATH,id=ID[,format=raw][,readonly=on|off]"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what", nargs="?", metavar="DEVICE[,OPTIONS]", help=f"{', '.join(NAMES)}, FILE.py:CLASS or MODULE:CLASS"
    )
    parser.add_argument("--socket-path", type=Path, metavar="PATH", help="listen at this socket")
    parser.add_argument("--fd", type=int, metavar="N", help="an inherited socket instead, listening or connected")
    parser.add_argument("--num-queues", metavar="N", help="num-queues=N of the device")
    parser.add_argument("--blk-file", metavar="FILE", help="the disk image of a blk device")
    parser.add_argument("--read-only", action="store_true", help="with --blk-file: the guest may not write")
    parser.add_argument("--device", action="append", default=[], metavar="NAME,OPTIONS", help=DEVICE_HELP)
    parser.add_argument("--drive", action="append", default=[], metavar="OPTIONS", help=DRIVE_HELP)
    parser.add_argument("--print-capabilities", action="store_true", help="say as JSON what DEVICE is, and end")
    parser.add_argument("--print-qemu-args", action="store_true", help="print what QEMU needs, and end")


@dataclass
class Order:
    """One device to be served."""

    name: str
    cls: type[Device]
    options: dict[str, str]
    path: Path | None
    fd: int | None = None


def main(args: argparse.Namespace) -> int:
    texts = [*([args.what] if args.what else []), *args.device]
    if not texts:
        raise ConfigError("serve: name a device, such as `blk` or `rng`")
    for text in texts:
        options = parse(text, implied="driver")
        if wants_help(options):
            driver = options["driver"]
            print_properties(driver, properties_of(device_class(driver, NAMES)))
            return 0
    if args.print_capabilities:
        print(json.dumps(_capabilities(device_class(parse(texts[0], implied="driver")["driver"], NAMES)), indent=2))
        return 0
    return _serve(_orders(args), args)


def _capabilities(cls: type[Device]) -> dict[str, object]:
    if cls.id not in TYPES:
        raise ConfigError(f"{cls.__name__}: QEMU has no name for a vhost-user program of device type {cls.id}")
    features = ["read-only", "blk-file"] if cls.id == DeviceId.BLOCK else []
    return {"type": TYPES[DeviceId(cls.id)], "features": features}


def _orders(args: argparse.Namespace) -> list[Order]:
    orders: dict[str, Order] = {}
    if args.what:
        options = parse(args.what, implied="driver")
        if args.num_queues is not None:
            options["num-queues"] = args.num_queues
        if args.blk_file is not None:
            options.setdefault("drive", BLK_FILE)
        if args.socket_path:
            options.setdefault("socket-path", str(args.socket_path))
        _add(orders, options, args.fd)
    for text in args.device:
        _add(orders, parse(text, implied="driver"))
    return list(orders.values())


def _add(orders: dict[str, Order], options: dict[str, str], fd: int | None = None) -> None:
    driver = take(options, "driver", "--device")
    cls = device_class(driver, NAMES)
    name = take_id(options, orders, driver, otherwise=next_name(cls, orders))
    path = options.pop("socket-path", "")
    if bool(path) == (fd is not None):
        raise ConfigError(f"{name}: give its socket, either --socket-path PATH or --fd N")
    orders[name] = Order(name, cls, options, Path(path) if path else None, fd)


def _serve(orders: list[Order], args: argparse.Namespace) -> int:
    with ExitStack() as stack:
        drives = open_drives(_drive_texts(args), stack.callback)
        devices = [(order, _device(order, drives, stack)) for order in orders]
        if args.print_qemu_args:
            print(_qemu_args(devices))
            return 0
        end = _End(stack)
        for order, device in devices:
            iothread = IoThread(order.name)
            stack.callback(iothread.close)
            stack.enter_context(Server(device, order.name, _socket(order, stack), iothread, end.one_less))
        _notify_systemd()
        return end.wait(len(orders))


def _drive_texts(args: argparse.Namespace) -> list[str]:
    if args.blk_file is None:
        return list(args.drive)
    path = str(args.blk_file).replace(",", ",,")
    return [*args.drive, f"file={path},id={BLK_FILE},readonly={'on' if args.read_only else 'off'}"]


def _device(order: Order, drives: dict[str, Drive], stack: ExitStack) -> Device:
    references: dict[type, dict[str, object]] = {BlockBackend: {drive.id: drive.backend for drive in drives.values()}}
    properties = bind(order.cls, order.options, order.name, references)
    device = make(order.cls, properties, order.name, drives)
    stack.callback(device.close)
    return device


def _socket(order: Order, stack: ExitStack) -> socket.socket:
    if order.path is None:
        assert order.fd is not None
        return inherited(order.fd)
    listener = listen(order.path)
    made = order.path.lstat()
    stack.callback(_remove, order.path, made)
    return listener


def _remove(path: Path, made: os.stat_result) -> None:
    """Remove our socket, but no other that has taken its place."""
    try:
        if os.path.samestat(path.lstat(), made):
            path.unlink()
    except FileNotFoundError:
        pass


class _End:
    """Waits for a signal to end, or for the last front-end of inherited connections to go."""

    def __init__(self, stack: ExitStack) -> None:
        self._events = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_SEMAPHORE)
        stack.callback(os.close, self._events)
        self._poll = select.poll()
        self._poll.register(self._events, select.POLLIN)
        self._caught: list[int] = []
        for number in ORDERLY:
            stack.callback(signal.signal, number, signal.signal(number, self._handle))

    def _handle(self, number: int, _: object) -> None:
        self._caught.append(number)
        self.one_less()

    def one_less(self) -> None:
        os.eventfd_write(self._events, 1)

    def wait(self, servers: int) -> int:
        """The exit status: a program that is told to end has succeeded."""
        while servers and not self._caught:
            self._poll.poll()  # unlike a read it goes on after a signal
            os.eventfd_read(self._events)
            servers -= 1
        return 0


def _notify_systemd() -> None:
    """Tell who started us that the sockets are there (sd_notify)."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            notify.connect("\0" + address[1:] if address.startswith("@") else address)
            notify.sendall(b"READY=1")


def _qemu_args(devices: list[tuple[Order, Device]]) -> str:
    """The front-end's side. The guest's memory has to be shared with us."""
    lines = ["-object memory-backend-memfd,id=mem,size=512M,share=on -machine q35,memory-backend=mem -m 512M"]
    for order, device in devices:
        queues = len(device.queues)
        front_end = FRONT_ENDS.get(DeviceId(device.id)) if device.id in set(DeviceId) else None
        if front_end is None:
            front_end = f"vhost-user-device-pci,virtio-id={device.id},num_vqs={queues}"
            front_end += f",config_size={len(device.config_bytes())}"
        elif device.id in QUEUES:
            front_end += f",{QUEUES[DeviceId(device.id)]}={queues}"
        path = str(order.path).replace(",", ",,")
        lines.append(f"-chardev socket,id={order.name},path={path},reconnect=1")
        lines.append(f"-device {front_end},chardev={order.name}")
    return " \\\n    ".join(lines)
