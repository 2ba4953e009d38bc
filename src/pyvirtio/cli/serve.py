"""`pyvirtio serve`: devices for QEMU and others over vhost-user, by QEMU's conventions for such programs."""

import argparse
import json
import logging
import os
import select
import signal
import socket
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyvirtio.cli import chardev, faults, netdev
from pyvirtio.cli.devices import device_class, print_devices
from pyvirtio.cli.drives import Drive, open_drives
from pyvirtio.cli.drives import show_help as show_drive_help
from pyvirtio.cli.front_ends import Served, capabilities, libvirt_xml, qemu_args
from pyvirtio.cli.netdev import Netdev
from pyvirtio.cli.options import parse, print_properties, take, take_id, wants_help
from pyvirtio.cli.outputs import Outputs
from pyvirtio.cli.plug import Backends, make, next_name
from pyvirtio.dataplane import IoThread, declared_queues
from pyvirtio.device import Device
from pyvirtio.devices import DEVICES
from pyvirtio.errors import ConfigError
from pyvirtio.lint import Lint
from pyvirtio.properties import bind, bind_each, properties_of
from pyvirtio.serve import sandbox
from pyvirtio.serve.backend import MAX_VRINGS
from pyvirtio.serve.server import Server, inherited, listen
from pyvirtio.serve.vhost_user import SPLIT_RINGS, Rings

ORDERLY = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
BLK_FILE = "blk-file"
"""The id of the drive that --blk-file opens."""
NAMES = {short: short for short in DEVICES}
CONFINED = tuple(f"pyvirtio.backends.{name}" for name in ("block", "nbd", "net", "tap"))
"""The modules of backends that open nothing once they are made."""
FIRST_FD = 3
"""Where systemd puts the sockets that it passes (sd_listen_fds)."""

MAX_IOTHREADS = 256
IOTHREADS_HELP = """\
N I/O threads for all devices, to which the queues of a disk are dealt out; otherwise each device has one of its own"""
SANDBOX_HELP = """\
give up, once all is open, what serving does not need: files, programs, connections. The default is on, but off for
classes of your own, chardevs and drives that may need them later"""
DEVICE_HELP = """\
a device of its own: NAME[,OPTIONS],socket-path=PATH; may be repeated. `help` lists them, `NAME,help` its properties"""
DRIVE_HELP = (
    "a disk image for drive=ID of a device: file=PATH,id=ID[,format=raw][,readonly=on|off][,locking=on|off]"
    "[,cache=writeback|writethrough|none][,aio=auto|threads|io_uring]"
)

log = logging.getLogger("pyvirtio")


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
    parser.add_argument("--iothreads", type=_count, metavar="N", help=IOTHREADS_HELP)
    parser.add_argument("--poll-max-ns", metavar="NS", help="longest busy wait of an I/O thread; 0 = none")
    parser.add_argument("--sandbox", choices=("on", "off"), help=SANDBOX_HELP)
    faults.add_argument(parser)
    parser.add_argument("--netdev", action="append", default=[], metavar="KIND,id=ID[,OPTIONS]", help=netdev.HELP)
    parser.add_argument("--chardev", action="append", default=[], metavar="NAME,id=ID[,OPTIONS]", help=chardev.HELP)
    parser.add_argument("--lint", action="store_true", help="report what drivers do against the specification")
    parser.add_argument("--print-capabilities", action="store_true", help="say as JSON what DEVICE is, and end")
    printed = parser.add_mutually_exclusive_group()
    printed.add_argument("--print-qemu-args", action="store_true", help="print what QEMU needs, and end")
    printed.add_argument("--print-libvirt-xml", action="store_true", help="print what a libvirt domain needs, and end")


def _count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= MAX_IOTHREADS:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed: 1 to {MAX_IOTHREADS}")
    return int(text)


@dataclass
class Order:
    """One device to be served."""

    name: str
    cls: type[Device]
    options: dict[str, str]
    path: Path | None
    fd: int | None = None
    rings: Rings = SPLIT_RINGS


def main(args: argparse.Namespace) -> int:
    if chardev.show_help(args.chardev):
        return 0
    texts = [*([args.what] if args.what else []), *args.device]
    if faults.show_help(args) or show_drive_help(args.drive) or netdev.show_help(args.netdev):
        return 0
    if not texts:
        raise ConfigError("serve: name a device, such as `blk` or `rng`")
    if any(_show_help(parse(text, implied="driver")) for text in texts):
        return 0
    _check(args)
    if args.print_capabilities:
        print(json.dumps(capabilities(device_class(parse(texts[0], implied="driver")["driver"], NAMES)), indent=2))
        return 0
    return _serve(_orders(args), args)


def _show_help(options: dict[str, str]) -> bool:
    if not wants_help(options):
        return False
    driver = options["driver"]
    if driver in ("help", "?"):
        print_devices(NAMES)
    else:
        print_properties(driver, [*properties_of(device_class(driver, NAMES)), *properties_of(Rings)])
    return True


def _check(args: argparse.Namespace) -> None:
    """ConfigError for an option that nothing here would heed."""
    if not args.what:
        for option in ("socket_path", "fd", "num_queues", "blk_file"):
            if getattr(args, option) is not None:
                raise ConfigError(f"serve: --{option.replace('_', '-')} is for a DEVICE that is named without --device")
    if args.read_only and args.blk_file is None:
        raise ConfigError("serve: --read-only is for --blk-file; a --drive takes readonly=on")


def _orders(args: argparse.Namespace) -> list[Order]:
    orders: dict[str, Order] = {}
    passed = _passed_by_systemd()
    if args.what:
        options = parse(args.what, implied="driver")
        if args.num_queues is not None:
            options["num-queues"] = args.num_queues
            _check_takes(options["driver"], "num-queues", "--num-queues")
        if args.blk_file is not None:
            options.setdefault("drive", BLK_FILE)
            _check_takes(options["driver"], "drive", "--blk-file")
        if args.socket_path:
            options.setdefault("socket-path", str(args.socket_path))
        _add(orders, options, args.fd, passed=passed)
    for text in args.device:
        _add(orders, parse(text, implied="driver"), passed=passed)
    if passed:
        raise ConfigError(f"systemd passes {len(passed)} sockets more than there are devices without one")
    return list(orders.values())


def _check_takes(driver: str, name: str, option: str) -> None:
    if name not in {p.name for p in properties_of(device_class(driver, NAMES))}:
        raise ConfigError(f"serve: {option} is for a device with the property {name!r}, which {driver} has not")


def _passed_by_systemd() -> list[int]:
    """The sockets that systemd has opened for this process, in the order of its unit file (sd_listen_fds)."""
    if os.environ.pop("LISTEN_PID", "") != str(os.getpid()):
        return []
    return [FIRST_FD + n for n in range(int(os.environ.pop("LISTEN_FDS", "0")))]


def _add(orders: dict[str, Order], options: dict[str, str], fd: int | None = None, *, passed: list[int]) -> None:
    driver = take(options, "driver", "--device")
    cls = device_class(driver, NAMES)
    name = take_id(options, orders, driver, otherwise=next_name(cls, orders))
    path = options.pop("socket-path", "")
    if not path and fd is None and passed:
        fd = passed.pop(0)
    if bool(path) == (fd is not None):
        raise ConfigError(f"{name}: give its socket, either --socket-path PATH or --fd N")
    orders[name] = Order(name, cls, options, Path(path) if path else None, fd)


def _serve(orders: list[Order], args: argparse.Namespace) -> int:
    with ExitStack() as stack:
        outputs = stack.enter_context(Outputs(rehearsal=args.print_qemu_args or args.print_libvirt_xml))
        backends = Backends(
            open_drives(_drive_texts(args), stack.callback),
            netdev.open_netdevs(args.netdev, outputs, stack.callback),
            chardev.open_chardevs(args.chardev, outputs, stack.callback),
        )
        for network in backends.netdevs.values():
            if network.backend.vhost_fds:
                raise ConfigError(f"{network.id}: vhost=on: the queues of a served device are its front-end's to lend")
        devices = [_device(order, backends, stack) for order in orders]
        if args.print_qemu_args or args.print_libvirt_xml:
            served = [_served(order, device) for order, device in zip(orders, devices, strict=True)]
            print(qemu_args(served) if args.print_qemu_args else libvirt_xml(served))
            return 0
        poll = {} if args.poll_max_ns is None else {"poll_max_ns": args.poll_max_ns}
        polling = bind(IoThread, poll, "serve", given=("name",))
        faults.switch_on({order.name: device for order, device in zip(orders, devices, strict=True)}, args)
        end = _End(stack)
        sockets = [_socket(order, stack) for order in orders]
        systemd = _notify_socket(stack)
        by_default = "on" if _opens_nothing_later(orders, backends) else "off"
        _enter_sandbox(orders, (args.sandbox or by_default) == "on")
        shared = [_iothread(f"iothread{n}", polling, stack) for n in range(args.iothreads or 0)]
        lint = Lint()
        for order, device, sock in zip(orders, devices, sockets, strict=True):
            iothreads = shared or [_iothread(order.name, polling, stack)]
            if args.lint:
                lint.watch(device, order.name)
            stack.enter_context(Server(device, order.name, sock, iothreads, end.one_less, rings=order.rings))
            shared = shared[1:] + shared[:1]  # the next device begins with the next thread
        outputs.kept()
        if systemd:
            systemd.sendall(b"READY=1")
        return end.wait(len(orders))


def _served(order: Order, device: Device) -> Served:
    if order.path is None:
        raise ConfigError(f"{order.name}: what a front-end needs can be printed with --socket-path only")
    return Served(order.name, order.path.absolute(), device, order.rings)


def _iothread(name: str, polling: dict[str, Any], stack: ExitStack) -> IoThread:
    iothread = IoThread(name, **polling)
    stack.callback(iothread.close)
    return iothread


def _opens_nothing_later(orders: list[Order], backends: Backends) -> bool:
    """Whether all of it is ours, and needs no file, program or connection once it is made."""
    devices = all(order.cls.__module__.startswith("pyvirtio.") for order in orders)
    used: list[Drive | Netdev] = [*backends.drives.values(), *backends.netdevs.values()]
    return devices and all(type(each.backend).__module__ in CONFINED for each in used) and not backends.chardevs


def _enter_sandbox(orders: list[Order], wanted: bool) -> None:
    if wanted:
        for missing in sandbox.enter(order.path for order in orders if order.path):
            log.warning("sandbox: %s", missing)


def _drive_texts(args: argparse.Namespace) -> list[str]:
    if args.blk_file is None:
        return list(args.drive)
    path = str(args.blk_file).replace(",", ",,")
    return [*args.drive, f"file={path},id={BLK_FILE},readonly={'on' if args.read_only else 'off'}"]


def _device(order: Order, backends: Backends, stack: ExitStack) -> Device:
    properties, rings = bind_each((order.cls, Rings), order.options, order.name, backends.references)
    order.rings = Rings(**rings)
    device = make(order.cls, properties, order.name, [*backends.drives.values(), *backends.netdevs.values()])
    stack.callback(device.close)
    device.name = order.name
    declared_queues(device, MAX_VRINGS)
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


def _notify_socket(stack: ExitStack) -> socket.socket | None:
    """Where whoever started us wants to know when the sockets are there (sd_notify). Opened before the sandbox."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return None
    notify = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
    notify.connect("\0" + address[1:] if address.startswith("@") else address)
    return notify
