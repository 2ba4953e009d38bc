"""Console device (virtio 1.3, 5.3)."""

import os
import struct
from collections.abc import Callable, Sequence
from contextlib import suppress
from ctypes import LittleEndianStructure, c_uint16, c_uint32
from enum import IntEnum, IntFlag
from select import EPOLLIN, epoll
from threading import RLock
from typing import Annotated, Any

from pyvirtio._core import Chain, VirtQueue
from pyvirtio.backends.chardev import Chardev, Null
from pyvirtio.device import Device, Queue, poll
from pyvirtio.errors import ConfigError, StaleChain
from pyvirtio.spec import DeviceId

MAX_PORTS = 31
"""A device has 64 queues at most here, of which the ports take two each and the control messages two."""
CONSOLE = 0
"""The number of the port that is a console."""


class ConsoleFeature(IntFlag):
    """Feature bits (5.3.3)."""

    SIZE = 1 << 0
    MULTIPORT = 1 << 1
    EMERG_WRITE = 1 << 2


class Control(IntEnum):
    """What a control message is about (5.3.6.2)."""

    DEVICE_READY = 0
    DEVICE_ADD = 1
    PORT_READY = 3
    CONSOLE_PORT = 4
    RESIZE = 5
    PORT_OPEN = 6
    PORT_NAME = 7


class ConsoleConfig(LittleEndianStructure):
    """`struct virtio_console_config` (5.3.4)."""

    _pack_ = 1
    _fields_ = (
        ("cols", c_uint16),
        ("rows", c_uint16),
        ("max_nr_ports", c_uint32),
        ("emerg_wr", c_uint32),
    )


class Port:
    """One stream between the guest and a chardev. Neither side is read faster than the other takes it.

    What it holds is bounded: `INBOX` bytes towards the guest, `PIECE` the other way. Its device serialises the calls.
    """

    INBOX = 4096
    PIECE = 64 * 1024
    BUDGET = 64
    """Chains and pieces that one call moves before others have their turn."""

    def __init__(self, chardev: Chardev, again: Callable[[], object]) -> None:
        self.chardev = chardev
        self.again = again
        self.was_connected = chardev.connected
        self.ready = False
        """The driver knows the port."""
        self.open = False
        """A program in the guest reads it."""
        self.inbox = self.outbox = b""
        self.receiveq: VirtQueue | None = None
        self.transmitq: VirtQueue | None = None
        self._sending: Chain | None = None

    def move(self) -> None:
        """Move what can be moved, both ways."""
        for _ in range(self.BUDGET):
            received, sent = self._receive(), self._send()
            if not received and not sent:
                return
        self.again()

    def _receive(self) -> bool:
        """Put what came from the host into one buffer of the guest; whether there may be more."""
        if not self.open or self.receiveq is None:
            return False
        self.inbox = self.inbox or self.chardev.read(self.INBOX)
        chain = next(self.receiveq, None) if self.inbox else None
        if chain is None:
            return False
        written = chain.write(self.inbox)
        chain.complete()
        self.inbox = self.inbox[written:]
        return True

    def _send(self) -> bool:
        """Pass one piece of a buffer of the guest on; whether there may be more."""
        self._flush()
        if self.outbox or self.transmitq is None:
            return False
        self._sending = self._sending or next(self.transmitq, None)
        if self._sending is None:
            return False
        try:
            self.outbox = self._sending.read(self.PIECE)
        except StaleChain:  # the driver has reset the queue
            self._sending = None
            return True
        if not self._sending.readable:
            self._sending.complete()
            self._sending = None
        self._flush()
        return True

    def _flush(self) -> None:
        if not self.chardev.connected:
            self.outbox = b""
        while self.outbox and (written := self.chardev.write(self.outbox)):
            self.outbox = self.outbox[written:]

    def forget(self) -> None:
        """The driver is gone. What it has sent still goes out."""
        self._sending = None
        self.ready = self.open = False
        self._flush()

    def save(self) -> dict[str, Any]:
        return {"ready": self.ready, "open": self.open, "inbox": self.inbox, "outbox": self.outbox}

    def restore(self, state: dict[str, Any]) -> None:
        self.ready, self.open = state["ready"], state["open"]
        self.inbox, self.outbox = state["inbox"], state["outbox"]


class Console(Device, id=DeviceId.CONSOLE, config=ConsoleConfig):
    """A console for the guest, and named streams of bytes between programs in it and on the host.

    With a driver that knows several ports, number 0 is the console, if `chardev` is given; the others are called as
    their chardevs are (`/dev/virtio-ports/NAME` in Linux).
    """

    pci_class = 0x078000
    SIZE = 64
    """Entries of each queue."""

    def __init__(
        self,
        chardev: Annotated[Chardev | None, "id of the --chardev that is the guest's console (/dev/hvc0)"] = None,
        *,
        ports: Annotated[Sequence[Chardev], "ids of the --chardev of further ports, which are called like them"] = (),
    ) -> None:
        if chardev is None and not ports:
            raise ConfigError("a console needs a chardev=, or ports=")
        if len(ports) > MAX_PORTS - 1:
            raise ConfigError(f"ports: {len(ports)} are more than the {MAX_PORTS - 1} that a console can have")
        self.has_console = chardev is not None
        chardevs = [chardev or Null(), *ports]
        for each in chardevs:
            each.claim()
        self.device_features = ConsoleFeature.SIZE | ConsoleFeature.MULTIPORT | ConsoleFeature.EMERG_WRITE
        self.config.max_nr_ports = len(chardevs)
        self._again = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.ports = [Port(each, self._come_again) for each in chardevs]
        self.config.cols, self.config.rows = self._console.size or (0, 0)
        self._messages: dict[tuple[int, int], bytes] = {}
        """Control messages for which the driver had no buffer yet: one of a kind for each port."""
        self._controlq: VirtQueue | None = None
        self._lock = RLock()
        self.events = epoll()
        self.events.register(self._again, EPOLLIN)
        for port in self.ports:
            self.events.register(port.chardev.fileno(), EPOLLIN)

    @property
    def queues(self) -> list[Queue]:
        """Those of port 0, the control queues, then those of the others (5.3.2)."""
        first, *others = [self._port_queues(number, port) for number, port in enumerate(self.ports)]
        control = [Queue("c_receiveq", self.SIZE, self.c_receiveq), Queue("c_transmitq", self.SIZE, self.c_transmitq)]
        return [*first, *control, *(queue for pair in others for queue in pair)]

    def _port_queues(self, number: int, port: Port) -> list[Queue]:
        def receiveq(vq: VirtQueue) -> None:
            with self._lock:
                port.receiveq = vq
                self._move(number)

        def transmitq(vq: VirtQueue) -> None:
            with self._lock:
                port.transmitq = vq
                self._move(number)

        return [
            Queue(f"receiveq{number}", self.SIZE, receiveq),
            Queue(f"transmitq{number}", self.SIZE, transmitq),
        ]

    def c_receiveq(self, vq: VirtQueue) -> None:
        with self._lock:
            self._controlq = vq
            self._tell()

    def c_transmitq(self, vq: VirtQueue) -> None:
        with self._lock:
            for chain in vq:
                if chain.readable >= 8:  # what is shorter says nothing
                    number, event, value = struct.unpack("<IHH", chain.read(8))
                    self._told(number, event, value)
                chain.complete()
            self._tell()

    @poll("events")
    def host_events(self) -> None:
        """A chardev has input, room for output, or another peer."""
        with self._lock, suppress(StaleChain):  # the driver may reset the device at any time
            for fd, _ in self.events.poll(0):
                if fd == self._again:
                    os.eventfd_read(fd)
            for number, port in enumerate(self.ports):
                port.chardev.handle()
                self._move(number)
            self._follow_size()

    def resize(self, cols: int, rows: int) -> None:
        """The console has another size now."""
        with self.update_config() as config:
            config.cols, config.rows = cols, rows
        with self._lock, suppress(StaleChain):
            if self.ports[CONSOLE].ready:
                self._say_size()
                self._tell()

    def activate(self, features: int) -> None:
        if not features & ConsoleFeature.MULTIPORT:
            self.ports[CONSOLE].open = True
        self._come_again()

    def reset(self) -> None:
        with self._lock:
            self._messages.clear()
            for port in self.ports:
                port.forget()

    def write_config(self, offset: int, data: bytes) -> None:
        """A byte in emerg_wr goes out at once, whatever the driver has or has not set up (5.3.4)."""
        if offset == ConsoleConfig.emerg_wr.offset:
            with self._lock:
                self._console.write(data[:1])

    def save(self) -> dict[str, Any]:
        messages = [[*key, message] for key, message in list(self._messages.items())]  # chardevs add some meanwhile
        return {**super().save(), "ports": [port.save() for port in self.ports], "messages": messages}

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        for port, saved in zip(self.ports, state["ports"], strict=True):
            port.restore(saved)
            port.was_connected = not port.chardev.connected  # the guest is told either way
        self._messages = {(number, event): message for number, event, message in state["messages"]}

    def close(self) -> None:
        self.events.close()
        os.close(self._again)
        for port in self.ports:
            port.chardev.close()

    @property
    def _console(self) -> Chardev:
        return self.ports[CONSOLE].chardev

    def _come_again(self) -> None:
        os.eventfd_write(self._again, 1)

    def _move(self, number: int) -> None:
        """Move what can be moved, and tell the driver if somebody came to the other end of the port, or went."""
        port = self.ports[number]
        port.move()
        connected = port.chardev.connected
        if connected is not port.was_connected:
            port.was_connected = connected
            if port.ready:
                self._say(number, Control.PORT_OPEN, connected)
        self._tell()

    def _follow_size(self) -> None:
        size = self._console.size
        if size and size != (self.config.cols, self.config.rows):
            self.resize(*size)

    def _told(self, number: int, event: int, value: int) -> None:
        """A control message of the driver; what makes no sense is ignored."""
        if event == Control.DEVICE_READY and value:
            for each in range(0 if self.has_console else 1, len(self.ports)):
                self._say(each, Control.DEVICE_ADD, True)
        elif number < len(self.ports):
            if event == Control.PORT_READY and value:
                self._introduce(number)
            elif event == Control.PORT_OPEN:
                self.ports[number].open = bool(value)
                self._move(number)

    def _introduce(self, number: int) -> None:
        port = self.ports[number]
        port.ready = True
        port.was_connected = port.chardev.connected
        if number == CONSOLE:
            self._say(number, Control.CONSOLE_PORT, True)
            self._say_size()
        else:
            self._say(number, Control.PORT_NAME, True, port.chardev.name.encode())
        self._say(number, Control.PORT_OPEN, port.was_connected)

    def _say_size(self) -> None:
        if self.config.cols:
            self._say(CONSOLE, Control.RESIZE, False, struct.pack("<HH", self.config.cols, self.config.rows))

    def _say(self, number: int, event: Control, value: bool, text: bytes = b"") -> None:
        """Replaces what was to be said about the same before."""
        self._messages[number, event] = struct.pack("<IHH", number, event, value) + text

    def _tell(self) -> None:
        """Send the control messages that the driver has buffers for."""
        while self._messages and self._controlq is not None:
            chain = next(self._controlq, None)
            if chain is None:
                return
            chain.write(self._messages.pop(next(iter(self._messages))))
            chain.complete()
