"""A small Linux guest that the host drives over its serial port."""

import os
import select
import shlex
import threading
import time
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Self

from pyvirtio.device import Device
from pyvirtio.lab import initrd
from pyvirtio.lab.kernel import InstalledKernel, find_kernel
from pyvirtio.transports.pci import VirtioPci
from pyvirtio.vmm.boot import Kernel, LinuxBoot
from pyvirtio.vmm.machine import Machine, Outcome

MIB = 1 << 20
DONE = "::done "
"""What the guest's init prints in front of the exit status of a line."""

APPEND = (
    "console=ttyS0 quiet panic=-1 mitigations=off nokaslr no_timer_check tsc=reliable random.trust_cpu=on "
    "cryptomgr.notests audit=0 apparmor=0"
)
"""The kernel command line: leave out what only takes time."""

_FIFO_FULL_SECONDS = 0.002


class GuestFailed(Exception):
    """The guest ended, hung, or a command in it failed; the text has what it said last."""


class LinuxGuest:
    """A machine with an installed kernel, busybox and a shell that takes its lines from `run`.

    `plug` devices, then `boot`. A context manager: leaving it ends the machine. `functions` is shell text
    that defines what the lines may call. All methods belong to one thread.
    """

    def __init__(
        self,
        *,
        kernel: InstalledKernel | None = None,
        memory: int = 256 * MIB,
        smp: int = 1,
        modules: Sequence[str] = ("virtio_pci", "virtio_blk"),
        functions: str = "",
        append: str = "",
    ) -> None:
        self.kernel = kernel or find_kernel()
        init = files("pyvirtio.testing").joinpath("linux.sh").read_text()
        first_files = initrd.build(self.kernel, init, modules=modules, files={"etc/functions": functions})
        boot = LinuxBoot(Kernel.read(self.kernel.image), first_files, f"{APPEND} {append}".encode(), memory)
        self._reader, self._writer = os.pipe()
        self._held = b""
        self._outcome: Outcome | BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="pyvirtio guest", daemon=True)
        self.machine = Machine(boot, memory=memory, smp=smp, console_fd=self._writer)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the machine. Twice is once."""
        if self._reader < 0:
            return
        if self._thread.ident is not None:
            self.machine.quit()
            self._thread.join()
        self.machine.close()
        os.close(self._reader)
        self._reader = -1

    def plug(self, device: Device, name: str | None = None, **properties: Any) -> VirtioPci:
        """Add a device before the guest boots; `properties` are those of virtio-pci."""
        name = name or f"{type(device).__name__.lower()}{len(self.machine.devices)}"
        return self.machine.add(device, name, **properties)

    def boot(self, timeout: float = 300) -> str:
        """Start the machine and wait for the shell; return what the kernel said on the way."""
        self._thread.start()
        return self.wait_for_shell(timeout)

    def restore(self, snapshot: Path, timeout: float = 300) -> str:
        """Go on from a snapshot in place of `boot`; return what the line that ran then still prints."""
        self.machine.restore(snapshot)
        self._thread.start()
        return self.finish("restored", timeout)

    def wait_for_shell(self, timeout: float = 300) -> str:
        """Wait until the shell takes lines: after `boot`, or a reboot that the guest itself asked for."""
        return self._finish("booting", None, timeout)

    def run(self, line: str, on_line: Callable[[str], object] | None = None, timeout: float = 120) -> str:
        """Run a shell line; return its output, or raise `GuestFailed` if its exit status is not 0.

        `on_line` gets each line of output as it comes.
        """
        self.type(line)
        return self._finish(line, on_line, timeout)

    def mark(self, text: str) -> None:
        """Write a line into the kernel's log: `dmesg` can start there."""
        self.run(f"echo {shlex.quote(text)} >/dev/kmsg")

    def dmesg(self, since: str | None = None) -> str:
        """The kernel's log, or what came after the last mark with that text; `ValueError` if there is none."""
        lines = self.run("dmesg").splitlines()
        if since is not None:
            lines = lines[1 + max(n for n, line in enumerate(lines) if line.endswith(f"] {since}")) :]
        return "\n".join(lines)

    def finish(self, line: str, timeout: float = 120) -> str:
        """Wait for the end of a line that was typed; return what it still prints. Fails as `run` does."""
        return self._finish(line, None, timeout)

    def wait_for_line(self, text: str, timeout: float = 120) -> None:
        """Read on until a line of output contains `text`: of a line that was typed and has not ended."""
        deadline = time.monotonic() + timeout
        while (line := self._read_line(deadline)) is None or text not in line:
            if line is None:
                raise GuestFailed(f"the guest does not say {text!r}; it said last: {self._held.decode()}")

    def type(self, line: str, timeout: float = 60) -> None:
        """Send a line without waiting for its end."""
        data = line.encode() + b"\n"
        deadline = time.monotonic() + timeout
        while data and self._thread.is_alive():
            if time.monotonic() > deadline:
                raise GuestFailed(f"the guest takes no input: {line}")
            data = data[self.machine.serial.receive(data) :]
            if data:
                time.sleep(_FIFO_FULL_SECONDS)

    def wait(self, timeout: float = 120) -> Outcome:
        """Wait until the machine has ended by itself; return how."""
        self._thread.join(timeout)
        if self._outcome is None:
            raise GuestFailed(f"the guest still runs after {timeout:g} s")
        if isinstance(self._outcome, BaseException):
            raise self._outcome
        return self._outcome

    def _run(self) -> None:
        try:
            self._outcome = self.machine.run()
        except BaseException as error:  # raised again by whoever waits
            self._outcome = error
        finally:
            os.close(self._writer)

    def _finish(self, what: str, on_line: Callable[[str], object] | None, timeout: float) -> str:
        """Read until the shell says that it is done."""
        deadline = time.monotonic() + timeout
        output: list[str] = []
        while True:
            line = self._read_line(deadline)
            if line is None:
                why = "hangs" if self._thread.is_alive() else f"ended ({self._outcome})"
                raise GuestFailed(f"the guest {why}: {what}\n" + "\n".join([*output[-20:], self._held.decode()]))
            if line.startswith(DONE):
                break
            output.append(line)
            if on_line is not None:
                on_line(line)
        status = int(line.removeprefix(DONE))
        if status:
            raise GuestFailed(f"exit status {status} in the guest: {what}\n" + "\n".join(output[-20:]))
        return "\n".join(output)

    def _read_line(self, deadline: float) -> str | None:
        """The next line of the guest's console; None at its end or after the deadline."""
        while b"\n" not in self._held:
            if not select.select([self._reader], [], [], max(0, deadline - time.monotonic()))[0]:
                return None
            data = os.read(self._reader, 65536)
            if not data:
                return None
            self._held += data
        line, _, self._held = self._held.partition(b"\n")
        return line.decode(errors="replace").rstrip("\r")
