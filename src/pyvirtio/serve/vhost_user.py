"""A vhost-user session: one front-end drives one device over a connected socket.

The front-end is trusted with guest memory and with nothing else. What it may not say is a `ProtocolError`, which ends
the session; a ring that cannot be one, or a guest that breaks the rules, breaks the device until the front-end stops
its rings, resets it, or connects anew.
"""

import logging
import os
import select
import socket
import struct
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Annotated

from pyvirtio.dataplane import IoThread
from pyvirtio.device import Device
from pyvirtio.errors import ConfigError, GuestError, ProtocolError, raised
from pyvirtio.serve import wire
from pyvirtio.serve.backend import Backend
from pyvirtio.serve.requests import REQUESTS, Refused, handles
from pyvirtio.serve.sharing import Sharing
from pyvirtio.serve.vring import Vring
from pyvirtio.serve.wire import Flag, Message, ProtocolFeature, Reply, Request
from pyvirtio.spec import WRAP_COUNTER, DeviceId, Feature, Status

OFFERED = int(sum(ProtocolFeature))
POLL_MS = 1
"""How often rings are looked at whose front-end sends no kicks."""

log = logging.getLogger("pyvirtio")


@dataclass(frozen=True)
class Rings:
    """What a front-end is offered besides split rings; off, because some take an offer that they do not master."""

    packed: Annotated[bool, "offer packed rings; the front-end has to ask for them too"] = False
    in_order: Annotated[bool, "offer IN_ORDER: chains are given back in the order they came in"] = False
    ring_reset: Annotated[bool, "offer RING_RESET, to front-ends that stop the ring of a queue that is reset"] = False

    @property
    def features(self) -> int:
        """The bits that are offered for it."""
        bits = {Feature.RING_PACKED: self.packed, Feature.IN_ORDER: self.in_order, Feature.RING_RESET: self.ring_reset}
        return sum(int(bit) for bit, offered in bits.items() if offered)


SPLIT_RINGS = Rings()


def offered_features(device: Device, rings: Rings) -> int:
    generic = Feature.VERSION_1 | Feature.EVENT_IDX | Feature.INDIRECT_DESC | Feature.ANY_LAYOUT
    return int(device.device_features) | int(generic) | rings.features | wire.PROTOCOL_FEATURES | wire.LOG_ALL


def _hung_up(connection: socket.socket, seconds: float) -> bool:
    """Whether the other end, or `hang_up`, has closed the connection; waits for that."""
    poll = select.poll()
    poll.register(connection, select.POLLRDHUP)
    return bool(poll.poll(seconds * 1000))


class Session(Sharing):
    """Serves `device` to the front-end at the other end of `connection` until it hangs up or breaks the protocol.

    `run` and `close` belong to one thread; `hang_up` makes `run` return, from any thread.
    """

    def __init__(
        self, device: Device, connection: socket.socket, iothreads: Sequence[IoThread], rings: Rings = SPLIT_RINGS
    ) -> None:
        self.device = device
        self.offered = offered_features(device, rings)
        self.connection = connection
        self.backend = Backend(device, iothreads, partial(_hung_up, connection))
        self.protocol_features = ProtocolFeature(0)
        self._channel: socket.socket | None = None
        """Where the front-end listens to us."""
        device.config_changed = self.config_changed

    def run(self) -> None:
        """Answer requests. What the front-end did wrong is one line in the log."""
        try:
            while self._answer_one():
                pass
        except ProtocolError as error:
            log.error("%s: front-end: %s", self.device.name, str(error))  # no traceback, it would keep us
        except ConnectionError:
            pass  # it did not wait for our reply

    def hang_up(self) -> None:
        with suppress(OSError):  # it may have been faster
            self.connection.shutdown(socket.SHUT_RDWR)
        self.backend.let_go()

    def close(self) -> None:
        """Stop everything and forget the front-end; what it gave us is closed."""
        self.device.config_changed = lambda: None
        self.backend.let_go()
        self.backend.close()
        if self._channel:
            self._channel.close()
        self.connection.close()

    def _answer_one(self) -> bool:
        self._wait()
        message = wire.receive(self.connection)
        if message is None:
            return False
        try:
            reply = self._answer(message)
        finally:
            message.close()
        if reply is not None:
            wire.send(self.connection, message.request, reply)
        return True

    def _wait(self) -> None:
        """Until there is a request. Rings without kicks are kicked from here."""
        poll = select.poll()
        poll.register(self.connection, select.POLLIN)
        while silent := [vring.vq for vring in self.backend.vrings if vring.polled and vring.running]:
            for vq in silent:
                vq.signal()
            if poll.poll(POLL_MS):
                return

    def _answer(self, message: Message) -> Reply | None:
        """The reply, if there is to be one."""
        try:
            reply = self._handle(message)
        except (Refused, GuestError) as error:
            log.warning("%s: %s: %s", self.device.name, message, str(error))
        except (ProtocolError, ConnectionError):
            raise
        except Exception as error:  # a defect of a user's device, or ours
            log.exception("%s: %s failed", self.device.name, message)
            self.backend.state.fail(str(error) if isinstance(error, ConfigError) else raised(error))
        else:
            return reply or self._acknowledgement(message, 0)
        return self._acknowledgement(message, 1)

    def _acknowledgement(self, message: Message, value: int) -> Reply | None:
        """If it is asked for, and agreed on: maybe by this very message, as User-mode Linux has it."""
        asked = message.flags & Flag.NEED_REPLY and ProtocolFeature.REPLY_ACK in self.protocol_features
        return wire.u64(value) if asked else None

    def _handle(self, message: Message) -> Reply | None:
        known = REQUESTS.get(Request(message.request)) if message.request in set(Request) else None
        if known is None:
            raise Refused("not supported")
        if len(message.fds) not in known.fds:
            raise ProtocolError(f"{message}: {len(message.fds)} file descriptors")
        return known.handle(self, message)

    # What is offered and agreed

    @property
    def _packed(self) -> bool:
        return bool(self.backend.features & Feature.RING_PACKED)

    @handles(Request.GET_FEATURES)
    def _get_features(self, message: Message) -> Reply:
        return wire.u64(self.offered)

    @handles(Request.SET_FEATURES)
    def _set_features(self, message: Message) -> None:
        (features,) = message.unpack(wire.U64)
        if refused := features & ~self.offered:
            raise ProtocolError(f"{message}: {refused:#x} was not offered")
        if (faults := self.device.active_faults) and (refused := faults.refused(features)):
            raise Refused(f"{refused:#x} is refused on purpose")
        self.backend.features = features
        if not features & wire.PROTOCOL_FEATURES:
            for vring in self.backend.vrings:
                vring.enabled = True
        self.backend.settle()

    @handles(Request.GET_PROTOCOL_FEATURES)
    def _get_protocol_features(self, message: Message) -> Reply:
        return wire.u64(OFFERED)

    @handles(Request.SET_PROTOCOL_FEATURES)
    def _set_protocol_features(self, message: Message) -> None:
        (features,) = message.unpack(wire.U64)
        if refused := features & ~OFFERED:
            raise ProtocolError(f"{message}: {refused:#x} was not offered")
        self.protocol_features = ProtocolFeature(features)

    @handles(Request.GET_QUEUE_NUM)
    def _get_queue_num(self, message: Message) -> Reply:
        """Of a network device it is the number of queue pairs that front-ends ask for here."""
        count = len(self.backend.vrings)
        return wire.u64(count // 2 if self.device.id == DeviceId.NET else count)

    @handles(Request.SET_OWNER)
    def _set_owner(self, message: Message) -> None:
        """Whoever is connected is the owner."""

    @handles(Request.RESET_OWNER)
    def _reset_owner(self, message: Message) -> None:
        """Deprecated: disables all rings."""
        for vring in self.backend.vrings:
            vring.enabled = False
        self.backend.settle()

    @handles(Request.RESET_DEVICE)
    def _reset(self, message: Message) -> None:
        self.backend.reset()

    @handles(Request.SET_STATUS)
    def _set_status(self, message: Message) -> None:
        """Noted for GET_STATUS. 0 is no reset here: QEMU 7.2 sends it while the rings run, when its machine pauses."""
        (self.backend.status,) = message.unpack(wire.U64)

    @handles(Request.GET_STATUS)
    def _get_status(self, message: Message) -> Reply:
        broken = Status.NEEDS_RESET if self.backend.state.broken else 0
        return wire.u64(self.backend.status & 0xFF | broken)

    # Rings

    @handles(Request.SET_VRING_NUM)
    def _set_vring_num(self, message: Message) -> None:
        index, size = message.unpack(wire.VRING_STATE)
        vring = self._stopped(message, index)
        if not 1 <= size <= vring.vq.max_size or (size & (size - 1) and not self._packed):
            raise ProtocolError(f"{message}: {size} entries; a power of two up to {vring.vq.max_size}")
        vring.size = size
        self.backend.settle()

    @handles(Request.SET_VRING_ADDR)
    def _set_vring_addr(self, message: Message) -> None:
        """Also sent while the ring runs, to switch the log of its used ring on or off."""
        index, flags, desc, used, avail, log = message.unpack(wire.VRING_ADDR)
        vring = self._vring(message, index)
        if vring.addresses != (desc, avail, used):
            vring.stop()
            vring.addresses = None
            for address in (desc, avail, used):
                self.backend.table.translate(address)
            vring.addresses = desc, avail, used
        vring.log_used = log if flags & wire.VRING_LOG else None
        self.backend.settle()

    @handles(Request.SET_VRING_BASE)
    def _set_vring_base(self, message: Message) -> None:
        index, base = message.unpack(wire.VRING_STATE)
        vring = self._stopped(message, index)
        if base > 0xFFFF and not self._packed:
            raise ProtocolError(f"{message}: {base} is no index of a split ring")
        vring.base = base
        self.backend.settle()

    @handles(Request.GET_VRING_BASE)
    def _get_vring_base(self, message: Message) -> Reply:
        """Stops the ring, until the next SET_VRING_KICK."""
        index, _ = message.unpack(wire.VRING_STATE)
        vring = self._stopped(message, index)
        vring.close_kick()
        self.backend.recover()
        fresh = WRAP_COUNTER << 16 | WRAP_COUNTER if self._packed else 0
        return Reply(wire.VRING_STATE.pack(index, fresh if vring.base is None else vring.base))

    @handles(Request.SET_VRING_KICK, fds=range(2))
    def _set_vring_kick(self, message: Message) -> None:
        index, fd = self._index_and_fd(message)
        vring = self._vring(message, index)
        message.fds.clear()
        vring.set_kick(fd)
        self.backend.settle()

    @handles(Request.SET_VRING_CALL, fds=range(2))
    def _set_vring_call(self, message: Message) -> None:
        index, fd = self._index_and_fd(message)
        self._vring(message, index).set_call(fd)

    @handles(Request.SET_VRING_ERR, fds=range(2))
    def _set_vring_err(self, message: Message) -> None:
        index, fd = self._index_and_fd(message)
        self._vring(message, index)
        self.backend.set_err(index, fd)

    @handles(Request.SET_VRING_ENABLE)
    def _set_vring_enable(self, message: Message) -> None:
        index, enable = message.unpack(wire.VRING_STATE)
        self._vring(message, index).enabled = enable != 0
        self.backend.settle()

    def _vring(self, message: Message, index: int) -> Vring:
        if index >= len(self.backend.vrings):
            raise ProtocolError(f"{message}: vring {index} of {len(self.backend.vrings)}")
        return self.backend.vrings[index]

    def _stopped(self, message: Message, index: int) -> Vring:
        """The vring, not running, so that it can be changed; `settle` lets it go on."""
        vring = self._vring(message, index)
        self.backend.stop(vring)
        return vring

    def _index_and_fd(self, message: Message) -> tuple[int, int | None]:
        (value,) = message.unpack(wire.U64)
        expected = 0 if value & wire.NO_FD else 1
        if len(message.fds) != expected:
            raise ProtocolError(f"{message}: {len(message.fds)} file descriptors, {expected} announced")
        return value & wire.INDEX_MASK, message.fds[0] if message.fds else None

    # The configuration space

    @handles(Request.GET_CONFIG)
    def _get_config(self, message: Message) -> Reply:
        """An empty reply is the protocol's way to say no."""
        offset, size, flags = message.unpack(wire.CONFIG)
        if offset + size > wire.MAX_CONFIG:
            log.warning("%s: %s: %d bytes at %d", self.device.name, message, size, offset)
            return Reply(b"")
        config = self.device.config_bytes().ljust(wire.MAX_CONFIG, b"\0")
        return Reply(wire.CONFIG.pack(offset, size, flags) + config[offset : offset + size])

    @handles(Request.SET_CONFIG)
    def _set_config(self, message: Message) -> None:
        offset, size, _ = message.unpack(wire.CONFIG)
        (data,) = message.unpack(struct.Struct(f"{min(size, wire.MAX_CONFIG)}s"), wire.CONFIG.size)
        if offset + size > len(self.device.config_bytes()):
            raise Refused(f"{size} bytes at {offset} pass the end of the configuration")
        assert isinstance(data, bytes)
        self.device.write_config(offset, data)

    @handles(Request.SET_BACKEND_REQ_FD, fds=range(1, 2))
    def _set_backend_req_fd(self, message: Message) -> None:
        channel = os.dup(message.fds[0])
        try:
            new = socket.socket(fileno=channel)
        except OSError as error:
            os.close(channel)
            raise ProtocolError(f"{message}: {error.strerror}") from error
        old, self._channel = self._channel, new
        if old:
            old.close()

    def config_changed(self) -> None:
        """Tell the front-end to read the configuration again. Any thread; never blocks."""
        if self._channel and ProtocolFeature.CONFIG in self.protocol_features:
            try:
                self._channel.send(wire.pack(wire.BACKEND_CONFIG_CHANGE_MSG), socket.MSG_DONTWAIT)
            except OSError as error:
                log.warning("%s: the front-end was not told of a new configuration: %s", self.device.name, error)
