"""Who watches what: the queues of any device, and the registers of one on PCI."""

import weakref
from functools import partial
from typing import Any

from pyvirtio.device import Device
from pyvirtio.faults.engine import Running
from pyvirtio.lint.pci import LintedPci
from pyvirtio.lint.report import Report, Violation
from pyvirtio.lint.rings import Rings
from pyvirtio.transports.base import Accelerator


class Lint:
    """Watches every device that is made known to it before it is plugged. Any thread.

    `drivers` is how many CPUs drive a device at a time: what two of them do at once may look as if neither had looked
    at the flags, so with more than one the lint is silent about notifications that nobody asked for.
    """

    def __init__(self, *, drivers: int = 1) -> None:
        self.report = Report()
        self.drivers = drivers
        self._watched: list[Rings] = []

    def take(self) -> list[Violation]:
        """What was found since the last call, each once; looks at all rings once more.

        Call it while the drivers rest: what they have made available and not told the device of, although it had asked
        for that, is found here and nowhere else.
        """
        for rings in self._watched:
            rings.look()
        return self.report.take()

    @property
    def violations(self) -> list[Violation]:
        """What was found so far, each once."""
        return list(self.report.counts)

    def watch(self, device: Device, name: str) -> None:
        """Look at the rings of a device whenever it does so itself, over any transport."""
        self._watch(device, name, counts_kicks=False)  # front-ends kick for reasons of their own

    def _watch(self, device: Device, name: str, *, counts_kicks: bool) -> Rings:
        # Neither holds the device: a chain that it keeps holds its queue, which holds what watches it.
        rings = Rings(name, self.report, strict=self.drivers == 1, counts_kicks=counts_kicks)
        self._watched.append(rings)
        device.watcher = partial(_watch_queues, rings)
        return rings

    def virtio_pci(self, device: Device, accel: Accelerator, *, name: str, **properties: Any) -> LintedPci:
        """Like `VirtioPci`: a function whose registers and rings are watched."""
        rings = self._watch(device, name, counts_kicks=True)
        return LintedPci(device, accel, name=name, rings=rings, report=self.report, **properties)


def _watch_queues(rings: Rings, running: Running) -> None:
    for vq in running.queues:
        vq.watch(rings.of(vq, weakref.ref(running)))
