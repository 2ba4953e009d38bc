"""Where the interrupts of a virtio-pci device go: INTx with the ISR status, or MSI-X (virtio 1.3, 4.1.5.1)."""

from collections.abc import Callable
from typing import Any

from pyvirtio._core import IrqLine, Isr, MsixVector
from pyvirtio.dataplane import Dataplane
from pyvirtio.spec import NO_VECTOR
from pyvirtio.transports.msix import MsixTable


class Interrupts:
    """The vectors that the driver chose, and the switch between MSI-X and INTx. The transport serialises writes."""

    def __init__(self, dataplane: Dataplane, line: IrqLine, msix: MsixTable | None) -> None:
        self.isr = Isr(line)
        self.msix = msix
        self._dataplane = dataplane
        self._intx_disabled = False
        self._changed: Callable[[int], object] = lambda _: None
        self.forget()

    @property
    def msix_enabled(self) -> bool:
        return self.msix is not None and self.msix.enabled

    @property
    def pending(self) -> bool:
        """The interrupt status bit of configuration space."""
        return not self.msix_enabled and self.isr.peek() != 0

    def set_queue_vector(self, index: int, vector: int) -> None:
        """A vector that does not exist becomes NO_VECTOR, which the driver reads back."""
        self.queue_vectors[index] = self._existing(vector)
        self._connect_queue(index)

    def set_config_vector(self, vector: int) -> None:
        self.config_vector = self._existing(vector)
        self._connect_config()

    def irqfd(self, index: int) -> int | None:
        """The eventfd that, when signalled, interrupts for a queue; None if that takes more, as while it is masked."""
        vector = self._vector(index)
        return vector.fd if vector is not None and not vector.masked else None

    def follow(self, changed: Callable[[int], object]) -> None:
        """Call `changed(index)` whenever the `irqfd` of a queue may have changed."""
        self._changed = changed
        if self.msix is not None:
            self.msix.on_mask = self._mask_changed

    def _mask_changed(self, vector: int) -> None:
        for index, chosen in enumerate(self.queue_vectors):
            if chosen == vector:
                self._changed(index)

    def disable_intx(self, disabled: bool) -> None:
        """The command register's bit."""
        self._intx_disabled = disabled
        self._switch_intx()

    def set_msix_control(self, control: int) -> None:
        if self.msix is not None:
            self.msix.set_control(control)
            self._connect()

    def forget(self) -> None:
        """The device was reset: no vectors, nothing pending, the line low."""
        self.queue_vectors = [NO_VECTOR] * len(self._dataplane.queues)
        self.config_vector = NO_VECTOR
        self._connect()
        self.isr.read()
        if self.msix is not None:
            self.msix.forget_pending()

    def reset(self) -> None:
        """The function was reset, its MSI-X table included."""
        if self.msix is not None:
            self.msix.reset()
        self.forget()

    def save(self) -> dict[str, Any]:
        """What is pending, and the vectors that the driver chose."""
        return {
            "isr": self.isr.peek(),
            "config_vector": self.config_vector,
            "queue_vectors": self.queue_vectors,
            "msix": self.msix.save() if self.msix is not None else None,
        }

    def restore(self, state: dict[str, Any], msix_control: int) -> None:
        """Take the state of `save`: the line rises again, and what was pending still is."""
        vectors = zip(state["queue_vectors"], self.queue_vectors, strict=True)
        self.config_vector, self.queue_vectors = state["config_vector"], [vector for vector, _ in vectors]
        if self.msix is not None:
            self.msix.restore(state["msix"])
            self.msix.set_control(msix_control)
        self._connect()
        self.isr.post(state["isr"])

    def send_again(self) -> None:
        """Signal every vector in use: a message that was under way in KVM is in no state. A driver may look twice."""
        if self.msix is not None:
            for index in {self.config_vector, *self.queue_vectors}:
                if vector := self.msix.vector(index):
                    vector.signal()

    def _existing(self, vector: int) -> int:
        return vector if self.msix is not None and vector < self.msix.count else NO_VECTOR

    def _switch_intx(self) -> None:
        self.isr.intx_enabled = not (self._intx_disabled or self.msix_enabled)

    def _connect(self) -> None:
        self._switch_intx()
        self._connect_config()
        for index in range(len(self.queue_vectors)):
            self._connect_queue(index)

    def _connect_queue(self, index: int) -> None:
        self._dataplane.queues[index].set_interrupt(self.isr, self._vector(index))
        self._changed(index)

    def _vector(self, index: int) -> MsixVector | None:
        return self.msix.vector(self.queue_vectors[index]) if self.msix is not None else None

    def _connect_config(self) -> None:
        vector = self.msix.vector(self.config_vector) if self.msix is not None else None
        self._dataplane.state.set_config_interrupt(self.isr, vector)
