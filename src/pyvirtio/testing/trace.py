"""What happened last in a `Guest`: for whoever looks at a test that failed."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from pyvirtio._core import GuestMemory
from pyvirtio.accel.inproc import InProcess
from pyvirtio.testing.driver import VirtioDriver
from pyvirtio.testing.pci import CONFIG_ADDRESS, CONFIG_DATA
from pyvirtio.testing.queue import Queue
from pyvirtio.testing.registers import Legacy

if TYPE_CHECKING:
    from pyvirtio.testing.machine import Guest

KEPT = 100
"""Accesses."""


class Event(NamedTuple):
    """One access of the driver, as a vCPU makes it."""

    what: str
    address: int
    size: int
    value: int


class Traced(InProcess):
    """The accelerator that remembers the last accesses; notifies that became eventfds are among them."""

    def __init__(self, memory: GuestMemory) -> None:
        super().__init__(memory)
        self.events: deque[Event] = deque(maxlen=KEPT)

    def pio_write(self, port: int, size: int, value: int) -> None:
        self.events.append(Event("pio write", port, size, value))
        super().pio_write(port, size, value)

    def mmio_write(self, address: int, size: int, value: int) -> None:
        self.events.append(Event("mmio write", address, size, value))
        super().mmio_write(address, size, value)

    def pio_read(self, port: int, size: int) -> int:
        value = super().pio_read(port, size)
        self.events.append(Event("pio read", port, size, value))
        return value

    def mmio_read(self, address: int, size: int) -> int:
        value = super().mmio_read(address, size)
        self.events.append(Event("mmio read", address, size, value))
        return value


def describe(guest: Guest) -> str:
    """The state of each ring, then the accesses since the machine was made, as far as they were kept."""
    lines = [line for driver in guest.drivers for line in _rings(driver.name, driver.queues, driver.why_broken)]
    if isinstance(guest.accel, Traced):
        drivers = [driver for driver in guest.drivers if isinstance(driver, VirtioDriver)]
        lines += [_line(drivers, event) for event in guest.accel.events if event.address != CONFIG_ADDRESS]
    return "\n".join(lines)


def _rings(name: str, queues: list[Queue], why_broken: str | None) -> Iterator[str]:
    if why_broken:
        yield f"{name} needs a reset: {why_broken}"
    for queue in queues:
        state = " ".join(f"{field} {value}" for field, value in queue.ring.state().items())
        yield f"{name}.{queue.name}: {state}, pending heads {sorted(queue.pending)}"
        if owed := queue.driver.owed(queue.index):
            yield f"{name}.{queue.name}: {owed}"


def _line(drivers: list[VirtioDriver], event: Event) -> str:
    where = next(filter(None, (_register(driver, event) for driver in drivers)), f"{event.address:#x}")
    if event.what.startswith("pio") and CONFIG_DATA <= event.address < CONFIG_DATA + 4:
        where = "configuration space"
    return f"{event.what:10} {where} ({event.size}): {event.value:#x}"


def _register(driver: VirtioDriver, event: Event) -> str | None:
    """What a driver calls the address, if it is its device's."""
    for index, (window, offset) in enumerate(driver.notifiers):
        modern = not isinstance(driver.registers, Legacy) or event.value == index
        if window.base + offset == event.address and window.space == event.what.split()[0] and modern:
            return f"{driver.name}.{driver.queues[index].name}: notify"
    for kind, registers in (("", driver.common), ("config.", driver.config)):
        at = event.address - registers.window.base - registers.start
        for name, (offset, size) in registers.layout.items():
            if registers.window.space == event.what.split()[0] and offset <= at < offset + size:
                return f"{driver.name}.{kind}{name}" + (f"+{at - offset}" if at > offset else "")
    for bar, window in driver.pci.bars.items():
        at = event.address - window.base
        if window.space == event.what.split()[0] and 0 <= at < driver.pci.sizes[bar]:
            return f"{driver.name}: BAR{bar}+{at:#x}"
    return None
