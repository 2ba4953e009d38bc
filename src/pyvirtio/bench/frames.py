"""What a measurement asks of a network card, and the figures of one."""

from collections.abc import Mapping
from dataclasses import dataclass

from pyvirtio.bench.load import MIB, looks_in_words, ring_in_words
from pyvirtio.bench.sample import Figure, Sample

DIRECTIONS = ("tx", "rx", "both")
"""As the driver sees it: it sends, it receives, or both at once."""
NANO = 1e9


@dataclass(frozen=True)
class FrameLoad:
    """`num_queues` counts queue pairs. Up to `burst` frames, or buffers for some, are offered at a time. `peer` is the
    socket of a second card, where frames of "tx" come out.
    """

    direction: str = "tx"
    peer: str | None = None
    num_queues: int = 1
    queue_size: int = 256
    burst: int = 32
    packed: bool = False
    poll: bool = False
    verify: bool = False

    varies = ("frame_size", "frame")
    compared = ("frames_per_second", "cpu_per_frame")
    drawn = (("frames_per_second",), ("cpu_per_frame",))
    units = "Frames of both directions count; the back-end's CPU time for a frame in nanoseconds."

    @property
    def figures(self) -> Mapping[str, Figure]:
        figures = {"frames_per_second": Figure("frames/s", "frames per second")}
        if self.direction == "both":
            figures["tx_per_second"] = Figure("tx/s", "frames sent per second")
            figures["rx_per_second"] = Figure("rx/s", "frames received per second")
        figures["bandwidth"] = Figure("MiB/s", "MiB per second", factor=1 / MIB)
        figures["cpu_per_frame"] = Figure("CPU", "CPU time per frame in nanoseconds", factor=NANO)
        if self.verify:
            for name in ("lost", "reordered", "damaged"):
                figures[name] = Figure(name, f"frames {name}")
        return figures

    def describe(self) -> str:
        pairs = "1 queue pair" if self.num_queues == 1 else f"{self.num_queues} queue pairs"
        ring = f"{ring_in_words(self.packed)} of {self.queue_size}, bursts of {self.burst}"
        way = f"{self.direction} to {self.peer}" if self.peer else self.direction
        return f"{way}, {pairs}, {ring}, {looks_in_words(self.poll, self.verify)}."


@dataclass(frozen=True)
class FrameSample(Sample):
    """One run with frames of one size. What became of them is known with `verify` only.

    lost: sent and not received whole; reordered: received after one that was sent later, or twice; foreign: received,
    and not of this run.
    """

    frame_size: int
    tx_frames: int
    rx_frames: int
    tx_bytes: int
    rx_bytes: int
    lost: int | None = None
    reordered: int | None = None
    damaged: int | None = None
    foreign: int | None = None

    @property
    def failed(self) -> int:
        """How much went wrong; a network may lose frames."""
        return (self.reordered or 0) + (self.damaged or 0)

    @property
    def frames_per_second(self) -> float:
        return (self.tx_frames + self.rx_frames) / self.seconds

    @property
    def tx_per_second(self) -> float:
        return self.tx_frames / self.seconds

    @property
    def rx_per_second(self) -> float:
        return self.rx_frames / self.seconds

    @property
    def bandwidth(self) -> float:
        """Bytes per second."""
        return (self.tx_bytes + self.rx_bytes) / self.seconds

    @property
    def cpu_per_frame(self) -> float | None:
        return None if self.cpu is None else self.cpu / (self.tx_frames + self.rx_frames)
