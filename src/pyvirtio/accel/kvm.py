"""The accelerator on `/dev/kvm`: ioeventfds, MSI routes with their irqfds, and the INTx lines of the I/O APIC."""

import heapq
import threading
from collections.abc import Callable
from functools import partial

from pyvirtio._core import GuestMemory, IrqLine, MsixVector, Vm, supported
from pyvirtio.errors import ConfigError
from pyvirtio.transports.base import IoAddress
from pyvirtio.vmm.pci_bus import FIRST_INTX_GSI, INTX_GSIS, irq_of

FIRST_MSI_GSI = FIRST_INTX_GSI + INTX_GSIS


class Kvm:
    """A VM with its memory and interrupt controllers, and the accelerator of its devices.

    Safe from any thread. `ConfigError` if there is no usable `/dev/kvm`.
    """

    def __init__(self, memory: GuestMemory, device: str = "/dev/kvm") -> None:
        self.memory = memory
        self.vm = _open(device)
        self.vm.create_irqchip()
        self.vm.set_memory(memory)
        self._lines: dict[int, IrqLine] = {}
        self._gsis: dict[MsixVector, int] = {}
        self._routes: dict[int, tuple[int, int]] = {}
        self._free_gsis: list[int] = []
        self._lock = threading.Lock()

    def assign_ioeventfd(self, fd: int, at: IoAddress) -> Callable[[], None]:
        """Have KVM signal `fd` for each write that matches; return how to undo it. `OSError` is KVM's."""
        where = (fd, at.space, at.address, at.length, at.datamatch)
        self.vm.assign_ioeventfd(*where)
        return partial(self.vm.deassign_ioeventfd, *where)

    def route_msi(self, vector: MsixVector, address: int, data: int) -> None:
        """Make `vector` stand for this message. The first call assigns its irqfd."""
        with self._lock:
            gsi = self._gsis.get(vector)
            if gsi is None:
                self._add(vector, address, data)
            elif self._routes[gsi] != (address, data):
                self._routes[gsi] = (address, data)
                self._write_routes()

    def _add(self, vector: MsixVector, address: int, data: int) -> None:
        gsi = heapq.heappop(self._free_gsis) if self._free_gsis else FIRST_MSI_GSI + len(self._gsis)
        self._routes[gsi] = (address, data)
        try:
            self._write_routes()
            self.vm.assign_irqfd(vector.fd, gsi)
        except OSError:
            self._free(gsi)
            raise
        self._gsis[vector] = gsi

    def release_msi(self, vector: MsixVector) -> None:
        """Take the irqfd away. The route goes with the next change of the table: nobody can reach it."""
        with self._lock:
            gsi = self._gsis.pop(vector, None)
            if gsi is not None:
                self.vm.deassign_irqfd(vector.fd, gsi)
                self._free(gsi)

    def gsi_of(self, vector: MsixVector) -> int | None:
        """The interrupt that the irqfd of a routed vector is assigned to."""
        return self._gsis.get(vector)

    def _free(self, gsi: int) -> None:
        del self._routes[gsi]
        heapq.heappush(self._free_gsis, gsi)

    def _write_routes(self) -> None:
        self.vm.set_msi_routes([(gsi, *message) for gsi, message in self._routes.items()])

    def intx_line(self, slot: int) -> IrqLine:
        """Pin A of a slot: an input of the I/O APIC, which the slots 8 apart share."""
        gsi = irq_of(slot)
        with self._lock:
            if gsi in self._lines:
                return self._lines[gsi].share()
            self._lines[gsi] = self.vm.irq_line(gsi)
            return self._lines[gsi]


def _open(device: str) -> Vm:
    try:
        vm = Vm(device)
    except FileNotFoundError:
        raise ConfigError(f"{device}: there is no KVM on this host (or not in this container)") from None
    except PermissionError:
        raise ConfigError(f"{device}: not permitted; join the group kvm, or run as root") from None
    except OSError as error:
        raise ConfigError(f"{device}: {error.strerror}") from None
    if missing := supported(device):
        raise ConfigError(f"{device}: this KVM lacks what pyvirtio needs: {missing}")
    return vm
