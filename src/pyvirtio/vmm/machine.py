"""A virtual machine on `/dev/kvm`: CPUs and the chips around them, from the first boot to the last."""

import logging
import os
import threading
from collections.abc import Iterator
from enum import Enum, auto
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from pyvirtio import _core
from pyvirtio._core import Vcpu
from pyvirtio.accel.kvm import Kvm
from pyvirtio.errors import ConfigError
from pyvirtio.vmm import acpi, layout, platform, snapshot
from pyvirtio.vmm.board import Board, allocate
from pyvirtio.vmm.boot import LinuxBoot
from pyvirtio.vmm.bus import SystemBus
from pyvirtio.vmm.firmware import Firmware

MAX_CPUS = 128
STDOUT = 1

log = logging.getLogger("pyvirtio")


class Outcome(Enum):
    """Why the guest stopped running."""

    POWEROFF = auto()
    RESET = auto()
    CRASH = auto()
    """A triple fault. Without `reboot` this is the end, otherwise it is a reset, as on hardware."""
    QUIT = auto()
    """Somebody called `quit`."""


def check_cpus(count: int) -> None:
    if not 1 <= count <= MAX_CPUS:
        raise ConfigError(f"smp {count}: allowed are 1 to {MAX_CPUS} CPUs")


class Machine(Board):
    """A VM that boots `boot`, a kernel or firmware; its serial port writes to `console_fd`.

    `memory` is in bytes. Add devices, then call `run`. `quit` may be called from any thread and from signal
    handlers, `pause`, `resume` and `snapshot` from any thread that is no CPU; everything else belongs to one thread.
    """

    def __init__(
        self,
        boot: LinuxBoot | Firmware,
        *,
        memory: int,
        smp: int = 1,
        console_fd: int = STDOUT,
        debug_fd: int | None = None,
    ) -> None:
        check_cpus(smp)
        self._kvm = Kvm(allocate(memory))
        super().__init__(self._kvm)
        self.boot = boot
        self.smp = smp
        self.vm = self._kvm.vm
        self.memory = self._kvm.memory
        self.serial = _core.Serial(self.vm.irq_line(layout.COM1_IRQ), console_fd)
        self.vm.attach_serial(self.serial, layout.COM1_PORT)
        self.power = platform.PowerManagement(lambda: self._end(Outcome.POWEROFF))
        self.cmos = platform.Cmos(platform.firmware_settings(memory, smp))
        self._chips: list[platform.PortDevice] = [self.power, self.cmos, *self._make_chips(debug_fd)]
        if isinstance(boot, Firmware):
            self.vm.add_rom(boot.address, boot.image)
        self._vcpus = self._make_cpus()
        self.on_close(self._release)
        self._threads: list[threading.Thread] = []
        self._running = self._paused = self._ending = self._restored = False
        self._lock = threading.Lock()
        self._events: SimpleQueue[Outcome | BaseException] = SimpleQueue()

    def _make_chips(self, debug_fd: int | None) -> Iterator[platform.PortDevice]:
        yield platform.ResetControl(lambda: self._end(Outcome.RESET))
        yield platform.SystemControlB()
        if debug_fd is not None:
            yield platform.DebugPort(lambda data: os.write(debug_fd, data))

    def _make_cpus(self) -> list[Vcpu]:
        try:
            vcpus = [self.vm.create_vcpu(index) for index in range(self.smp)]
            for vcpu in vcpus:
                vcpu.set_cpuid(self.smp)
        except OSError as error:
            raise ConfigError(f"smp {self.smp}: this KVM refuses: {error.strerror}") from error
        return vcpus

    def add_chip(self, chip: platform.PortDevice) -> None:
        """Let `chip` answer its ports; before `run`. Its methods are called on the vCPU threads."""
        self._chips.append(chip)

    def run(self, *, reboot: bool = True) -> Outcome:
        """Run the guest until it powers off, or `quit`; with `reboot`, through any number of resets.

        An error on a vCPU thread is raised here. The guest is stopped when this returns.
        """
        self._bus = SystemBus(self.pci, self._chips)
        if not self._restored:
            self.pci.assign_bars()
            self._load()
        while True:
            outcome = self._run_once()
            if outcome is Outcome.CRASH:
                log.warning("the guest crashed (triple fault)")
            if outcome in (Outcome.POWEROFF, Outcome.QUIT) or not reboot:
                return outcome
            with self._lock:
                self._reset()
                self._load()

    def quit(self) -> None:
        """Make `run` return `QUIT` soon."""
        self._end(Outcome.QUIT)

    def _end(self, event: Outcome | BaseException) -> None:
        self._ending = True
        self._events.put(event)

    def pause(self) -> None:
        """Stop the CPUs, then the notifiers: no request is taken until `resume`; those under way may complete."""
        with self._lock:
            self._pause()

    def _pause(self) -> None:
        if not self._paused:
            self._paused = True
            self._stop_cpus()
            for function in self.devices:
                function.dataplane.notifiers.hold()

    def resume(self) -> None:
        """Go on after `pause`."""
        with self._lock:
            self._resume()

    def _resume(self) -> None:
        if self._paused:
            self._paused = False
            for function in self.devices:
                function.dataplane.notifiers.unhold()
            for vcpu in self._vcpus:
                vcpu.kvmclock_ctrl()
            if self._running:
                self._start_cpus()

    def snapshot(self, path: Path) -> None:
        """Write everything but the disks to a file, from which `restore` goes on. The guest is paused meanwhile.

        `ConfigError` or `OSError` if it cannot be had; then there is no file, and the guest goes on all the same.
        """
        with self._lock:
            paused = self._paused
            self._pause()
            try:
                if self._ending or not self._running:
                    raise ConfigError("the guest is not running")
                for function in self.devices:
                    function.dataplane.drain()
                snapshot.write(self, path)
            finally:
                if not paused:
                    self._resume()

    def restore(self, path: Path) -> None:
        """Become the machine of a snapshot; in place of booting, before `run`, with the same devices plugged.

        `ConfigError` if that cannot be; no device has done anything then.
        """
        with self._lock:
            self._pause()
            snapshot.read(self, path)
            self._restored = True
            self._resume()

    def save(self) -> dict[str, Any]:
        """The state of all that is no memory, while nothing runs.

        The interrupt controllers before the CPUs: timers go on, and what they send in between must not be lost.
        """
        return {
            "pci": self.pci.save(),
            "serial": self.serial.save(),
            "power": self.power.save(),
            "cmos": self.cmos.index,
            "vm": self.vm.save(),
            "cpus": [vcpu.save() for vcpu in self._vcpus],
        }

    def load(self, state: dict[str, Any]) -> None:
        """Take the state of `save`. Each part sends interrupts to those before it."""
        for index, (vcpu, saved) in enumerate(zip(self._vcpus, state["cpus"], strict=True)):
            if refused := vcpu.restore(saved):
                log.warning("cpu%d: not restored: MSR %s", index, ", ".join(map(hex, refused)))
        self.vm.restore(state["vm"])
        self.cmos.index = state["cmos"]
        self.power.restore(state["power"])
        self.serial.restore(state["serial"])
        self.pci.restore(state["pci"])

    @property
    def exits(self) -> dict[str, int]:
        """Userspace exits of all CPUs by kind."""
        kinds = [vcpu.exits for vcpu in self._vcpus]
        return {kind: sum(exits[kind] for exits in kinds) for kind in kinds[0]}

    def close(self) -> None:
        self._stop_cpus()
        super().close()

    def _release(self) -> None:
        """Drop all references to the VM, which closes its file descriptors, whoever still holds a device or us."""
        self._vcpus.clear()
        self._chips.clear()
        del self.serial, self.vm, self._kvm.vm

    def _load(self) -> None:
        """Put into memory what the first CPU starts with, and point it there."""
        if isinstance(self.boot, Firmware):
            self.memory.write(*self.boot.shadow)
        else:
            self.memory.write(acpi.RSDP, acpi.build(self.smp))
            entry = self.boot.load(self.memory, acpi.RSDP)
            self._vcpus[0].set_linux_entry(entry, layout.BOOT_PARAMS)
            for vcpu in self._vcpus[1:]:
                vcpu.set_linux_secondary()

    def _run_once(self) -> Outcome:
        with self._lock:
            self._running, self._ending = True, False
            if not self._paused:
                self._start_cpus()
        try:
            event = self._events.get()
        finally:
            with self._lock:
                self._running = False
                self._stop_cpus()
        # More may have been said while the CPUs stopped; only the user's word counts still.
        while event is not Outcome.QUIT:
            try:
                later = self._events.get_nowait()
            except Empty:
                break
            event = later if later is Outcome.QUIT else event
        if isinstance(event, BaseException):
            raise event
        return event

    def _start_cpus(self) -> None:
        self._stopping = False
        for index, vcpu in enumerate(self._vcpus):
            thread = threading.Thread(target=self._run_cpu, args=(vcpu,), name=f"pyvirtio cpu{index}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _stop_cpus(self) -> None:
        self._stopping = True
        for vcpu, _ in zip(self._vcpus, self._threads, strict=False):
            vcpu.stop()
        for thread in self._threads:
            thread.join()
        self._threads.clear()

    def _run_cpu(self, vcpu: Vcpu) -> None:
        try:
            # A request to stop may be left over from the last run.
            while not self._stopping:
                if vcpu.run(self._bus) in ("shutdown", "reset"):
                    self._end(Outcome.CRASH)
                    return
        except BaseException as error:  # also the defects of our own that a guest's access found
            self._end(error)

    def _reset(self) -> None:
        """What the reset line does: CPUs, interrupt controllers, devices and the PCI bus start over."""
        log.info("reset")
        self.pci.reset()
        self.pci.assign_bars()
        self.power.reset()
        for vcpu in self._vcpus:
            vcpu.reset()
        self.vm.reset()
