"""The monitor: a few commands to look at a running machine and to switch what may be switched."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from pyvirtio.errors import ConfigError

if TYPE_CHECKING:
    from pyvirtio.dataplane import IoThread
    from pyvirtio.transports.pci import VirtioPci

PROMPT = "(pyvirtio) "
HELP = """\
info devices                    the devices, their slots and what their drivers did
info queues                     per queue: size, how its kicks travel, counters
info faults                     what goes wrong on purpose, and how often it did
set DEVICE.ioeventfd on|off     e.g. set blk0.ioeventfd off
set IOTHREAD.poll-max-ns NUMBER e.g. set io0.poll-max-ns 0
stop, cont                      pause the machine, and let it go on
fault DEVICE:FAULTS             e.g. fault blk0:late=5ms@1%,lost@0.1%; fault blk0:off ends them
snapshot FILE                   write all but the disks to FILE, for `pyvirtio run ... --restore FILE`
help                            this list
quit                            end the machine
"""
COUNTERS = ("notifies", "kicks", "wakeups", "chains", "interrupts", "suppressed")


class Controls(Protocol):
    """What the monitor may do to a machine."""

    devices: list[VirtioPci]
    iothreads: dict[str, IoThread]

    def pause(self) -> None: ...
    def resume(self) -> None: ...
    def quit(self) -> None: ...
    def snapshot(self, path: Path) -> None: ...


class Monitor:
    """Executes a command line. The answer is text for a person, one line for a mistake. Any thread that is no CPU."""

    def __init__(self, machine: Controls) -> None:
        self.machine = machine

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
            case ["snapshot", *_]:
                return self.snapshot(line.split(maxsplit=1)[1:])
            case [command]:
                return self._command(command)
            case [command, *_]:
                return unknown(command)
        raise AssertionError(line)

    def _info(self, what: list[str]) -> str:
        tables = {"devices": self.info_devices, "queues": self.info_queues, "faults": self.info_faults}
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
        rows: list[Sequence[str]] = [("queue", "size", *COUNTERS, "kicks arrive by")]
        for device in self.machine.devices:
            for vq in device.dataplane.queues:
                counters = vq.counters
                numbers = (str(counters[name]) for name in COUNTERS)
                mode = device.dataplane.notifiers.mode(vq.index)
                rows.append((f"{device.name}.{vq.name}", str(vq.size or "-"), *numbers, mode))
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
                return self._set_ioeventfd(device, key, value)
        for iothread in self.machine.iothreads.values():
            if iothread.name == owner:
                return self._set_poll(iothread, key, value)
        known = ", ".join([*(device.name for device in self.machine.devices), *self.machine.iothreads])
        return f"set {name}: no such device or I/O thread; there are: {known}\n"

    def snapshot(self, path: list[str]) -> str:
        if not path:
            return "snapshot: write for example: snapshot /tmp/guest.snapshot\n"
        try:
            self.machine.snapshot(Path(path[0].strip()))
        except OSError as error:
            return f"snapshot {path[0]}: {error.strerror}\n"
        except ConfigError as error:
            return f"{error}\n"
        return ""

    def _set_ioeventfd(self, device: VirtioPci, key: str, value: str) -> str:
        if key.replace("_", "-") != "ioeventfd":
            return f"set {device.name}.{key}: only ioeventfd can be switched while the machine runs\n"
        if value not in ("on", "off"):
            return f"set {device.name}.{key} {value}: allowed are on and off\n"
        device.ioeventfd = value == "on"
        return ""

    def _set_poll(self, iothread: IoThread, key: str, value: str) -> str:
        if key.replace("_", "-") != "poll-max-ns":
            return f"set {iothread.name}.{key}: only poll-max-ns can be changed while the machine runs\n"
        if not value.isdecimal() or int(value) > 10**9:
            return f"set {iothread.name}.{key} {value}: allowed is a number of ns up to 1000000000\n"
        iothread.loop.poll_max_ns = int(value)
        return ""


def unknown(command: str) -> str:
    return f"unknown command {command!r}; known are: info, set, fault, snapshot, stop, cont, help, quit\n"


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
