"""Hundreds of thousands of frames with numbers and checksums: each arrives as it was, or is counted."""

import struct
import threading
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence

import pytest
from wire import Wire, counters, device_of

from pyvirtio.backends.net import NetBackend, Pair
from pyvirtio.devices.net import Net
from pyvirtio.spec import NetFeature
from pyvirtio.testing import Guest, VirtioDriver
from pyvirtio.testing.net import Header, Nic
from pyvirtio.testing.queue import HANG
from pyvirtio.testing.ring import WRITE, Desc

HEADER = 12
FRONT = b"\xff" * 6 + b"\x52\x54\0\0\0\1" + b"\x88\xb5"
LENGTHS = (60, 64, 100, 577, 1514)
EVENT_IDX = 1 << 29


def numbered(number: int, length: int) -> bytes:
    """A frame with its number, and the checksum of both number and filling at its end."""
    body = FRONT + struct.pack("<Q", number) + bytes((number + n) & 0xFF for n in range(4))
    body = body.ljust(length - 4, bytes([number & 0xFF]))
    return body + struct.pack("<I", zlib.crc32(body))


def number_of(frame: bytes) -> int:
    """The number of a frame that is whole."""
    body, (checksum,) = frame[:-4], struct.unpack("<I", frame[-4:])
    assert zlib.crc32(body) == checksum, "a frame was damaged"
    number: int = struct.unpack_from("<Q", frame, len(FRONT))[0]
    return number


class Slots:
    """A queue whose descriptors stand still: slot n has a buffer of its own, and is offered again once it is used."""

    def __init__(self, nic: Nic, queue: str, size: int) -> None:
        self.queue = getattr(nic, queue)[0]
        self.ring, self.memory, self.size = self.queue.ring, self.queue.memory, size
        self.buffers = [self.queue.heap.allocate(size) for _ in range(self.ring.size)]
        for slot, address in enumerate(self.buffers):
            self.ring.write_desc(slot, Desc(address, size, WRITE if queue == "rx" else 0))

    def release(self) -> None:
        """The driver starts over."""
        for address in self.buffers:
            self.queue.heap.free(address, self.size)

    def offer(self, slots: list[int]) -> None:
        for slot in slots:
            self.ring.offer(slot)
        self.queue.kick()

    def used(self) -> Iterator[tuple[int, int]]:
        """(slot, bytes written) of what the device has used since."""
        while (used := self.ring.pop_used()) is not None:
            yield used


class Sender:
    """Sends numbered frames as fast as slots come free."""

    def __init__(self, nic: Nic, lengths: Sequence[int] = LENGTHS) -> None:
        self.slots = Slots(nic, "tx", HEADER + max(lengths))
        self.lengths = lengths
        self.free = list(range(self.slots.ring.size))
        self.sent = 0

    def send(self, most: int) -> None:
        self.free.extend(slot for slot, _ in self.slots.used())
        filled: list[int] = []
        while self.free and len(filled) < most:
            slot = self.free.pop()
            frame = numbered(self.sent, self.lengths[self.sent % len(self.lengths)])
            self.slots.memory.write(self.slots.buffers[slot], Header().pack() + frame)
            self.slots.ring.write_desc(slot, Desc(self.slots.buffers[slot], HEADER + len(frame)))
            filled.append(slot)
            self.sent += 1
        self.slots.offer(filled)

    @property
    def idle(self) -> bool:
        self.free.extend(slot for slot, _ in self.slots.used())
        return bool(len(self.free) == self.slots.ring.size)


class Receiver:
    """Offers slots, and puts frames together that came in several."""

    def __init__(self, nic: Nic, size: int = 2048) -> None:
        self.slots = Slots(nic, "rx", size)
        self.merges = nic.merges
        self.received: list[int] = []
        self._free = list(range(self.slots.ring.size))
        self._frame, self._missing = b"", 0

    def offer(self, most: int = 1 << 16) -> None:
        slots, self._free = self._free[:most], self._free[most:]
        self.slots.offer(slots)

    def take(self) -> None:
        for slot, length in self.slots.used():
            data = self.slots.memory.read(self.slots.buffers[slot], length)
            self._free.append(slot)
            if not self._missing:
                header = Header.unpack(data)
                data, self._missing = data[HEADER:], header.num_buffers if self.merges else 1
            self._frame += data
            self._missing -= 1
            if not self._missing:
                self.received.append(number_of(self._frame))
                self._frame = b""


class Deadline:
    """Fails what makes no progress for too long."""

    def __init__(self) -> None:
        self.event = threading.Event()
        self.turns = 0

    def wait(self) -> None:
        self.turns += 1
        assert self.turns < HANG / 0.0002, "hangs"
        self.event.wait(0.0002)

    def progress(self) -> None:
        self.turns = 0


def card(guest: Guest, netdev: NetBackend, *, features: int = ~EVENT_IDX, **properties: int) -> Nic:
    driver = guest.plug(Net(netdev, **properties), features=features)  # type: ignore[arg-type]
    return Nic(driver, driver.features)


def dropped(nic: Nic, direction: str) -> int:
    return sum(count for name, count in counters(nic).items() if name.startswith(f"{direction}_dropped"))


@pytest.mark.parametrize(
    ("frames", "size", "batch"),
    [(120_000, 2048, 256), (30_000, 128, 256), (20_000, 2048, 3)],
    ids=["large buffers", "tiny buffers", "starved"],
)
def test_frames_between_two_cards_arrive_whole_and_in_order(guest: Guest, frames: int, size: int, batch: int) -> None:
    one, other = (card(guest, end) for end in Pair.ends())
    sender, receiver = Sender(one), Receiver(other, size)
    receiver.offer(batch)
    deadline = Deadline()
    while len(receiver.received) < frames:
        before = len(receiver.received)
        if sender.sent < frames:
            sender.send(frames - sender.sent)
        receiver.take()
        receiver.offer(batch)
        deadline.progress() if len(receiver.received) > before else deadline.wait()
    assert receiver.received == list(range(frames))
    assert (dropped(one, "tx"), dropped(other, "rx")) == (0, 0)
    assert (
        device_of(one.driver).plane.counters["tx_frames"]
        == frames
        == device_of(other.driver).plane.counters["rx_frames"]
    )


def test_both_directions_at_once(guest: Guest) -> None:
    cards = [card(guest, end, rx_queue_size=128, tx_queue_size=64) for end in Pair.ends()]
    senders, receivers = [Sender(nic) for nic in cards], [Receiver(nic) for nic in cards]
    deadline = Deadline()
    while any(len(receiver.received) < 20_000 for receiver in receivers):
        before = [len(receiver.received) for receiver in receivers]
        for sender, receiver in zip(senders, receivers, strict=True):
            sender.send(min(64, 20_000 - sender.sent))
            receiver.take()
            receiver.offer()
        deadline.progress() if before != [len(receiver.received) for receiver in receivers] else deadline.wait()
    assert all(receiver.received == list(range(20_000)) for receiver in receivers)


def test_a_reset_under_load_loses_only_what_is_counted(guest: Guest) -> None:
    """The receiving driver starts over again and again while frames come."""
    wire = Wire()
    driver = guest.plug(Net(wire), features=~EVENT_IDX)
    received: Counter[int] = Counter()
    put = 0
    for life in range(60):
        receiver = Receiver(Nic(driver, driver.features), (2048, 64)[life % 2])
        receiver.offer(100)
        put += put_numbered(wire, put, 60)
        deadline = Deadline()
        while not receiver.received:
            receiver.take()
            deadline.wait()
        driver.start()
        receiver.slots.release()
        received.update(receiver.received)
    nic = Nic(driver, driver.features)
    receiver = Receiver(nic)
    deadline = Deadline()
    while device_of(nic.driver).plane.counters["rx_frames"] + dropped(nic, "rx") < put:
        receiver.take()
        receiver.offer()
        deadline.wait()
    receiver.take()
    received.update(receiver.received)
    assert put > 1000
    assert max(received.values()) == 1, "no frame came twice"
    assert receiver.received == sorted(receiver.received)


def put_numbered(wire: Wire, first: int, count: int) -> int:
    """Send numbered frames to the device while the socket takes them; return how many it took."""
    wire.peers[0].setblocking(False)
    for done in range(count):
        try:
            wire.put(numbered(first + done, 600))
        except BlockingIOError:
            return done
    return count


def test_a_sending_driver_that_resets_under_load(guest: Guest) -> None:
    wire = Wire()
    driver = guest.plug(Net(wire), features=~EVENT_IDX)
    arrived: list[int] = []
    stopped = threading.Event()
    thread = threading.Thread(target=collect, args=(wire, arrived, stopped))
    thread.start()
    nic = Nic(driver, driver.features)
    for life in range(40):
        nic = Nic(driver, driver.features)
        sender = Sender(nic)
        sender.sent = life << 20
        for _ in range(3):
            sender.send(100)
        driver.start()
        sender.slots.release()
    driver.status = 0
    stopped.set()
    thread.join(HANG)
    assert len(arrived) == device_of(nic.driver).plane.counters["tx_frames"]
    assert arrived == sorted(arrived)
    assert dropped(nic, "tx") == 0


def collect(wire: Wire, arrived: list[int], stopped: threading.Event) -> None:
    """Take frames from the wire until there are no more after `stopped`."""
    wire.peers[0].settimeout(0.05)
    while True:
        ended = stopped.is_set()
        try:
            arrived.append(number_of(wire.take()[1]))
        except TimeoutError:
            if ended:
                return


def test_a_full_network_slows_the_driver_down_and_loses_nothing(guest: Guest) -> None:
    wire = Wire(room=16384)
    nic = card(guest, wire, tx_queue_size=1024)
    sender = Sender(nic, LENGTHS[:-1])
    sender.send(1024)
    assert not sender.idle
    arrived: list[int] = []
    while len(arrived) < 1024:
        arrived.append(number_of(wire.take()[1]))
    assert arrived == list(range(1024))
    deadline = Deadline()
    while not sender.idle:
        deadline.wait()


def test_a_full_stream_goes_on_where_it_stopped(guest: Guest) -> None:
    wire = Wire(framing="stream", header=False, room=16384)
    nic = card(guest, wire, tx_queue_size=1024)
    sender = Sender(nic, LENGTHS[:-1])
    sender.send(1024)
    assert not sender.idle
    stream = b""
    arrived: list[int] = []
    while len(arrived) < 1024:
        stream += wire.peers[0].recv(1 << 16)
        while len(stream) >= 4 and len(stream) >= 4 + (length := int.from_bytes(stream[:4], "big")):
            arrived.append(number_of(stream[4 : 4 + length]))
            stream = stream[4 + length :]
    assert arrived == list(range(1024))
    assert stream == b""


def test_a_network_in_python_that_echoes(guest: Guest) -> None:
    class Echo(NetBackend):
        """Gives every frame back."""

        refused = 0

        def send(self, frame: bytes) -> None:
            self.refused += 1 - self.inject([frame])

    network = Echo()
    nic = card(guest, network, features=~(EVENT_IDX | NetFeature.MRG_RXBUF))
    sender, receiver = Sender(nic), Receiver(nic)
    receiver.offer()
    deadline = Deadline()
    while sender.sent < 30_000 or not sender.idle:
        sender.send(min(256, 30_000 - sender.sent))
        receiver.take()
        receiver.offer()
        deadline.wait() if not sender.free else deadline.progress()
    expected = 30_000 - network.refused
    while len(receiver.received) < expected:
        receiver.take()
        receiver.offer()
        deadline.wait()
    assert receiver.received == sorted(set(receiver.received))
    assert dropped(nic, "rx") == network.refused


def test_pause_and_resume_lose_no_buffer_and_no_frame(guest: Guest) -> None:
    """Bus mastering goes off and on: the rings stop, and go on where they were."""
    one, other = (card(guest, end) for end in Pair.ends())
    sender, receiver = Sender(one), Receiver(other, 256)
    receiver.offer()
    deadline = Deadline()
    turns = 0
    while len(receiver.received) < 5000:
        before = len(receiver.received)
        sender.send(min(50, 5000 - sender.sent))
        receiver.take()
        receiver.offer()
        turns += 1
        if turns % 7 == 0:
            for nic in (one, other):
                assert isinstance(nic.driver, VirtioDriver)
                nic.driver.pci.command &= ~4
                nic.driver.pci.command |= 4
        deadline.progress() if len(receiver.received) > before else deadline.wait()
    assert receiver.received == list(range(5000))


@pytest.mark.parametrize("in_order", [False, True], ids=["any order", "in order"])
def test_frames_through_packed_rings(guest: Guest, in_order: bool) -> None:
    """Large frames take several buffers, and wait while there are too few."""
    drivers = [guest.plug(Net(end), packed=True, in_order=in_order, queue_size=32) for end in Pair.ends()]
    one, other = (Nic(driver, driver.features) for driver in drivers)
    number = 0
    for _ in range(300):
        sent = [numbered(number + n, length) for n, length in enumerate(LENGTHS)]
        number += len(sent)
        buffers = [one.send(frame, kick=frame is sent[-1]) for frame in sent]
        for count in (5, 1, 1):  # all together they need seven, of which the last frame takes three
            other.post(600, count)
        assert [other.receive().frame for _ in sent] == sent
        for buffer in buffers:
            buffer.wait()
    assert (dropped(one, "tx"), dropped(other, "rx")) == (0, 0)
