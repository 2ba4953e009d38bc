"""Frames per second and CPU time per frame of the network plane, in process and over a tap interface.

The driver's rings are filled before each round, and only the service of the queues is timed, on the thread that calls
it: with two queue pairs on two threads at once. sink: the driver sends, nobody is there. source: frames wait in a
datagram socket for each queue pair. echo: frames go out through a datagram socket that is connected to itself, and come
in again. to tap, from tap, echo by tap: the driver sends to an interface of the host, receives what the host sends, and
both in turn, where making one is permitted: `unshare -rn python benches/net.py` has a network of its own. python: the
driver sends to a `NetBackend` in Python; inject: what that sends comes in, all on one queue.
"""

import fcntl
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

from measure import Report, Samples, arguments

from pyvirtio._core import VirtQueue
from pyvirtio.backends.net import NetBackend
from pyvirtio.backends.tap import Tap
from pyvirtio.devices.net import Net
from pyvirtio.errors import ConfigError
from pyvirtio.spec import Feature
from pyvirtio.testing import Guest, VirtioDriver
from pyvirtio.testing.net import Header, Nic
from pyvirtio.testing.queue import Queue
from pyvirtio.testing.ring import WRITE, Desc

MIB = 1 << 20
RING = 1024
LENGTHS = (64, 1500)
ROUNDS = 100
BURST = 64
"""Frames that the socket of an echo holds, and more than that a tap."""
IFF_UP, SIOCSIFFLAGS = 1, 0x8914
MQ, VQ_PAIRS_SET = 4, 0
UDP = 17

Cost = tuple[int, float, float]
"""Frames, seconds, seconds of CPU time."""


class Sink(NetBackend):
    """Nobody is there, on any number of queue pairs."""

    def __init__(self, pairs: int) -> None:
        self.pairs = pairs

    @property
    def queue_pairs(self) -> int:
        return self.pairs


class Counting(Sink):
    """A network in Python that counts."""

    count = 0

    def send(self, frame: bytes) -> None:
        self.count += 1


class Loop(NetBackend):
    """What is sent comes back on the same queue pair, through the kernel."""

    framing = "datagram"

    def __init__(self, pairs: int) -> None:
        self.sockets = [socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) for _ in range(pairs)]
        for each in self.sockets:
            each.bind("")  # an abstract name
            each.connect(each.getsockname())
        self.fds = [each.fileno() for each in self.sockets]

    def close(self) -> None:
        for each in self.sockets:
            each.close()


class Feed(Loop):
    """Frames wait in a socket for each queue pair."""

    def fill(self, pair: int, frame: bytes) -> int:
        """How many frames it takes."""
        for count in range(BURST):
            try:
                self.sockets[pair].send(frame, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return count
        return BURST


class Lane:
    """One queue whose descriptors stand still: a buffer each, which hold header and frame."""

    def __init__(self, queue: Queue, vq: VirtQueue, length: int, *, writable: bool) -> None:
        self.ring, self.vq = queue.ring, vq
        data = Header().pack() + bytes(range(14)).ljust(length, b"x")
        for slot in range(self.ring.size):
            address = queue.heap.allocate(len(data))
            queue.memory.write(address, data)
            self.ring.write_desc(slot, Desc(address, len(data), WRITE if writable else 0))
            self.ring.write_avail(slot, slot)

    def offer(self, count: int = RING) -> None:
        self.ring.avail_idx = self.ring.avail_idx + count

    @property
    def idle(self) -> int:
        """Buffers that may be offered."""
        idle: int = self.ring.size - ((self.ring.avail_idx - self.ring.used_idx) & 0xFFFF)
        return idle

    def serve(self) -> Cost:
        """Serve what was offered; there may be less to receive."""
        before = self.ring.used_idx
        start, cpu = time.perf_counter(), time.thread_time()
        self.vq.service()
        spent = time.perf_counter() - start, time.thread_time() - cpu
        return (self.ring.used_idx - before) & 0xFFFF, *spent


class Station:
    """A card with a driver that only fills rings."""

    def __init__(self, guest: Guest, netdev: NetBackend, length: int) -> None:
        self.netdev = netdev
        net = Net(netdev, rx_queue_size=RING, tx_queue_size=RING)
        self.driver: VirtioDriver = guest.plug(net, features=~Feature.EVENT_IDX)
        nic = Nic(self.driver, self.driver.features)
        if len(nic.rx) > 1:
            nic.command(MQ, VQ_PAIRS_SET, struct.pack("<H", len(nic.rx)))
        vqs = self.driver.function.dataplane.queues
        self.rx = [Lane(queue, vqs[queue.index], length, writable=True) for queue in nic.rx]
        self.tx = [Lane(queue, vqs[queue.index], length, writable=False) for queue in nic.tx]
        for lane in (*self.rx, *self.tx):
            assert not lane.vq.attached


def sending(station: Station) -> Cost:
    return together([partial(repeat, lane) for lane in station.tx])


def repeat(lane: Lane) -> Cost:
    costs = []
    for _ in range(ROUNDS):
        lane.offer()
        costs.append(lane.serve())
    return total(costs)


def together(jobs: Sequence[Callable[[], Cost]], *, timed_as_a_whole: bool = True) -> Cost:
    """All frames, in the time that passed (or that the longest job says), at the CPU time of all threads."""
    costs: list[Cost] = []

    def run(job: Callable[[], Cost]) -> None:
        costs.append(job())

    threads = [threading.Thread(target=run, args=(job,)) for job in jobs]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wall = time.perf_counter() - start if len(jobs) > 1 else costs[0][1]
    frames, _, cpu = total(costs)
    return frames, wall if timed_as_a_whole else max(seconds for _, seconds, _ in costs), cpu


def total(costs: list[Cost]) -> Cost:
    frames, seconds, cpu = zip(*costs, strict=True)
    return sum(frames), sum(seconds), sum(cpu)


def injecting(station: Station, length: int) -> Cost:
    (lane,), costs = station.rx, []
    frame = bytes(range(14)).ljust(length, b"x")
    for _ in range(ROUNDS):
        station.netdev.inject([frame] * RING)
        lane.offer()
        costs.append(lane.serve())
    return total(costs)


def receiving(station: Station, fill: Callable[[int], int]) -> Cost:
    """What `fill` has come in on each queue pair; only taking it is timed."""
    jobs = [partial(take, lane, partial(fill, pair)) for pair, lane in enumerate(station.rx)]
    return together(jobs, timed_as_a_whole=False)


def take(lane: Lane, fill: Callable[[], int]) -> Cost:
    """No buffer is left over: the I/O thread would wait for frames as well."""
    costs = []
    for _ in range(10 * ROUNDS):
        lane.offer(fill())
        costs.append(lane.serve())
    return total(costs)


def echoing(station: Station) -> Cost:
    return together([partial(echo, rx, tx) for rx, tx in zip(station.rx, station.tx, strict=True)])


def echo(rx: Lane, tx: Lane) -> Cost:
    costs = []
    for _ in range(10 * ROUNDS):
        tx.offer(BURST)
        sent = tx.serve()
        rx.offer(sent[0])
        received = rx.serve()
        costs.append((received[0], sent[1] + received[1], sent[2] + received[2]))
    return total(costs)


def bouncing(station: Station, fill: Callable[[int], int]) -> Cost:
    """As many frames each way on each queue pair, over a tap."""
    return total([sending(station), receiving(station, fill)])


class Host:
    """The host's side of a tap: sends so that frames come on the queue pair that is wanted."""

    def __init__(self, tap: Tap, length: int) -> None:
        self.tap = tap
        self.socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
        self.socket.bind((tap.ifname, 0))
        self.frames: dict[int, bytes] = {}
        flows = (datagram(port, length) for port in range(1, 1 << 16))
        while len(self.frames) < tap.queue_pairs:
            frame = next(flows)
            self.frames[self._pair_of(frame)] = frame

    def _pair_of(self, frame: bytes) -> int:
        """The host's choice, by the flow."""
        self.socket.send(frame)
        while True:
            for fd in select.select(self.tap.fds, [], [])[0]:
                if os.read(fd, 1 << 16).endswith(frame):
                    return self.tap.fds.index(fd)

    def fill(self, pair: int) -> int:
        for _ in range(BURST):
            self.socket.send(self.frames[pair])
        return BURST


def datagram(port: int, length: int) -> bytes:
    """A UDP datagram to nobody, as a frame of `length` bytes."""
    ip = struct.pack(
        ">BBHIBBH4s4s", 0x45, 0, length - 14, 0, 64, UDP, 0, bytes([198, 51, 100, 1]), bytes([198, 51, 100, 2])
    )
    udp = struct.pack(">HHHH", port, 9, length - 34, 0)
    return (b"\xff" * 6 + bytes(6) + b"\x08\x00" + ip + udp).ljust(length, b"x")


@contextmanager
def stations(length: int) -> Iterator[dict[str, Callable[[], Cost]]]:
    """What is measured, by name."""
    with ExitStack() as stack:
        guest = stack.enter_context(Guest(ioeventfd=False, memory=256 * MIB))
        modes: dict[str, Callable[[], Cost]] = {}
        for pairs in (1, 2):
            queues = f"{pairs} queue{'s' * (pairs > 1)}"
            for name, kind in (("sink", Sink), ("python", Counting)):
                modes[f"{name}, {queues}"] = partial(sending, Station(guest, kind(pairs), length))
            modes[f"echo, {queues}"] = partial(echoing, Station(guest, Loop(pairs), length))
            feed = Feed(pairs)
            frame = bytes(range(14)).ljust(length, b"x")
            modes[f"source, {queues}"] = partial(
                receiving, Station(guest, feed, length), partial(feed.fill, frame=frame)
            )
            if tap := open_tap(pairs):
                station = Station(guest, tap, length)
                host = Host(tap, length)
                stack.callback(host.socket.close)
                modes[f"to tap, {queues}"] = partial(sending, station)
                modes[f"from tap, {queues}"] = partial(receiving, station, host.fill)
                modes[f"echo by tap, {queues}"] = partial(bouncing, station, host.fill)
        modes["inject, 1 queue"] = partial(injecting, Station(guest, Sink(1), length), length)
        yield modes


def open_tap(pairs: int) -> Tap | None:
    """An interface that is up, if that is permitted."""
    try:
        tap = Tap(queues=pairs)
    except ConfigError:
        return None
    with socket.socket() as control:
        fcntl.ioctl(control, SIOCSIFFLAGS, struct.pack("16sH22x", tap.ifname.encode(), IFF_UP))
    return tap


def measured(repetitions: int, length: int) -> tuple[Samples, Samples]:
    """Millions of frames per second, and nanoseconds of CPU time per frame; the modes take turns."""
    rates: Samples = {}
    costs: Samples = {}
    with stations(length) as modes:
        for round_ in range(repetitions + 1):
            for name, run in modes.items():
                frames, seconds, cpu = run()
                if round_:
                    rates.setdefault(name, []).append(frames / seconds / 1e6)
                    costs.setdefault(name, []).append(cpu / frames * 1e9)
    return rates, costs


def main() -> None:
    args = arguments(__doc__).parse_args()
    report = Report(args.json)
    for length in LENGTHS:
        rates, costs = measured(args.repetitions, length)
        report.add(f"{length}-byte frames", "million/s", rates)
        report.add(f"{length}-byte frames, CPU time of each", "ns", costs)
    report.close()


if __name__ == "__main__":
    main()
