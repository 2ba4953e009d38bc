"""The driver of a device that is served over vhost-user in this process, in the memory of a `Guest`.

To a test it looks like `VirtioDriver`; there are no PCI registers, and what is said travels over a real socket.
"""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Any

from pyvirtio.device import Device
from pyvirtio.serve import wire
from pyvirtio.serve.server import Server
from pyvirtio.serve.vhost_user import Rings
from pyvirtio.serve.wire import Request
from pyvirtio.spec import Feature
from pyvirtio.testing.pci import Registers
from pyvirtio.testing.queue import DeviceNeedsReset, Interrupts, Queue, make_ring, sleep_on
from pyvirtio.testing.registers import config_layout
from pyvirtio.testing.vhost_user import Eventfd, FrontEnd

if TYPE_CHECKING:
    from pyvirtio.testing.machine import Guest


class ConfigSpace:
    """The configuration space of a served device, as a window to look through by name."""

    def __init__(self, front_end: FrontEnd) -> None:
        self.front_end = front_end

    def read(self, offset: int, size: int) -> int:
        return int.from_bytes(self.front_end.read_config(size, offset), "little")

    def write(self, offset: int, size: int, value: int) -> None:
        self.front_end.write_config(offset, value.to_bytes(size, "little"))


class Announcements:
    """What a back-end says without being asked: that its configuration has changed, and that the device is broken."""

    def __init__(self, err: Eventfd) -> None:
        self.err = err
        self.ours, self.theirs = socket.socketpair()
        self.count = self.config_count = 0

    def fds(self) -> list[int]:
        return [self.err.fd, self.ours.fileno()]

    def take(self) -> bool:
        """Take what was said of the configuration; that the device is broken stays said until the reset."""
        before = self.config_count
        while sleep_on([self.ours.fileno()], 0):
            self.config_count += len(self.ours.recv(1 << 12)) // len(wire.pack(wire.BACKEND_CONFIG_CHANGE_MSG))
        return self.config_count > before

    def close(self) -> None:
        self.ours.close()
        self.theirs.close()


class VhostUserDriver(FrontEnd):
    """A VMM and the driver in its guest, in one: `start` does what both do until the queues run.

    One attribute for each queue, `config` by the names of its fields; every message can be sent by hand.
    """

    def __init__(
        self,
        guest: Guest,
        device: Device,
        *,
        name: str,
        event_idx: bool = True,
        indirect_desc: bool = True,
        packed: bool = False,
        in_order: bool = False,
        ring_reset: bool = True,
    ) -> None:
        ours, theirs = socket.socketpair()
        self.guest, self.device = guest, device
        rings = Rings(packed=packed, in_order=in_order, ring_reset=ring_reset)
        self.server = Server(device, name, theirs, [guest.iothread], rings=rings).start()
        super().__init__(ours, memory=guest.memory, heap=guest.heap, name=name)
        self.announcements = Announcements(self.err)
        self.config: Any = Registers(ConfigSpace(self), 0, config_layout(device))  # type: ignore[arg-type]
        self.features_wanted = ~0
        self.withheld = (0 if event_idx else Feature.EVENT_IDX) | (0 if indirect_desc else Feature.INDIRECT_DESC)
        self.queue_size: int | None = None
        self.indirect = False
        self.may_break = False
        """Whether it is what the test is after that the device breaks."""
        self._started = False

    @property
    def config_source(self) -> Announcements:
        return self.announcements

    def start(self) -> None:  # type: ignore[override]
        """All that a VMM and a driver do until the queues run; anew if they ran before."""
        if self._started:
            self.reset()
        self._started = True
        self.negotiate(self.features_wanted & ~int(self.withheld))
        self.acked(Request.SET_BACKEND_REQ_FD, fds=[self.announcements.theirs.fileno()])
        self.set_mem_table()
        for index, queue in enumerate(self.device.queues):
            started = self.set_up_queue(index, queue.name, self.queue_size or queue.size)
            started.indirect = self.indirect and bool(self.features & Feature.INDIRECT_DESC)

    def reset_queue(self, index: int) -> None:
        """Reset one queue while the others go on: its ring stops, and its buffers are the driver's again."""
        self.acked(Request.SET_VRING_ENABLE, wire.VRING_STATE.pack(index, 0))
        self.stop_ring(self.queues[index])
        self.queues[index].free()

    def renew_queue(self, index: int) -> Queue:
        """Give a queue that was reset a new ring, of `queue_size` entries."""
        queue = self.queues[index]
        queue.ring = make_ring(self.memory, self.heap, self.queue_size or queue.ring.size, self.features)
        self.start_ring(queue)
        return queue

    def reset(self) -> None:
        """RESET_DEVICE: the driver has reset the device; the queues are gone."""
        self.acked(Request.RESET_DEVICE)
        for queue in self.queues:
            queue.free()
        self.drop_queues()
        self.err.take()
        self.may_break = False

    def take_interrupts(self, only: Interrupts | None = None) -> bool:
        if only is not None:
            return super().take_interrupts(only)
        announced = self.announcements.take()
        return super().take_interrupts() or announced

    @property
    def config_interrupts(self) -> int:
        self.take_interrupts()
        return self.announcements.config_count

    def check(self) -> None:
        if self.why_broken:
            raise DeviceNeedsReset(f"{self.name}: {self.why_broken}")

    @property
    def why_broken(self) -> str | None:
        """The reason that the device logged when it broke."""
        return self.server.broken

    def owed(self, index: int) -> str:
        return self.server.owed(index)

    def wait_needs_reset(self) -> str:
        """Sleep until the err fd tells that the device is broken; return the reason."""
        self.may_break = True
        self.wait_broken()
        return self.why_broken or ""

    def unplug(self) -> None:
        """What is left to `Guest.unplug`: hang up, and end the server."""
        for queue in self.queues:
            queue.free()
        self.close()
        self.announcements.close()
        self.server.close()
        self.device.close()
