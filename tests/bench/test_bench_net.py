"""A load on served network cards: what is counted, and what is noticed of what a network does to frames."""

import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import pytest
from serving import Serve

from pyvirtio.backends.net import Pair
from pyvirtio.bench.frames import FrameLoad, FrameSample
from pyvirtio.bench.net import NetTarget
from pyvirtio.bench.networks import (
    NativeEcho,
    NativeSink,
    Nobody,
    PythonSink,
    PythonSource,
    Returning,
    Sending,
    numbered,
)  # fmt: skip
from pyvirtio.devices.net import Net
from pyvirtio.devices.rng import Rng
from pyvirtio.errors import ConfigError, ProtocolError
from pyvirtio.serve.vhost_user import Rings
from pyvirtio.testing.serving import serve_in_process

BOTH = FrameLoad(direction="both", verify=True)
SECONDS = 0.02
SIZES = (60, 1500, 9000)
STREAM, NUMBER = slice(14, 16), slice(16, 24)
ADDRESSES, PAYLOAD = 12, 28


def measured(path: Path, load: FrameLoad, size: int = 64) -> FrameSample:
    with NetTarget(path, load, size) as target:
        return target.measure(size, SECONDS)


@pytest.mark.parametrize("poll", [False, True], ids=["interrupts", "polled"])
@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
@pytest.mark.parametrize("pairs", [1, 2])
def test_every_frame_that_is_echoed_comes_back_whole_and_in_order(
    tmp_path: Path, packed: bool, poll: bool, pairs: int
) -> None:
    load = replace(BOTH, packed=packed, poll=poll, num_queues=pairs, burst=8)
    served = serve_in_process(NativeEcho(pairs), tmp_path / "s", Rings(packed=packed))
    with served, NetTarget(tmp_path / "s", load, max(SIZES)) as target:
        samples = [target.measure(size, SECONDS) for size in SIZES]
    for size, sample in zip(SIZES, samples, strict=True):
        assert sample.frame_size == size
        assert sample.tx_frames > 0
        assert sample.rx_frames > 0
        assert (sample.tx_bytes, sample.rx_bytes) == (size * sample.tx_frames, size * sample.rx_frames)
        assert (sample.lost, sample.reordered, sample.damaged, sample.foreign) == (0, 0, 0, 0)
        assert sample.failed == 0
        assert sample.cpu is not None
        assert sample.cpu > 0
        assert sample.interrupts == 0 or not poll


@pytest.mark.parametrize("kind", [NativeSink, PythonSink])
def test_a_sink_takes_all_that_is_sent(serve: Serve, kind: type[NativeSink | PythonSink]) -> None:
    card = kind()
    sample = measured(serve(card), FrameLoad())
    assert 0 < sample.tx_frames <= card.plane.counters["tx_frames"]
    assert (sample.rx_frames, sample.lost) == (0, None)


def test_all_queue_pairs_are_used(serve: Serve) -> None:
    backend = Recording(queue_pairs=3)
    measured(serve(Net(backend)), replace(BOTH, num_queues=3))
    assert {number >> 64 for number in backend.sent} == {0, 1, 2}


class Recording(Returning):
    """Returns frames, or what `tampered` makes of them, and knows what it did."""

    def __init__(self, tampered: Callable[[int, bytes], Iterable[bytes]] | None = None, queue_pairs: int = 1) -> None:
        super().__init__(queue_pairs)
        self.tampered = tampered or (lambda _, frame: [frame])
        self.sent: list[int] = []
        """Stream and sequence number of each."""
        self.returned: list[tuple[int, bool]] = []
        """The sequence number of each, and whether it is whole."""

    def send(self, frame: bytes) -> None:
        number = int.from_bytes(frame[NUMBER], "little")
        self.sent.append(int.from_bytes(frame[STREAM], "little") << 64 | number)
        for other in self.tampered(number, frame):
            if self.inject([other]):
                self.returned.append((int.from_bytes(other[NUMBER], "little"), is_whole(other)))

    def expected(self, sample: FrameSample) -> tuple[int, int, int]:
        """lost, reordered and damaged of the frames of one stream that were sent last."""
        numbers = self.sent[-sample.tx_frames :]
        returned = [(number, whole) for number, whole in self.returned if number >= numbers[0]]
        whole = [number for number, is_whole in returned if is_whole]
        overtaken = sum(number < max(whole[:at], default=0) for at, number in enumerate(whole))
        return sample.tx_frames - len(whole), overtaken, len(returned) - len(whole)


def is_whole(frame: bytes) -> bool:
    stream, number = int.from_bytes(frame[STREAM], "little"), int.from_bytes(frame[NUMBER], "little")
    return frame[ADDRESSES:] == numbered(stream, number, frame[PAYLOAD:])[ADDRESSES:]


def seen(sample: FrameSample) -> tuple[int | None, int | None, int | None]:
    return sample.lost, sample.reordered, sample.damaged


def every(count: int, what: Callable[[bytes], Iterable[bytes]]) -> Callable[[int, bytes], Iterable[bytes]]:
    return lambda number, frame: what(frame) if number % count == 0 else [frame]


TAMPERED: dict[str, Callable[[bytes], Iterable[bytes]]] = {
    "lost": lambda frame: [],
    "cut": lambda frame: [frame[:-1]],
    "changed": lambda frame: [frame[:-1] + bytes([frame[-1] ^ 1])],
    "longer": lambda frame: [frame + b"\0"],
}


@pytest.mark.parametrize("case", TAMPERED)
def test_frames_that_are_lost_or_damaged_are_counted(serve: Serve, case: str) -> None:
    backend = Recording(every(3, TAMPERED[case]))
    sample = measured(serve(Net(backend)), BOTH)
    assert seen(sample) == backend.expected(sample)
    assert sample.lost
    assert bool(sample.damaged) == (case != "lost")
    assert (sample.failed > 0) == (case != "lost"), "a network may lose frames"


class Overtaking(Recording):
    """Holds every third frame back until the next one has passed."""

    held = b""

    def send(self, frame: bytes) -> None:
        if int.from_bytes(frame[NUMBER], "little") % 3 == 0:
            self.sent.append(int.from_bytes(frame[NUMBER], "little"))
            self.held = frame
            return
        super().send(frame)

    def __init__(self) -> None:
        super().__init__(lambda _, frame: [frame, *self.take()])

    def take(self) -> Iterable[bytes]:
        if self.held:
            yield self.held
            self.held = b""


def test_frames_that_are_overtaken_are_counted(serve: Serve) -> None:
    backend = Overtaking()
    sample = measured(serve(Net(backend)), BOTH)
    assert seen(sample) == backend.expected(sample)
    assert sample.reordered
    assert sample.damaged == 0


def test_addresses_may_be_swapped_and_other_frames_may_come_in_between(serve: Serve) -> None:
    swapped = Recording(lambda _, frame: [frame[6:12] + frame[:6] + frame[ADDRESSES:], bytes(100)])
    sample = measured(serve(Net(swapped)), BOTH)
    assert (sample.reordered, sample.damaged) == (0, 0)
    assert sample.lost is not None
    assert sample.lost < sample.tx_frames
    assert sample.foreign


def test_what_a_source_sends_is_received_whole_and_in_order(serve: Serve) -> None:
    sample = measured(serve(PythonSource(frame_size=200)), replace(BOTH, direction="rx"))
    assert sample.rx_frames > 0
    assert sample.rx_bytes == 200 * sample.rx_frames
    assert (sample.tx_frames, sample.lost, sample.reordered, sample.damaged, sample.foreign) == (0, 0, 0, 0, 0)


class Skipping(Sending):
    """Leaves every seventh number out."""

    def inject(self, frames: Iterable[bytes]) -> int:
        frames = list(frames)
        kept = [frame for frame in frames if int.from_bytes(frame[NUMBER], "little") % 7]
        while kept and not self._end.is_set():
            kept = kept[super().inject(kept) :]
        return len(frames)


def test_numbers_that_are_missing_in_a_foreign_stream_are_lost(serve: Serve) -> None:
    sample = measured(serve(Net(Skipping(frame_size=64))), replace(BOTH, direction="rx"))
    assert sample.lost is not None
    assert abs(sample.lost - sample.rx_frames / 6) < 2
    assert (sample.reordered, sample.damaged) == (0, 0)


@pytest.mark.parametrize("direction", ["tx", "rx", "both"])
def test_frames_go_in_at_one_socket_and_come_out_at_its_peer(serve: Serve, direction: str) -> None:
    path, peer = (serve(Net(end)) for end in Pair.ends())
    sample = measured(path, replace(BOTH, direction=direction, peer=str(peer)), 1500)
    assert sample.tx_frames > 0
    assert sample.rx_frames > 0
    assert (sample.lost, sample.reordered, sample.damaged, sample.foreign) == (0, 0, 0, 0)


def test_the_cost_is_that_of_both_processes(serve: Serve) -> None:
    path, peer = (serve(Net(end)) for end in Pair.ends())
    with NetTarget(path, replace(BOTH, direction="tx", peer=str(peer)), 64) as target:
        assert target.pids == {os.getpid()}
    with NetTarget(serve("pyvirtio.bench.networks:NativeSink"), FrameLoad(), 64) as target:
        assert target.pids.isdisjoint({os.getpid(), 0})


@pytest.mark.parametrize("direction", ["rx", "both"])
def test_where_nothing_comes_from_nothing_can_be_measured(serve: Serve, direction: str) -> None:
    with pytest.raises(ProtocolError, match="no frame came: a network has to send some"):
        measured(serve(NativeSink()), FrameLoad(direction=direction))


class Breaking(Nobody):
    """Has a defect."""

    def send(self, frame: bytes) -> None:
        raise ZeroDivisionError


def test_a_device_that_breaks_ends_the_run(serve: Serve) -> None:
    with pytest.raises(ProtocolError, match="the device is broken"):
        measured(serve(Net(Breaking(1))), FrameLoad())


@pytest.mark.parametrize(
    ("load", "message"),
    [
        (FrameLoad(num_queues=3), r"--num-queues 3 is more than the back-end has \(2\)"),
        (FrameLoad(packed=True), "--packed is not offered by this back-end"),
    ],
)
def test_what_the_card_cannot_be_asked_is_refused(serve: Serve, load: FrameLoad, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        NetTarget(serve(NativeSink(2)), load, 64)


def test_what_is_no_network_card_is_refused(serve: Serve) -> None:
    with pytest.raises(ProtocolError, match=r"served0\.sock: "):
        NetTarget(serve(Rng(source=bytes)), FrameLoad(), 64)


def test_a_peer_that_is_not_there_is_said(serve: Serve, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere: No such file or directory"):
        NetTarget(serve(NativeSink()), FrameLoad(peer=str(tmp_path / "nowhere")), 64)
