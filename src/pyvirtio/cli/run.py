"""`pyvirtio run`: boot a kernel or firmware in a virtual machine, with its console on the terminal."""

import argparse
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from pyvirtio.accel.host import linux_capable
from pyvirtio.cli import chardev, faults, netdev, plug
from pyvirtio.cli.outputs import Outputs
from pyvirtio.errors import ConfigError
from pyvirtio.lint import Lint
from pyvirtio.properties import parse_size
from pyvirtio.vmm import snapshot
from pyvirtio.vmm.board import Board, allocate
from pyvirtio.vmm.boot import Kernel, LinuxBoot, read_file
from pyvirtio.vmm.firmware import Firmware
from pyvirtio.vmm.machine import Machine, Outcome, check_cpus
from pyvirtio.vmm.monitor import Monitor
from pyvirtio.vmm.serial import Console

STDIN, STDOUT, STDERR = 0, 1, 2
ORDERLY = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

log = logging.getLogger("pyvirtio")

DRIVE_HELP = """\
a disk image: file=PATH[,id=ID][,format=raw][,readonly=on|off][,locking=on|off][,if=virtio|none]
[,cache=writeback|writethrough|none][,aio=auto|threads|io_uring]. A drive that no --device names
becomes a virtio-blk-pci disk of its own, unless if=none"""
EPILOG = """\
On a terminal: C-a x ends the machine, C-a c switches to the monitor and back, C-a h shows more.
Exit status: 0 after a poweroff or quit, 1 after a crash, 2 for a mistake on the command line, 128 + N after signal N.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    boot = parser.add_argument_group("what to boot")
    boot.add_argument("--kernel", type=Path, metavar="FILE", help="a bzImage, such as /boot/vmlinuz-*")
    boot.add_argument("--initrd", type=Path, metavar="FILE", help="its initial RAM disk")
    boot.add_argument("--append", default="", metavar="TEXT", help="its command line")
    boot.add_argument("--firmware", type=Path, metavar="FILE", help="boot SeaBIOS or the like instead of a kernel")
    board = parser.add_argument_group("the machine")
    board.add_argument("-m", "--memory", type=_memory, default="512M", metavar="SIZE", help="RAM; MiB without a suffix")
    board.add_argument("--smp", type=_cpus, default="1", metavar="N", help="number of CPUs")
    board.add_argument("--drive", action="append", default=[], metavar="OPTIONS", help=DRIVE_HELP)
    board.add_argument("--chardev", action="append", default=[], metavar="NAME,id=ID[,OPTIONS]", help=chardev.HELP)
    board.add_argument("--netdev", action="append", default=[], metavar="KIND,id=ID[,OPTIONS]", help=netdev.HELP)
    board.add_argument(
        "--device", action="append", default=[], metavar="NAME[,OPTIONS]",
        help="a device; `help` lists them, `NAME,help` its properties",
    )  # fmt: skip
    board.add_argument(
        "--object", action="append", default=[], metavar="iothread,id=ID[,OPTIONS]",
        help="an I/O thread that devices can name; `iothread,help` lists its properties",
    )  # fmt: skip
    board.add_argument(
        "--serial", type=_serial, default="stdio", metavar="WHERE", help="stdio (default), null or file:PATH"
    )
    board.add_argument("--debugcon", metavar="FILE", type=Path, help="where firmware writes its log (port 0x402)")
    run = parser.add_argument_group("how to run it")
    run.add_argument(
        "--restore", type=Path, metavar="FILE",
        help="go on from a snapshot (monitor: `snapshot FILE`) of a machine with the same options, in place of booting",
    )  # fmt: skip
    faults.add_argument(run)
    run.add_argument("--no-reboot", action="store_true", help="end when the guest resets itself")
    run.add_argument("--lint", action="store_true", help="report what drivers and devices do against the specification")
    run.add_argument("--dry-run", action="store_true", help="show what would be built, and end")
    run.add_argument("--json", action="store_true", help="with --dry-run: as JSON")


def _memory(text: str) -> int:
    try:
        return parse_size(text, unit="m")
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is not a size such as 512M or 2G") from None


def _cpus(text: str) -> int:
    number = text.removeprefix("cpus=")
    if not number.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is not a number of CPUs")
    return int(number)


def _serial(text: str) -> str:
    if text not in ("stdio", "null") and not re.fullmatch("file:.+", text):
        raise argparse.ArgumentTypeError(f"{text}: allowed are stdio, null and file:PATH")
    return text


def main(args: argparse.Namespace) -> int:
    _fill_standard_fds()
    if plug.show_help(args) or faults.show_help(args):
        return 0
    boot = _read_boot(args)
    chardev.stdio_is_free(args.chardev, args.serial)
    check_cpus(args.smp)
    if args.dry_run:
        with _handling(_leave), _rehearsal(boot, args) as board:
            plug.describe(board, args)
        return 0
    reason = linux_capable()
    if isinstance(boot, LinuxBoot) and reason:
        with _rehearsal(boot, args):  # a mistake in the options comes first
            raise ConfigError(f"{reason}: Linux cannot run here; try `pyvirtio lab -- pyvirtio run ...`")
    with _handling(_leave):
        return _run(boot, args)


def _fill_standard_fds() -> None:
    """Open what the caller closed, or a disk image would get its number, and what is printed."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= max(STDIN, STDOUT, STDERR):
        pass
    os.close(fd)


@contextmanager
def _rehearsal(boot: LinuxBoot | Firmware, args: argparse.Namespace) -> Iterator[Board]:
    """The board with its devices, without KVM; the snapshot would fit."""
    from pyvirtio.accel.inproc import InProcess

    memory = allocate(args.memory)
    with Outputs(rehearsal=True) as outputs, Board(InProcess(memory)) as board:
        plug.plug(board, args, outputs)
        if args.restore:
            snapshot.check(args.restore, snapshot.describe(boot, memory, args.smp, board.devices))
        yield board


def _read_boot(args: argparse.Namespace) -> LinuxBoot | Firmware:
    if args.firmware and not args.kernel:
        return Firmware.read(args.firmware)
    if args.firmware or not args.kernel:
        raise ConfigError("run: give what to boot, either --kernel FILE or --firmware FILE")
    initrd = read_file(args.initrd, "initrd") if args.initrd else b""
    return LinuxBoot(Kernel.read(args.kernel), initrd, args.append.encode(), args.memory)


def _run(boot: LinuxBoot | Firmware, args: argparse.Namespace) -> int:
    with ExitStack() as stack:
        outputs = stack.enter_context(Outputs())
        output = _serial_output(args.serial, outputs, stack)
        debug = _debug_output(args.debugcon, outputs, stack)
        machine = stack.enter_context(
            Machine(boot, memory=args.memory, smp=args.smp, console_fd=output, debug_fd=debug)
        )
        if args.lint:
            machine.virtio_pci = Lint(drivers=args.smp).virtio_pci
        plug.plug(machine, args, outputs)
        if args.restore:
            machine.restore(args.restore)
        caught = stack.enter_context(_quit_on_signals(machine))
        if args.serial == "stdio":
            monitor = Monitor(machine)
            stack.enter_context(Console(machine.serial.receive, monitor.execute, machine.quit, STDIN, STDOUT))
        outputs.kept()
        status = _run_guest(machine, reboot=not args.no_reboot)
        return 128 + caught[0] if caught else status


def _run_guest(machine: Machine, *, reboot: bool) -> int:
    try:
        return 1 if machine.run(reboot=reboot) is Outcome.CRASH else 0
    except (RuntimeError, OSError) as error:  # KVM gave up on the guest
        log.error("%s", error)
        return 1


@contextmanager
def _quit_on_signals(machine: Machine) -> Iterator[list[int]]:
    """End the machine in an orderly way on SIGTERM and the like; the list names those that came."""
    caught: list[int] = []

    def handle(number: int, _: object) -> None:
        caught.append(number)
        machine.quit()

    with _handling(handle):
        yield caught


def _leave(number: int, _: object) -> None:
    """Undo what was built so far, while nothing runs yet."""
    sys.exit(128 + number)


@contextmanager
def _handling(handle: Callable[[int, object], None]) -> Iterator[None]:
    before = {number: signal.signal(number, handle) for number in ORDERLY}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _serial_output(where: str, outputs: Outputs, stack: ExitStack) -> int:
    """The file descriptor that the serial port writes to."""
    if where == "stdio":
        return STDOUT
    path = os.devnull if where == "null" else where.removeprefix("file:")
    return _open_for_writing(Path(path), "serial", outputs, stack)


def _debug_output(path: Path | None, outputs: Outputs, stack: ExitStack) -> int | None:
    return None if path is None else _open_for_writing(path, "debugcon", outputs, stack)


def _open_for_writing(path: Path, what: str, outputs: Outputs, stack: ExitStack) -> int:
    try:
        file = stack.enter_context(outputs.path(path).open("wb", buffering=0))
    except OSError as error:
        raise ConfigError(f"{what} {path}: {error.strerror}") from None
    return file.fileno()
