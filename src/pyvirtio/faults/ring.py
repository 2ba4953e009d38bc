"""Faults between a completed request and the driver: its used entry, and the interrupt (virtio 1.3, 2.7.8)."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from random import Random
from threading import Lock

from pyvirtio._core import Completed, DeviceState, VirtQueue
from pyvirtio.errors import ConfigError
from pyvirtio.faults.engine import Fault, Faults, Part, Running, Undo
from pyvirtio.faults.later import Later
from pyvirtio.faults.times import Delay
from pyvirtio.properties import unknown

HOLD = 0.01
"""Seconds that a request waits to be overtaken."""
MAX_LENGTH = 0xFFFFFFFF


@dataclass
class Delivery:
    """A batch on its way to the driver. `interrupt` None leaves the decision to what the driver asked for."""

    chains: list[Completed]
    interrupt: bool | None = None
    spurious: bool = False
    """One more interrupt, for nothing."""


class Line:
    """What is between one queue and its driver while ring faults are on."""

    def __init__(self, vq: VirtQueue, state: DeviceState, faults: Iterable[tuple["RingFault", Random]], later: Later):
        self.vq, self.state, self.later = vq, state, later
        self.faults = list(faults)
        self._lock = Lock()

    def completed(self, batch: list[Completed]) -> None:
        """The tap: each fault changes the delivery in turn."""
        delivery = Delivery(batch)
        with self._lock:
            for fault, chances in self.faults:
                fault.deliver(delivery, chances, self)
        if delivery.chains:
            self.vq.give_back(delivery.chains, delivery.interrupt)
        if delivery.spurious:
            self.vq.give_back([], True)

    def hold(self, chain: Completed, seconds: float) -> None:
        """Give a chain to the driver later."""
        self.later.call(seconds, partial(self.vq.give_back, [chain]))


def tap(running: Running, faults: Faults) -> Undo:
    """Put a line between each queue and its driver."""
    ring_faults = [fault for fault in faults if isinstance(fault, RingFault)]
    names = [vq.name for vq in running.queues]
    for fault in ring_faults:
        if not any(map(fault.concerns, names)):
            raise ConfigError(unknown(running.device.name, "queue", fault.queue or "", names))
    later = Later(running.loop)
    queues = list(running.queues)
    for vq in queues:
        sequences = [(fault, faults.chances(fault, vq.name)) for fault in ring_faults if fault.concerns(vq.name)]
        vq.set_tap(Line(vq, running.state, sequences, later).completed)

    def undo() -> None:
        for vq in queues:
            vq.set_tap(None)
        later.close()

    return undo


class RingFault(Fault):
    """A fault of used entries or interrupts: `deliver` changes a batch, for which chance decides chain by chain."""

    queue: str | None = None
    """The queue it is for, with or without its number; None for all."""

    def __str__(self) -> str:
        return super().__str__() + (f"/{self.queue}" if self.queue else "")

    def concerns(self, queue: str) -> bool:
        return self.queue in (None, queue, queue.rstrip("0123456789"))

    def part(self) -> Part:
        return tap

    def deliver(self, delivery: Delivery, chances: Random, line: Line) -> None:
        """Runs on the thread that completed the batch."""
        passed: list[Completed] = []
        for chain in delivery.chains:
            passed += self.change(chain, chances, line) if self.hit(chances) else [chain]
        delivery.chains = passed

    def change(self, chain: Completed, chances: Random, line: Line) -> list[Completed]:
        """What becomes of a chain for which it goes wrong."""
        raise NotImplementedError


class Late(RingFault):
    """A used entry comes late: "5ms", "1ms-5ms", "exp:2ms" or "normal:5ms:1ms"; a latency distribution at 100 %."""

    kind = "late"

    def __init__(self, delay: str | float = "5ms", *, chance: float = 1.0) -> None:
        super().__init__(chance=chance)
        self.delay = Delay(delay)

    @property
    def value(self) -> Delay:
        return self.delay

    def change(self, chain: Completed, chances: Random, line: Line) -> list[Completed]:
        line.hold(chain, self.delay.sample(chances))
        return []


class Reorder(RingFault):
    """A used entry is overtaken by the next one, or comes 10 ms late if there is none."""

    kind = "reorder"

    def deliver(self, delivery: Delivery, chances: Random, line: Line) -> None:
        passed: list[Completed] = []
        overtaken: list[Completed] = []
        for chain in delivery.chains:
            if self.hit(chances):
                overtaken.append(chain)
            else:
                passed += [chain, *overtaken]
                overtaken.clear()
        for chain in overtaken:
            line.hold(chain, HOLD)
        delivery.chains = passed


class Duplicate(RingFault):
    """A used entry is written twice."""

    kind = "duplicate"

    def change(self, chain: Completed, chances: Random, line: Line) -> list[Completed]:
        return [chain, chain]


class Lost(RingFault):
    """A used entry never comes."""

    kind = "lost"

    def change(self, chain: Completed, chances: Random, line: Line) -> list[Completed]:
        return []


class Short(RingFault):
    """A used entry tells of fewer bytes than were written."""

    kind = "short"

    def change(self, chain: Completed, chances: Random, line: Line) -> list[Completed]:
        return [chain.resized(chances.randrange(chain.length) if chain.length else 0)]


class Length(RingFault):
    """A used entry tells of so many bytes, whatever was written."""

    kind = "length"

    def __init__(self, length: int | str = MAX_LENGTH, *, chance: float = 1.0) -> None:
        super().__init__(chance=chance)
        self.length = number(length, "length", 0, MAX_LENGTH)

    @property
    def value(self) -> int:
        return self.length

    def change(self, chain: Completed, chances: Random, line: Line) -> list[Completed]:
        return [chain.resized(self.length)]


class LostInterrupt(RingFault):
    """Used entries come without their interrupt; chance decides batch by batch."""

    kind = "lost-interrupt"

    def deliver(self, delivery: Delivery, chances: Random, line: Line) -> None:
        if delivery.chains and self.hit(chances):
            delivery.interrupt = False


class Spurious(RingFault):
    """An interrupt for nothing follows used entries; chance decides batch by batch."""

    kind = "spurious"

    def deliver(self, delivery: Delivery, chances: Random, line: Line) -> None:
        delivery.spurious = self.hit(chances) or delivery.spurious


class NeedsReset(RingFault):
    """The device asks for a reset instead of answering the n-th request; once."""

    kind = "needs-reset"

    def __init__(self, request: int | str = 1, *, chance: float = 1.0) -> None:
        super().__init__(chance=chance)
        self.request = number(request, "request", 1, 1 << 32)
        self.seen = 0

    @property
    def value(self) -> int:
        return self.request

    def deliver(self, delivery: Delivery, chances: Random, line: Line) -> None:
        before, self.seen = self.seen, self.seen + len(delivery.chains)
        if before < self.request <= self.seen and self.hit(chances):
            line.state.fail(f"fault: {self}")


def number(value: int | str, what: str, low: int, high: int) -> int:
    """A number in a range, also as text; `ConfigError` for anything else."""
    try:
        parsed = int(value, 0) if isinstance(value, str) else value
    except ValueError:
        raise ConfigError(f"{value!r} is no {what}") from None
    if not low <= parsed <= high:
        raise ConfigError(f"{what} {parsed} is not from {low} to {high}")
    return parsed
