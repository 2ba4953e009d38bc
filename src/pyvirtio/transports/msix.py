"""MSI-X: the table, the pending bits and the message control register (PCI Local Bus 3.0, 6.8.2)."""

import logging
import struct
from collections.abc import Callable
from typing import Any

from pyvirtio._core import MsixVector
from pyvirtio.transports.base import Accelerator

ENTRY_SIZE = 16
MASKED = 1
CAPABILITY = 0x11
MAX_VECTORS = 2048

log = logging.getLogger("pyvirtio")


class MsixTable:
    """The vectors of one function. The table is at offset 0 of its BAR, the pending bits at `pba`.

    A vector is routed (which makes its eventfd an irqfd) when it is first unmasked, again when the guest rewrites
    an entry, and released when MSI-X is switched off. The caller serialises everything but `read`.
    """

    def __init__(self, name: str, count: int, accel: Accelerator) -> None:
        self.name = name
        self.count = count
        self.accel = accel
        self.pba = max(2048, 1 << (count * ENTRY_SIZE - 1).bit_length())
        self.vectors = [MsixVector() for _ in range(count)]
        self.enabled = False
        self.on_mask: Callable[[int], object] = lambda _: None
        """Called with the index of a vector that was masked, unmasked or written."""
        self._all_masked = False
        self._table = bytearray()
        self._routes: dict[int, tuple[int, int]] = {}
        self._clear()

    @property
    def bar_size(self) -> int:
        return 2 * self.pba

    def capability(self, bar: int) -> tuple[bytes, bytes]:
        """The capability after its next pointer, and the mask of its writable bits."""
        body = struct.pack("<HII", self.count - 1, bar, self.pba | bar)
        return body, b"\x00\xc0"

    def set_control(self, control: int) -> None:
        """The guest wrote message control: enable (bit 15) and function mask (bit 14)."""
        self.enabled = bool(control & 0x8000)
        self._all_masked = bool(control & 0x4000)
        if not self.enabled:
            self._release()
        for index in range(self.count):
            self._settle(index)

    def vector(self, index: int) -> MsixVector | None:
        """Where an interrupt for `index` goes; None while MSI-X is off, and for NO_VECTOR."""
        return self.vectors[index] if self.enabled and index < self.count else None

    def read(self, offset: int, size: int) -> int:
        if offset >= self.pba:
            source, offset = self._pending_bits(), offset - self.pba
        else:
            source = bytes(self._table)
        return int.from_bytes(source[offset : offset + size], "little")

    def write(self, offset: int, size: int, value: int) -> None:
        """Aligned writes of 4 and 8 bytes reach the table, nothing else does anything."""
        if size not in (4, 8) or offset % size or offset + size > len(self._table):
            return
        if offset + size == self._control_offset(offset // ENTRY_SIZE) + 4:
            value &= ~(0xFFFFFFFE << 8 * (size - 4))
        self._table[offset : offset + size] = value.to_bytes(size, "little")
        self._settle(offset // ENTRY_SIZE)

    def save(self) -> dict[str, Any]:
        """The table and the pending vectors; message control is in configuration space."""
        return {"table": bytes(self._table), "pending": [n for n, vector in enumerate(self.vectors) if vector.pending]}

    def restore(self, state: dict[str, Any]) -> None:
        """Take the state of `save`, before message control is set; `ValueError` if it was another table."""
        memoryview(self._table)[:] = state["table"]
        for index in state["pending"]:
            self.vectors[index].pending = True

    def forget_pending(self) -> None:
        """The device was reset: what it had to say is void."""
        for vector in self.vectors:
            vector.pending = False

    def reset(self) -> None:
        self.enabled = self._all_masked = False
        self._release()
        self._clear()
        self.forget_pending()

    def _clear(self) -> None:
        self._table = bytearray(struct.pack("<IIII", 0, 0, 0, MASKED) * self.count)
        for vector in self.vectors:
            vector.masked = True

    def _control_offset(self, index: int) -> int:
        return index * ENTRY_SIZE + 12

    def _settle(self, index: int) -> None:
        """Make the mask and the route of a vector what its entry asks for. Unmasking delivers what is pending."""
        vector = self.vectors[index]
        if not self.enabled or self._all_masked or self._table[self._control_offset(index)] & MASKED:
            vector.masked = True
        elif self._route(index):
            vector.masked = False
        self.on_mask(index)

    def _route(self, index: int) -> bool:
        address, data = struct.unpack_from("<QI", self._table, index * ENTRY_SIZE)
        if self._routes.get(index) == (address, data):
            return True
        try:
            self.accel.route_msi(self.vectors[index], address, data)
        except OSError as error:
            log.warning("%s: vector %d stays masked: %s", self.name, index, error.strerror)
            return False
        self._routes[index] = address, data
        return True

    def _release(self) -> None:
        for index in self._routes:
            self.accel.release_msi(self.vectors[index])
        self._routes.clear()

    def _pending_bits(self) -> bytes:
        bits = sum(vector.pending << index for index, vector in enumerate(self.vectors))
        return bits.to_bytes((self.count + 63) // 64 * 8, "little")
