"""The console: ports, control messages, and bytes that neither side loses or has to wait for."""

import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from pyvirtio.backends.chardev import Chardev, Null, Pty, Socket
from pyvirtio.devices.console import Console, ConsoleFeature, Control
from pyvirtio.errors import ConfigError
from pyvirtio.testing import Guest, VirtioDriver
from pyvirtio.testing.queue import HANG, Buffer
from pyvirtio.testing.ring import NEXT, Desc

MULTIPORT = ConsoleFeature.MULTIPORT
MIB = 1 << 20


class Wire(Chardev):
    """One end of a socket pair; the test has the other, `far`."""

    def __init__(self, name: str = "wire") -> None:
        super().__init__(name)
        self.far, near = socket.socketpair()
        self.far.settimeout(HANG)
        near.setblocking(False)
        self.input = self.output = self.own(near.detach())

    def close(self) -> None:
        super().close()
        self.far.close()

    def receive(self, count: int) -> bytes:
        """Exactly `count` bytes that the guest has sent."""
        data = b""
        while len(data) < count:
            more = self.far.recv(count - len(data))
            assert more
            data += more
        return data


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + HANG
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.0005)


def plug_single(guest: Guest, wire: Chardev, **options: object) -> VirtioDriver:
    """A driver that knows one port only."""
    return guest.plug(Console(wire), features=~MULTIPORT, **options)  # type: ignore[arg-type]


class Ports:
    """A driver of several ports: gives buffers to the control queue and reads what comes."""

    def __init__(self, guest: Guest, console: Console) -> None:
        self.console = console
        self.driver = guest.plug(console)
        self.buffers = [self.driver.c_receiveq.add(writable=64) for _ in range(16)]
        self.driver.c_receiveq.kick()

    def say(self, number: int, event: int, value: int = 1) -> None:
        buffer = self.driver.c_transmitq.add(struct.pack("<IHH", number, event, value))
        self.driver.c_transmitq.kick()
        buffer.wait()

    def hear(self) -> tuple[int, Control, int, bytes]:
        """The next control message of the device."""
        message = self.buffers.pop(0).wait()
        self.buffers.append(self.driver.c_receiveq.add(writable=64))
        self.driver.c_receiveq.kick()
        number, event, value = struct.unpack("<IHH", message[:8])
        return number, Control(event), value, message[8:]

    def start(self) -> None:
        """What Linux does with each port, a program that opens it included."""
        self.say(0xFFFFFFFF, Control.DEVICE_READY)
        added = [self.hear()[:2] for _ in self.console.ports[0 if self.console.has_console else 1 :]]
        for number, event in added:
            assert event is Control.DEVICE_ADD
            self.say(number, Control.PORT_READY)
            while self.hear()[1] is not Control.PORT_OPEN:
                pass
            self.say(number, Control.PORT_OPEN)


@pytest.fixture(autouse=True)
def wire() -> Iterator[Wire]:
    """Made before the guest, as all that is used automatically, so that it outlives the console."""
    chardev = Wire()
    yield chardev
    chardev.close()


def test_a_queue_that_is_reset_in_the_middle_of_a_message(guest: Guest, wire: Wire) -> None:
    """The rest of the message is lost, and the port is not."""
    driver = guest.plug(Console(wire), features=~int(MULTIPORT))
    driver.transmitq0.add(b"x" * MIB)
    driver.transmitq0.kick()
    until(lambda: driver.function.dataplane.queues[1].in_flight == 1)
    driver.reset_queue(1)
    driver.renew_queue(1).add(b"after")
    driver.transmitq0.kick()
    data = b""
    while not data.endswith(b"after"):
        data += wire.far.recv(MIB)
    assert len(data) < MIB


@pytest.mark.guest(transport=("modern", "legacy", "vhost-user"))
def test_what_the_guest_sends_arrives(guest: Guest, wire: Wire) -> None:
    driver = plug_single(guest, wire)
    buffers = [driver.transmitq0.add(b"line %d\n" % n) for n in range(3)]
    driver.transmitq0.kick()
    assert wire.receive(21) == b"line 0\nline 1\nline 2\n"
    assert [buffer.wait() for buffer in buffers] == [b""] * 3


@pytest.mark.guest(transport=("modern", "legacy", "vhost-user"))
def test_what_is_typed_arrives_in_the_buffers_of_the_guest(guest: Guest, wire: Wire) -> None:
    driver = plug_single(guest, wire)
    first, second = [driver.receiveq0.add(writable=4) for _ in range(2)]
    driver.receiveq0.kick()
    wire.far.send(b"typed")
    assert first.wait() + second.wait() == b"typed"


def test_what_is_typed_before_the_guest_has_buffers_waits(guest: Guest, wire: Wire) -> None:
    wire.far.send(b"early")
    driver = plug_single(guest, wire)
    buffer = driver.receiveq0.add(writable=16)
    driver.receiveq0.kick()
    assert buffer.wait() == b"early"


def test_a_guest_without_buffers_stops_the_host(guest: Guest, wire: Wire) -> None:
    """What is held is bounded: the rest stays with whoever sends it, and none of it is lost."""
    driver = plug_single(guest, wire)
    buffer = driver.receiveq0.add(writable=1)
    driver.receiveq0.kick()
    wire.far.setblocking(False)
    sent = 0
    with suppress(BlockingIOError):
        while True:
            sent += wire.far.send(bytes([sent % 251]) * 100)
    assert buffer.wait() == b"\0"
    port = driver.function.device.ports[0]  # type: ignore[attr-defined]
    assert len(port.inbox) <= port.INBOX
    got = 1
    while got < sent:
        buffer = driver.receiveq0.add(writable=8192)
        driver.receiveq0.kick()
        got += len(buffer.wait())
    assert got == sent


def test_a_host_that_reads_nothing_stops_the_guest(guest: Guest, wire: Wire) -> None:
    driver = plug_single(guest, wire)
    buffers: list[Buffer] = []
    for _ in range(60):
        buffers.append(driver.transmitq0.add(bytes(16 * 1024)))
        driver.transmitq0.kick()
    port = driver.function.device.ports[0]  # type: ignore[attr-defined]
    until(lambda: bool(port.outbox))
    driver.take_interrupts()
    assert not buffers[-1].done
    assert len(port.outbox) <= port.PIECE
    wire.receive(60 * 16 * 1024)
    assert [buffer.wait() for buffer in buffers] == [b""] * 60


def test_a_request_larger_than_all_memory_is_served_in_pieces(guest: Guest) -> None:
    """Descriptors may overlap: 16 of them say 16 MiB."""
    driver = plug_single(guest, Null())
    at = driver.heap.allocate(1 << 20)
    descs = [Desc(at, 1 << 20, NEXT if n < 15 else 0, n + 1) for n in range(16)]
    for index, desc in enumerate(descs):
        driver.transmitq0.ring.write_desc(index, desc)
    driver.transmitq0.ring.offer(0)
    driver.transmitq0.kick()
    until(lambda: driver.transmitq0.ring.used_idx == 1)


def test_while_nobody_is_connected_output_is_discarded(guest: Guest, tmp_path: Path) -> None:
    chardev = Socket(path=tmp_path / "s", server=True)
    driver = plug_single(guest, chardev)
    buffer = driver.transmitq0.add(bytes(4096))
    driver.transmitq0.kick()
    buffer.wait()
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(str(tmp_path / "s"))
        peer.settimeout(HANG)
        until(lambda: chardev.connected)
        driver.transmitq0.add(b"now")
        driver.transmitq0.kick()
        assert peer.recv(100) == b"now"


def test_a_peer_may_go_and_another_come(guest: Guest, tmp_path: Path) -> None:
    chardev = Socket(path=tmp_path / "s", server=True)
    driver = plug_single(guest, chardev)
    for name in (b"first", b"second"):
        buffer = driver.receiveq0.add(writable=16)
        driver.receiveq0.kick()
        with socket.socket(socket.AF_UNIX) as peer:
            peer.connect(str(tmp_path / "s"))
            peer.send(name)
            assert buffer.wait() == name
        until(lambda: not chardev.connected)


def test_a_port_is_open_while_somebody_has_its_pseudo_terminal_open(
    guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pty, "LOOK_SECONDS", 0.01)
    ports = Ports(guest, Console(ports=[terminal := Pty("agent")]))
    ports.say(0xFFFFFFFF, Control.DEVICE_READY)
    assert ports.hear()[:2] == (1, Control.DEVICE_ADD)
    ports.say(1, Control.PORT_READY)
    assert [ports.hear()[:3] for _ in range(2)] == [(1, Control.PORT_NAME, 1), (1, Control.PORT_OPEN, 0)]
    for _ in range(2):
        fd = os.open(terminal.terminal, os.O_RDWR | os.O_NOCTTY)
        assert ports.hear() == (1, Control.PORT_OPEN, 1, b"")
        os.close(fd)
        assert ports.hear() == (1, Control.PORT_OPEN, 0, b"")


def test_the_ports_introduce_themselves(guest: Guest) -> None:
    with_names = [Wire("org.a"), Wire("org.b")]
    ports = Ports(guest, Console(Wire(), ports=with_names))
    ports.say(0, Control.DEVICE_READY)
    assert [ports.hear()[:3] for _ in range(3)] == [(n, Control.DEVICE_ADD, 1) for n in range(3)]
    ports.say(0, Control.PORT_READY)
    assert [ports.hear()[1] for _ in range(2)] == [Control.CONSOLE_PORT, Control.PORT_OPEN]
    ports.say(2, Control.PORT_READY)
    assert ports.hear() == (2, Control.PORT_NAME, 1, b"org.b")
    assert ports.hear() == (2, Control.PORT_OPEN, 1, b"")
    assert ports.driver.config.max_nr_ports == 3


@pytest.mark.guest(transport=("modern", "vhost-user"))
def test_without_a_console_port_0_does_not_exist(guest: Guest) -> None:
    ports = Ports(guest, Console(ports=[Wire("only")]))
    ports.say(0, Control.DEVICE_READY)
    assert ports.hear() == (1, Control.DEVICE_ADD, 1, b"")


def test_bytes_go_through_the_port_they_belong_to(guest: Guest) -> None:
    wires = [Wire("a"), Wire("b")]
    ports = Ports(guest, Console(ports=wires))
    ports.start()
    for number, wire in enumerate(wires, 1):
        buffer = getattr(ports.driver, f"receiveq{number}").add(writable=8)
        getattr(ports.driver, f"receiveq{number}").kick()
        wire.far.send(b"to %d" % number)
        assert buffer.wait() == b"to %d" % number
        getattr(ports.driver, f"transmitq{number}").add(b"from %d" % number)
        getattr(ports.driver, f"transmitq{number}").kick()
        assert wire.receive(6) == b"from %d" % number


@pytest.mark.guest(transport=("modern", "vhost-user"))
def test_a_port_that_no_program_has_open_gets_nothing(guest: Guest) -> None:
    wire = Wire("a")
    ports = Ports(guest, Console(ports=[wire]))
    ports.start()
    ports.say(1, Control.PORT_OPEN, 0)
    buffer = ports.driver.receiveq1.add(writable=8)
    ports.driver.receiveq1.kick()
    wire.far.send(b"later")
    ports.say(1, Control.PORT_READY)
    assert ports.hear()[1] is Control.PORT_NAME
    assert not buffer.done
    ports.say(1, Control.PORT_OPEN)
    assert buffer.wait() == b"later"


def test_the_guest_is_told_who_comes_and_goes(guest: Guest, tmp_path: Path) -> None:
    chardev = Socket("agent", path=tmp_path / "s", server=True)
    ports = Ports(guest, Console(ports=[chardev]))
    ports.start()
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(str(tmp_path / "s"))
        assert ports.hear() == (1, Control.PORT_OPEN, 1, b"")
        ports.driver.receiveq1.add(writable=8)
        ports.driver.receiveq1.kick()
    assert ports.hear() == (1, Control.PORT_OPEN, 0, b"")


def test_a_resize_is_in_the_configuration_and_in_a_message(guest: Guest) -> None:
    console = Console(Wire())
    ports = Ports(guest, console)
    ports.start()
    console.resize(132, 43)
    assert (ports.driver.config.cols, ports.driver.config.rows) == (132, 43)
    assert ports.hear() == (0, Control.RESIZE, 0, struct.pack("<HH", 132, 43))
    assert ports.driver.config_interrupts == 1


def test_an_emergency_write_needs_no_driver(guest: Guest, wire: Wire) -> None:
    driver = guest.plug(Console(wire), start=False)
    for byte in b"panic":
        driver.config.emerg_wr = byte
    assert wire.receive(5) == b"panic"


@pytest.mark.parametrize(
    "message", [b"", b"\1", struct.pack("<IHH", 99, 3, 1), struct.pack("<IHH", 0, 77, 1), bytes(99)]
)
def test_control_messages_that_make_no_sense_are_ignored(guest: Guest, message: bytes) -> None:
    ports = Ports(guest, Console(Wire()))
    ports.driver.c_transmitq.add(message, writable=0 if message else 8)
    ports.driver.c_transmitq.kick()
    ports.start()


def test_a_driver_that_asks_without_end_makes_nothing_grow(guest: Guest) -> None:
    console = Console(ports=[Wire("a")])
    driver = guest.plug(console)  # without buffers for the answers
    for _ in range(300):
        for event in (Control.DEVICE_READY, Control.PORT_READY):
            buffer = driver.c_transmitq.add(struct.pack("<IHH", 1, event, 1))
            driver.c_transmitq.kick()
            buffer.wait()
    assert len(console._messages) == 3


def test_a_reset_in_the_middle_of_everything(guest: Guest, wire: Wire) -> None:
    driver = plug_single(guest, wire)
    stop = threading.Event()

    def type_on() -> None:
        wire.far.setblocking(False)
        while not stop.is_set():
            select.select([wire.far], [wire.far], [], 0.01)
            for call in (lambda: wire.far.send(b"x" * 100), lambda: wire.far.recv(4096)):
                with suppress(BlockingIOError):
                    call()

    thread = threading.Thread(target=type_on)
    thread.start()
    for _ in range(100):
        for _ in range(8):
            driver.receiveq0.add(writable=64)
            driver.transmitq0.add(bytes(2000))
        driver.receiveq0.kick()
        driver.transmitq0.kick()
        driver.start()
    stop.set()
    thread.join()
    assert driver.why_broken is None


def test_a_console_goes_on_elsewhere(guest: Guest) -> None:
    """Ports that were open are, what was typed and not yet taken is there, and the guest is told who is connected."""
    ports = Ports(guest, Console(ports=[Wire("a")]))
    ports.start()
    first = ports.console
    first.ports[1].chardev.far.send(b"typed before")  # type: ignore[attr-defined]
    ports.driver.receiveq1.add(writable=5)
    ports.driver.receiveq1.kick()
    until(lambda: first.ports[1].inbox == b" before")
    wire = Wire("a")
    ports.driver.restore(Console(ports=[wire]), ports.driver.save())
    buffer = ports.driver.receiveq1.add(writable=16)
    ports.driver.receiveq1.kick()
    assert buffer.wait() == b" before"
    buffer = ports.driver.receiveq1.add(writable=16)
    ports.driver.receiveq1.kick()
    wire.far.send(b" and after")
    assert buffer.wait() == b" and after"
    assert ports.hear() == (1, Control.PORT_OPEN, 1, b"")


def test_nothing_comes_in_while_the_machine_is_paused(guest: Guest, wire: Wire) -> None:
    driver = plug_single(guest, wire)
    buffer = driver.receiveq0.add(writable=16)
    driver.receiveq0.kick()
    notifiers = driver.function.dataplane.notifiers
    notifiers.hold()
    with guest.only_writes():
        wire.far.send(b"typed")
        until(lambda: driver.function.device.ports[0].inbox == b"typed")  # type: ignore[attr-defined]
    notifiers.unhold()
    assert buffer.wait() == b"typed"


def test_mistakes() -> None:
    with pytest.raises(ConfigError, match="a console needs a chardev=, or ports="):
        Console()
    null = Null("c0")
    with pytest.raises(ConfigError, match="chardev c0 is in use by another port"):
        Console(null, ports=[null])
    with pytest.raises(ConfigError, match="ports: 31 are more than the 30"):
        Console(ports=[Null()] * 31)
