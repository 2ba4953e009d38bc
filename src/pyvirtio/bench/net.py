"""A network card on a vhost-user socket, or two with a network between them, ready for loads."""

import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from pyvirtio._core import DriverQueue, NetLoad
from pyvirtio.bench.driver import Driver, allocate, usage
from pyvirtio.bench.frames import FrameLoad, FrameSample
from pyvirtio.bench.sample import WARM_UP, costed
from pyvirtio.errors import ProtocolError
from pyvirtio.spec import Feature, NetFeature

HEADER = 12
LEAST_BUFFER = 1536
"""Room for what an ordinary network sends, however small our frames are."""
CACHE_LINE = 64


class NetTarget:
    """The card behind `path`, set up for frames of up to `frame_size` bytes; see `Driver`.

    With a peer frames go in at one socket and come out at the other.
    """

    def __init__(self, path: Path, load: FrameLoad, frame_size: int, pid: int | None = None) -> None:
        self.load = load
        wanted = HEADER + max(frame_size, LEAST_BUFFER)
        self._room = -(-wanted // CACHE_LINE) * CACHE_LINE
        paths = [path, Path(load.peer)] if load.peer else [path]
        memory, heap = allocate(len(paths) * 2 * load.num_queues * load.queue_size * self._room)
        with ExitStack() as stack:
            self._drivers = [stack.enter_context(Driver(each, memory, heap, pid)) for each in paths]
            self._net = self._set_up()
            self._close = stack.pop_all().close

    @property
    def pids(self) -> set[int]:
        return {driver.pid for driver in self._drivers}

    def measure(self, frame_size: int, seconds: float, _: int = 0) -> FrameSample:
        """Send and receive for some seconds, after a moment that does not count."""
        load, net, driver = self.load, self._net, self._drivers[0]

        def run(seconds: float) -> dict[str, Any]:
            figures = net.run(
                frame_size=frame_size, seconds=seconds, burst=load.burst, poll=load.poll, verify=load.verify
            )
            if load.direction != "tx" and not figures["rx_frames"]:
                raise ProtocolError("no frame came: a network has to send some, or to return them")
            return figures

        with driver.faults():
            run(WARM_UP)
            self._verdict()
            figures = costed(lambda: run(seconds), lambda: usage(self.pids))
            return FrameSample(frame_size=frame_size, **figures, **self._verdict())

    def check(self) -> None:
        """There is nothing left to be checked."""

    def close(self) -> None:
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _verdict(self) -> dict[str, Any]:
        return self._net.settle(poll=self.load.poll) if self.load.verify else {}

    def _set_up(self) -> NetLoad:
        cards = [self._start(driver) for driver in self._drivers]
        (rx, tx), (peer_rx, peer_tx) = cards[0], cards[-1]
        transmit, receive = {
            "tx": (tx, peer_rx if len(cards) > 1 else []),
            "rx": (peer_tx if len(cards) > 1 else [], rx),
            "both": (tx + peer_tx, rx + peer_rx) if len(cards) > 1 else (tx, rx),
        }[self.load.direction]
        return NetLoad(
            self._drivers[0].memory, room=self._room, transmit=transmit, receive=receive, first=time.time_ns()
        )

    def _start(self, driver: Driver) -> tuple[list[DriverQueue], list[DriverQueue]]:
        """The receive and the transmit queues of a card."""
        load = self.load
        names = [f"{kind}{pair}" for pair in range(load.num_queues) for kind in ("receiveq", "transmitq")]
        with driver.faults():
            options = {"--packed": int(Feature.RING_PACKED)} if load.packed else {}
            driver.negotiate(NetFeature.MQ if load.num_queues > 1 else 0, load.num_queues, options)
            queues = driver.start(names, load.queue_size, load.queue_size * self._room)
        return queues[0::2], queues[1::2]
