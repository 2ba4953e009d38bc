"""The faults of one device: which are on, where they sit, and what they have done so far."""

import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from operator import or_
from random import Random, getrandbits
from threading import RLock
from typing import Any, ClassVar, Protocol, Self

from pyvirtio._core import DeviceState, IoThread, VirtQueue
from pyvirtio.errors import ConfigError

log = logging.getLogger("pyvirtio")

SEED_BITS = 32

Undo = Callable[[], object]
Part = Callable[["Running", "Faults"], Undo]
"""What a group of faults does to a running device: installs itself, and returns how to take it out again."""


class Running(Protocol):
    """What faults need of a device that runs, on whichever transport."""

    device: Any
    state: DeviceState

    @property
    def queues(self) -> Sequence[VirtQueue]: ...
    @property
    def loop(self) -> IoThread: ...
    def renew_handlers(self) -> None:
        """Serve the queues as the device declares them now."""


class Fault:
    """One thing that goes wrong, with a `chance` from 0 to 1 each time it could.

    A subclass overrides what the transport asks, or says with `part` what is installed in the running device while
    such a fault is on. `hits` counts how often it went wrong.
    """

    kind: ClassVar[str]
    """Its name in `--fault`."""

    def __init__(self, *, chance: float = 1.0) -> None:
        if not 0 <= chance <= 1:
            raise ConfigError(f"{type(self).__name__}: chance={chance:g} is not from 0 to 1")
        self.chance = chance
        self.hits = 0
        self.chances = Random()
        """What a fault of the device as a whole draws from; seeded when it is switched on."""

    @property
    def value(self) -> object:
        """What `--fault` says after `=`, or None."""
        return None

    def __str__(self) -> str:
        """As `--fault` has it."""
        value = "" if self.value is None else f"={self.value}"
        return f"{self.kind}{value}" + ("" if self.chance == 1 else f"@{self.chance * 100:g}%")

    def hit(self, chances: Random) -> bool:
        """Whether it goes wrong this time."""
        wrong = chances.random() < self.chance
        self.hits += wrong
        return wrong

    def part(self) -> Part | None:
        """What is installed, once for all faults that have the same."""
        return None

    def refused(self, features: int) -> int:
        """The feature bits that the device does not accept although it offers them."""
        return 0

    def reset_time(self) -> float:
        """Seconds that a reset takes longer."""
        return 0.0

    def assigning(self, vq: VirtQueue) -> None:
        """An ioeventfd is to be assigned for the queue; an `OSError` is what the kernel would say."""


class Faults:
    """The faults of a device. Any thread may switch them at any time; none is on at first.

    The same seed makes the same decisions for the same requests: each fault draws from a sequence of its own, for
    each queue. It is logged whenever something is switched on.
    """

    def __init__(self) -> None:
        self.seed: int | None = None
        """None until a fault was added."""
        self._faults: list[Fault] = []
        self._running: weakref.ref[Running] | None = None
        self._installed: list[Undo] = []
        self._lock = RLock()

    def __iter__(self) -> Iterator[Fault]:
        return iter(list(self._faults))

    def add(self, *faults: Fault, seed: int | None = None) -> Self:
        """Switch faults on; `seed` repeats an earlier run, and is drawn if none was given before.

        `ConfigError` if the device cannot have one of them.
        """
        with self._lock:
            if seed is not None:
                self.seed = seed
            elif self.seed is None:
                self.seed = getrandbits(SEED_BITS)
            before = self._faults
            self._faults = [*before, *faults]
            try:
                for fault in faults:
                    fault.chances = self.chances(fault, "device")
                self._settle()
            except ConfigError:
                self._faults = before
                self._settle()
                raise
        return self

    def remove(self, *faults: Fault) -> None:
        """Switch faults off; what they hold back goes to the driver now."""
        with self._lock:
            self._faults = [fault for fault in self._faults if fault not in faults]
            self._settle()

    def clear(self) -> None:
        self.remove(*self._faults)

    def attach(self, running: Running) -> None:
        """The device runs there from now on; who says so also says `detach`."""
        with self._lock:
            self._running = weakref.ref(running)
            self._settle()

    def detach(self) -> None:
        with self._lock:
            self._running = None
            self._settle()

    def chances(self, fault: Fault, where: str) -> Random:
        """The sequence that `fault` draws from."""
        return Random(f"{self.seed}/{self._faults.index(fault)}/{where}")

    def refused(self, features: int) -> int:
        return reduce(or_, (fault.refused(features) for fault in self), 0)

    def reset_time(self) -> float:
        return sum(fault.reset_time() for fault in self)

    def assigning(self, vq: VirtQueue) -> None:
        for fault in self:
            fault.assigning(vq)

    def _settle(self) -> None:
        """Take out what was installed, and install what is wanted now."""
        while self._installed:
            self._installed.pop()()
        running = self._running() if self._running else None
        if running is None or not self._faults:
            return
        log.warning("%s: faults: %s,seed=%s", running.device.name, ",".join(map(str, self._faults)), self.seed)
        for part in dict.fromkeys(fault.part() for fault in self._faults):
            if part is not None:
                self._installed.append(part(running, self))
