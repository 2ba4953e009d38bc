"""The monitor: a few commands to look at a running machine and to switch what may be switched."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from pyvirtio.devices.balloon import PAGE, Balloon
from pyvirtio.devices.blk import Blk
from pyvirtio.devices.net import Net
from pyvirtio.errors import ConfigError
from pyvirtio.properties import parse_size
from pyvirtio.vmm.layout import MIB

if TYPE_CHECKING:
    from pyvirtio.dataplane import IoThread
    from pyvirtio.device import Device
    from pyvirtio.transports.base import Accelerator
    from pyvirtio.transports.pci import VirtioPci

PROMPT = "(pyvirtio) "
HELP = """\
info devices                    the devices, their slots and what their drivers did
info queues                     per queue: size, how its kicks travel, counters
info network                    network devices: link, frames in both directions, why frames were dropped
info faults                     what goes wrong on purpose, and how often it did
info balloon                    how much memory the guest has, and what it says of it
set DEVICE.ioeventfd on|off     e.g. set blk0.ioeventfd off
set DEVICE.vhost on|off         lend the queues of a network device to the kernel, or take them back
set IOTHREAD.poll-max-ns NUMBER e.g. set io0.poll-max-ns 0
balloon MIB                     ask the guest to get by with so much memory
block_resize DEVICE SIZE        give a disk another size, e.g. block_resize blk0 2G
set_link DEVICE on|off          plug in, or pull, the cable of a network device
stop, cont                      pause the machine, and let it go on
fault DEVICE:FAULTS             e.g. fault blk0:late=5ms@1%,lost@0.1%; fault blk0:off ends them
snapshot FILE                   write all but the disks to FILE, for `pyvirtio run ... --restore FILE`
help                            this list
quit                            end the machine
"""
KNOWN = ("info", "set", "fault", "balloon", "block_resize", "set_link", "snapshot", "stop", "cont", "help", "quit")
STATS_SECONDS = 1.0
"""How long a guest may take to answer `info balloon`."""
COUNTERS = ("notifies", "kicks", "wakeups", "answers", "chains", "interrupts", "suppressed")


class Controls(Protocol):
    """What the monitor may do to a machine."""

    devices: list[VirtioPci]
    iothreads: dict[str, IoThread]
    accel: Accelerator

    def pause(self) -> None: ...
    def resume(self) -> None: ...
    def quit(self) -> None: ...
    def snapshot(self, path: Path) -> None: ...


class Monitor:
    """Executes a command line. The answer is text for a person, one line for a mistake. Any thread that is no CPU."""

    def __init__(self, machine: Controls) -> None:
        self.machine = machine
        self._changes: dict[str, tuple[Callable[..., None], str]] = {
            "balloon": (self.balloon, "balloon 256"),
            "block_resize": (self.block_resize, "block_resize blk0 2G"),
            "set_link": (self.set_link, "set_link net0 off"),
            "snapshot": (self.snapshot, "snapshot /tmp/guest.snapshot"),
        }
        """What each calls with its words, and an example."""

    def execute(self, line: str) -> str:
        match line.split():
            case []:
                return ""
            case ["info", *what]:
                return self._info(what)
            case ["set", name, value]:
                return self.set(name, value)
            case ["set", *_]:
                return "set: write for example: set blk0.ioeventfd off\n"
            case ["fault", text]:
                return self.fault(text)
            case ["fault", *_]:
                return "fault: write for example: fault blk0:late=5ms@1%\n"
            case [command, *_] if command in self._changes:
                return self._change(command, line)
            case [command]:
                return self._command(command)
            case [command, *_]:
                return unknown(command)
        raise AssertionError(line)

    def _change(self, command: str, line: str) -> str:
        """A command that changes something, or says in one line why not. The last word may have spaces in it."""
        call, example = self._changes[command]
        words = line.strip().split(maxsplit=example.count(" "))
        if len(words) <= example.count(" "):
            return f"{command}: write for example: {example}\n"
        try:
            call(*words[1:])
        except ConfigError as error:
            return f"{command}: {error}\n"
        except OSError as error:
            return f"{command}: {error.strerror}\n"
        return ""

    def _info(self, what: list[str]) -> str:
        tables = {
            "devices": self.info_devices,
            "queues": self.info_queues,
            "network": self.info_network,
            "faults": self.info_faults,
            "balloon": self.info_balloon,
        }
        if len(what) != 1 or what[0] not in tables:
            return f"info: known are: {', '.join(tables)}\n"
        return tables[what[0]]()

    def _command(self, command: str) -> str:
        commands = {"stop": self.machine.pause, "cont": self.machine.resume, "quit": self.machine.quit}
        if command == "help":
            return HELP
        if command not in commands:
            return unknown(command)
        commands[command]()
        return ""

    def info_devices(self) -> str:
        rows = [("device", "slot", "type", "status", "interrupts", "ioeventfd")]
        for device in self.machine.devices:
            kind = type(device.device).__name__.lower()
            ioeventfd = "on" if device.ioeventfd else "off"
            rows.append((device.name, str(device.slot), kind, status_text(device), interrupts(device), ioeventfd))
        return format_table(rows)

    def info_queues(self) -> str:
        rows: list[Sequence[str]] = [("queue", "size", *COUNTERS, "in flight", "kicks arrive by")]
        for device in self.machine.devices:
            for vq in device.dataplane.queues:
                counters = vq.counters
                numbers = (str(counters[name]) for name in COUNTERS)
                mode = device.dataplane.notifiers.mode(vq.index)
                rows.append((f"{device.name}.{vq.name}", str(vq.size or "-"), *numbers, str(vq.in_flight), mode))
        return format_table(rows)

    def info_network(self) -> str:
        rows: list[Sequence[str]] = [("device", "address", "link", "sent", "bytes", "received", "bytes", "dropped")]
        for device in self.machine.devices:
            if isinstance(net := device.device, Net):
                counters = net.plane.counters
                passed = (str(counters[name]) for name in ("tx_frames", "tx_bytes", "rx_frames", "rx_bytes"))
                rows.append(
                    (device.name, net.mac.hex(":"), "up" if net.link_up else "down", *passed, dropped(counters))
                )
        return format_table(rows)

    def info_faults(self) -> str:
        rows = [("device", "fault", "times", "seed")]
        for device in self.machine.devices:
            if faults := device.device.active_faults:
                rows += [(device.name, str(fault), str(fault.hits), str(faults.seed)) for fault in faults]
        return format_table(rows)

    def fault(self, text: str) -> str:
        from pyvirtio.faults.options import switch

        try:
            switch({device.name: device.device for device in self.machine.devices}, text)
        except ConfigError as error:
            return f"{error}\n"
        return ""

    def set(self, name: str, value: str) -> str:
        owner, _, key = name.rpartition(".")
        for device in self.machine.devices:
            if device.name == owner:
                return self._set_device(device, key, value)
        for iothread in self.machine.iothreads.values():
            if iothread.name == owner:
                return self._set_poll(iothread, key, value)
        known = ", ".join([*(device.name for device in self.machine.devices), *self.machine.iothreads])
        return f"set {name}: no such device or I/O thread; there are: {known}\n"

    def snapshot(self, path: str) -> None:
        self.machine.snapshot(Path(path))

    def info_balloon(self) -> str:
        try:
            balloon = self._balloon()
        except ConfigError as error:
            return f"info balloon: {error}\n"
        rows = [(name, str(value)) for name, value in balloon.ask_stats(STATS_SECONDS).items()]
        actual = self._memory() - balloon.actual * PAGE
        return f"balloon: actual={actual // MIB}\n" + (format_table(rows) if rows else "")

    def balloon(self, mib: str) -> None:
        """The guest gives up what it has more than `mib`, as soon as it can."""
        memory = self._memory()
        if not mib.isdecimal() or not 1 <= int(mib) <= memory // MIB:
            raise ConfigError(f"{mib} is not allowed: MiB from 1 to {memory // MIB}, all that the guest has")
        self._balloon().target = (memory - int(mib) * MIB) // PAGE

    def block_resize(self, name: str, size: str) -> None:
        device = self._device(name)
        if not isinstance(device, Blk):
            raise ConfigError(f"{name} is no disk")
        try:
            capacity = parse_size(size, unit="m")
        except ValueError:
            raise ConfigError(f"{size} is not a size such as 512M or 2G") from None
        device.resize(capacity)

    def set_link(self, name: str, value: str) -> None:
        set_link = getattr(self._device(name), "set_link", None)
        if set_link is None:
            raise ConfigError(f"{name} is no network device")
        if value not in ("on", "off"):
            raise ConfigError(f"{value} is not allowed: on or off")
        set_link(value == "on")

    def _device(self, name: str) -> Device:
        for function in self.machine.devices:
            if function.name == name:
                return function.device
        raise ConfigError(f"no device {name}; there are: {', '.join(f.name for f in self.machine.devices)}")

    def _balloon(self) -> Balloon:
        for function in self.machine.devices:
            if isinstance(function.device, Balloon):
                return function.device
        raise ConfigError("the machine has no virtio-balloon-pci")

    def _memory(self) -> int:
        return sum(size for _, size, _, _ in self.machine.accel.memory.regions)

    def _set_device(self, device: VirtioPci, key: str, value: str) -> str:
        known = ["ioeventfd", "vhost"] if device.vhost else ["ioeventfd"]
        if key.replace("_", "-") not in known:
            return f"set {device.name}.{key}: only {' and '.join(known)} can be switched while the machine runs\n"
        if value not in ("on", "off"):
            return f"set {device.name}.{key} {value}: allowed are on and off\n"
        try:
            if key == "vhost" and device.vhost:
                device.vhost.enabled = value == "on"
            else:
                device.ioeventfd = value == "on"
        except OSError as error:
            return f"set {device.name}.{key} {value}: {error.strerror}\n"
        return ""

    def _set_poll(self, iothread: IoThread, key: str, value: str) -> str:
        if key.replace("_", "-") != "poll-max-ns":
            return f"set {iothread.name}.{key}: only poll-max-ns can be changed while the machine runs\n"
        if not value.isdecimal() or int(value) > 10**9:
            return f"set {iothread.name}.{key} {value}: allowed is a number of ns up to 1000000000\n"
        iothread.loop.poll_max_ns = int(value)
        return ""


def unknown(command: str) -> str:
    return f"unknown command {command!r}; known are: {', '.join(KNOWN)}\n"


def dropped(counters: Mapping[str, int]) -> str:
    """How many frames were dropped for each reason, as "2 rx_length"."""
    found = [
        f"{count} {name.replace('_dropped', '')}" for name, count in counters.items() if "_dropped" in name and count
    ]
    return ", ".join(found) or "-"


def status_text(device: VirtioPci) -> str:
    """The driver's status bits by name, or "-" while there is no driver."""
    return "+".join(bit.name or "" for bit in device.driver.status) or "-"


def interrupts(device: VirtioPci) -> str:
    if device.msix is not None and device.msix.enabled:
        return f"msi-x ({device.msix.count})"
    return "intx"


class LineEditor:
    """Puts keys together to lines and shows the answers. Backspace and Ctrl-U work, other control keys are ignored."""

    BACKSPACE, CTRL_U = (0x08, 0x7F), 0x15

    def __init__(self, execute: Callable[[str], str], show: Callable[[str], object]) -> None:
        self.execute = execute
        self.show = show
        self._line = ""

    def feed(self, byte: int) -> None:
        if byte in b"\r\n":
            line, self._line = self._line, ""
            self.show("\n" + self.execute(line) + PROMPT)
        elif byte in self.BACKSPACE:
            self._erase(self._line[-1:])
        elif byte == self.CTRL_U:
            self._erase(self._line)
        elif 0x20 <= byte < 0x7F:
            self._line += chr(byte)
            self.show(chr(byte))

    def _erase(self, tail: str) -> None:
        self._line = self._line[: len(self._line) - len(tail)]
        self.show("\b \b" * len(tail))


def format_table(rows: Iterable[Sequence[str]]) -> str:
    """Columns as wide as they have to be, two spaces apart."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "".join(line.rstrip() + "\n" for line in lines)
