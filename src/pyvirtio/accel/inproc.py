"""The accelerator without KVM: ioeventfds, MSI routes and interrupt lines of a machine that is one process."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

from pyvirtio._core import GuestMemory, IrqLine, MsixVector
from pyvirtio.transports.base import IoAddress

if TYPE_CHECKING:
    from pyvirtio._core import Bus

Match = tuple[int, int | None]  # length, datamatch


class InProcess:
    """Plays KVM for a test driver: an access matches an ioeventfd, or goes to the bus as an exit would.

    The rules of KVM_IOEVENTFD hold: length 0 looks at the address only, a datamatch compares the value, two that
    could match one write are refused with EEXIST. Safe from any thread; after an undo returns no write signals
    that eventfd any more.
    """

    def __init__(self, memory: GuestMemory) -> None:
        self.memory = memory
        self.bus: Bus | None = None
        self.routes: dict[MsixVector, tuple[int, int]] = {}
        self.routed = 0
        """How often `routes` has changed."""
        self.lines: dict[int, IrqLine] = {}
        self.exits = 0
        self.assigns = 0
        self.fail_ioeventfd_at: dict[int, int] = {}
        """Which assigns fail: the number of the assign, from 0 since `assigns` was last cleared, -> errno."""
        self._ioeventfds: dict[tuple[str, int], dict[Match, int]] = {}
        self._lock = threading.Lock()

    @property
    def ioeventfds(self) -> set[IoAddress]:
        """Where an ioeventfd is assigned."""
        with self._lock:
            return {
                IoAddress(space, address, length, datamatch)  # type: ignore[arg-type]
                for (space, address), here in self._ioeventfds.items()
                for length, datamatch in here
            }

    def assign_ioeventfd(self, fd: int, at: IoAddress) -> Callable[[], None]:
        """Signal `fd` on each write that matches `at`; return how to undo it. `OSError` as KVM gives it."""
        with self._lock:
            number, self.assigns = self.assigns, self.assigns + 1
            _refuse(self.fail_ioeventfd_at.get(number, 0), at)
            if at.length not in (0, 1, 2, 4, 8) or (at.length == 0 and at.datamatch is not None):
                _refuse(errno.EINVAL, at)
            here = self._ioeventfds.get((at.space, at.address), {})
            if _collides(at, here):
                _refuse(errno.EEXIST, at)
            here[at.length, at.datamatch] = fd
            self._ioeventfds[at.space, at.address] = here
        return partial(self._deassign, at)

    def _deassign(self, at: IoAddress) -> None:
        with self._lock:
            here = self._ioeventfds[at.space, at.address]
            del here[at.length, at.datamatch]
            if not here:
                del self._ioeventfds[at.space, at.address]

    def _signalled(self, space: str, address: int, size: int, value: int) -> bool:
        """Whether the write matched an ioeventfd, which is signalled then."""
        if (space, address) not in self._ioeventfds:
            return False
        with self._lock:
            here = self._ioeventfds.get((space, address), {})
            for match in ((0, None), (size, None), (size, value)):
                if (fd := here.get(match)) is not None:
                    with suppress(BlockingIOError):  # a saturated counter: it is signalled already
                        os.eventfd_write(fd, 1)
                    return True
        return False

    def route_msi(self, vector: MsixVector, address: int, data: int) -> None:
        """Remember the message that `vector` stands for."""
        self.routes[vector] = (address, data)
        self.routed += 1

    def release_msi(self, vector: MsixVector) -> None:
        self.routes.pop(vector, None)
        self.routed += 1

    def intx_line(self, slot: int) -> IrqLine:
        """An input of the line of that slot; `lines` has the lines themselves."""
        return self.lines.setdefault(slot, IrqLine()).share()

    def pio_write(self, port: int, size: int, value: int) -> None:
        if not self._signalled("pio", port, size, value):
            self._exit().pio_write(port, size, value)

    def mmio_write(self, address: int, size: int, value: int) -> None:
        if not self._signalled("mmio", address, size, value):
            self._exit().mmio_write(address, size, value)

    def pio_read(self, port: int, size: int) -> int:
        return self._exit().pio_read(port, size)

    def mmio_read(self, address: int, size: int) -> int:
        return self._exit().mmio_read(address, size)

    def _exit(self) -> Bus:
        assert self.bus is not None
        self.exits += 1
        return self.bus


def _collides(at: IoAddress, here: dict[Match, int]) -> bool:
    """Whether one write could match both `at` and an ioeventfd at the same address."""
    if at.length == 0 or (0, None) in here:
        return bool(here)
    if at.datamatch is None:
        return any(length == at.length for length, _ in here)
    return (at.length, None) in here or (at.length, at.datamatch) in here


def _refuse(code: int, at: IoAddress) -> None:
    if code:
        raise OSError(code, os.strerror(code), f"{at.space} {at.address:#x}")
