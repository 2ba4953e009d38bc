"""The control queue of the network device (virtio 1.3, 5.1.6.5): commands, and what they have set."""

import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pyvirtio._core import Chain
from pyvirtio.errors import ConfigError
from pyvirtio.spec import NetFeature

if TYPE_CHECKING:
    from pyvirtio.devices.net import Net

OK, ERR = 0, 1
MAX_COMMAND = 16 * 1024
"""Bytes of a command: the largest sets the tables."""
MAX_MACS = 1024
"""Addresses in both tables together."""
MAC_BYTES = 6
VLANS = 4096

TO_DRIVER = (
    NetFeature.GUEST_CSUM
    | NetFeature.GUEST_TSO4
    | NetFeature.GUEST_TSO6
    | NetFeature.GUEST_ECN
    | NetFeature.GUEST_USO4
    | NetFeature.GUEST_USO6
)
"""Offloads of frames to the driver."""

RX_MODES = ("promiscuous", "all_multicast", "all_unicast", "no_multicast", "no_unicast", "no_broadcast")
"""By command of the class CTRL_RX; those from the third on need CTRL_RX_EXTRA."""


class Refused(Exception):
    """A command that gets VIRTIO_NET_ERR."""


class Control:
    """Executes commands, and remembers what they asked for until the driver is reset."""

    def __init__(self, net: "Net") -> None:
        self.net = net
        self.reset()

    def reset(self) -> None:
        """A driver begins: it receives every frame until it asks for less, but no VLAN if it can ask for some."""
        self.modes = dict.fromkeys(RX_MODES, False) | {"promiscuous": True}
        self.macs: list[bytes] = []
        self.queue_pairs = 1
        self.offloads: int | None = None
        """Those that the driver takes, if it takes others than it agreed to."""
        self.vlans = bytearray(VLANS // 8) if self.net.agreed & NetFeature.CTRL_VLAN else None
        self.filter()

    def save(self) -> dict[str, Any]:
        return {
            "modes": self.modes,
            "macs": self.macs,
            "vlans": self.vlans,
            "queue_pairs": self.queue_pairs,
            "offloads": self.offloads,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Ask for what `save` says, after `reset`."""
        self.modes, self.macs = state["modes"], state["macs"]
        self.vlans = None if state["vlans"] is None else bytearray(state["vlans"])
        self.filter()
        self._use_queue_pairs(state["queue_pairs"])
        if state["offloads"] is not None:
            self._take_offloads(state["offloads"])

    def filter(self) -> None:
        """Let the plane receive what is asked for."""
        self.net.plane.set_filter(**self.modes, macs=[self.net.mac, *self.macs], vlans=self.vlans)

    def answer(self, chain: Chain) -> None:
        """Execute the command in the chain and write whether that went well."""
        try:
            self._execute(chain)
            chain.write(bytes([OK]))
        except (Refused, OSError):  # or the host refuses: its tap may be gone
            chain.write(bytes([ERR]))

    def _execute(self, chain: Chain) -> None:
        command = chain.read(MAX_COMMAND)
        if len(command) < 2 or chain.readable:
            raise Refused
        number, data = (command[0], command[1]), command[2:]
        if command[0] == 0 and command[1] < len(RX_MODES):
            self._set_mode(command[1], data)
        elif number in COMMANDS and self.net.agreed & COMMANDS[number][0]:
            COMMANDS[number][1](self, data)
        else:
            raise Refused

    def _set_mode(self, command: int, data: bytes) -> None:
        needed = NetFeature.CTRL_RX if command < 2 else NetFeature.CTRL_RX_EXTRA
        if not self.net.agreed & needed:
            raise Refused
        (on,) = _unpack("<B", data)
        self.modes[RX_MODES[command]] = bool(on)
        self.filter()

    def set_tables(self, data: bytes) -> None:
        """Unicast addresses, then multicast addresses, each behind their number."""
        unicast, rest = _table(data)
        multicast, rest = _table(rest)
        if rest or len(unicast) + len(multicast) > MAX_MACS:
            raise Refused
        self.macs = unicast + multicast
        self.filter()

    def set_address(self, data: bytes) -> None:
        if len(data) != MAC_BYTES:
            raise Refused
        self.net.mac = data
        self.filter()

    def add_vlan(self, data: bytes) -> None:
        self._set_vlan(data, True)

    def remove_vlan(self, data: bytes) -> None:
        self._set_vlan(data, False)

    def _set_vlan(self, data: bytes, passes: bool) -> None:
        (vlan,) = _unpack("<H", data)
        if vlan >= VLANS or self.vlans is None:
            raise Refused
        bit = 1 << vlan % 8
        self.vlans[vlan // 8] = self.vlans[vlan // 8] & ~bit | (bit if passes else 0)
        self.filter()

    def set_queue_pairs(self, data: bytes) -> None:
        (count,) = _unpack("<H", data)
        if not 1 <= count <= self.net.pairs:
            raise Refused
        self._use_queue_pairs(count)

    def _use_queue_pairs(self, count: int) -> None:
        self.net.set_queue_pairs(count)
        self.queue_pairs = count

    def set_offloads(self, data: bytes) -> None:
        (offloads,) = _unpack("<Q", data)
        if offloads & ~int(self.net.agreed & TO_DRIVER):  # an IntFlag's complement has only the bits that it names
            raise Refused
        self._take_offloads(offloads)

    def _take_offloads(self, offloads: int) -> None:
        self.net.set_offloads(NetFeature(offloads))
        self.offloads = offloads


Command = tuple[NetFeature, Callable[[Control, bytes], None]]
COMMANDS: dict[tuple[int, int], Command] = {
    (1, 0): (NetFeature.CTRL_RX, Control.set_tables),
    (1, 1): (NetFeature.CTRL_MAC_ADDR, Control.set_address),
    (2, 0): (NetFeature.CTRL_VLAN, Control.add_vlan),
    (2, 1): (NetFeature.CTRL_VLAN, Control.remove_vlan),
    (4, 0): (NetFeature.MQ, Control.set_queue_pairs),
    (5, 0): (NetFeature.CTRL_GUEST_OFFLOADS, Control.set_offloads),
}
"""(class, command) -> the feature that allows it, and what it does."""


def _unpack(layout: str, data: bytes) -> tuple[int, ...]:
    if len(data) != struct.calcsize(layout):
        raise Refused
    return struct.unpack(layout, data)


def _table(data: bytes) -> tuple[list[bytes], bytes]:
    """The addresses of a table, and what stands behind it."""
    if len(data) < 4:
        raise Refused
    end = 4 + MAC_BYTES * int.from_bytes(data[:4], "little")
    if end > len(data):
        raise Refused
    return [data[at : at + MAC_BYTES] for at in range(4, end, MAC_BYTES)], data[end:]


def parse_mac(text: str) -> bytes:
    """The bytes of 52:54:00:12:34:56; `ConfigError` for what is no address of one card."""
    parts = text.split(":")
    digits = "0123456789abcdefABCDEF"
    if len(parts) != MAC_BYTES or not all(len(part) == 2 and set(part) <= set(digits) for part in parts):
        raise ConfigError(f"mac={text} is not allowed: six bytes as in 52:54:00:12:34:56")
    mac = bytes(int(part, 16) for part in parts)
    if mac[0] & 1 or not any(mac):
        raise ConfigError(f"mac={text} is not allowed: the address of a group or none")
    return mac
