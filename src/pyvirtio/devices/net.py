"""Network device (virtio 1.3, 5.1)."""

import hashlib
from collections.abc import Container
from ctypes import LittleEndianStructure, c_uint8, c_uint16
from typing import Annotated, Any

from pyvirtio._core import NetPlane, VirtQueue
from pyvirtio.backends.net import NetBackend
from pyvirtio.device import Device, Handler, Queue
from pyvirtio.devices.net_control import TO_DRIVER, Control, parse_mac
from pyvirtio.errors import ConfigError
from pyvirtio.properties import Range
from pyvirtio.spec import MAX_QUEUE_SIZE, DeviceId, Feature, NetFeature

MIN_MTU, MAX_MTU = 68, 65535
MAX_QUEUE_PAIRS = 256
CONTROL_QUEUE_SIZE = 64
LINK_UP = 1

FROM_DRIVER = NetFeature.CSUM | NetFeature.HOST_TSO4 | NetFeature.HOST_TSO6 | NetFeature.HOST_ECN | NetFeature.HOST_USO
USO = NetFeature.GUEST_USO4 | NetFeature.GUEST_USO6 | NetFeature.HOST_USO
NEEDS = {
    NetFeature.GUEST_CSUM: NetFeature.GUEST_TSO4
    | NetFeature.GUEST_TSO6
    | NetFeature.GUEST_USO4
    | NetFeature.GUEST_USO6,
    NetFeature.CSUM: NetFeature.HOST_TSO4 | NetFeature.HOST_TSO6 | NetFeature.HOST_USO,
    NetFeature.GUEST_TSO4 | NetFeature.GUEST_TSO6: NetFeature.GUEST_ECN,
    NetFeature.HOST_TSO4 | NetFeature.HOST_TSO6: NetFeature.HOST_ECN,
    NetFeature.CTRL_RX: NetFeature.CTRL_RX_EXTRA,
    NetFeature.CTRL_VQ: NetFeature.CTRL_RX
    | NetFeature.CTRL_RX_EXTRA
    | NetFeature.CTRL_VLAN
    | NetFeature.CTRL_MAC_ADDR
    | NetFeature.MQ
    | NetFeature.CTRL_GUEST_OFFLOADS,
}
"""What is not offered without one of some other features (5.1.3.1)."""


class NetConfig(LittleEndianStructure):
    """`struct virtio_net_config` (5.1.4) up to the MTU."""

    _pack_ = 1
    _fields_ = (
        ("mac", c_uint8 * 6),
        ("status", c_uint16),
        ("max_virtqueue_pairs", c_uint16),
        ("mtu", c_uint16),
    )


class Net(Device, id=DeviceId.NET, config=NetConfig):
    """A network card on a `NetBackend`. The core moves the frames; the control queue is served here."""

    pci_class = 0x020000
    ioeventfd = True
    queues_per_iothread = 2  # the queues of a pair share what they are connected to

    def __init__(
        self,
        netdev: Annotated[NetBackend, "id of the --netdev that it is connected to"],
        *,
        mac: Annotated[str, "address, as 52:54:00:12:34:56; made from the device's name unless given"] = "",
        host_mtu: Annotated[int | None, "MTU to advise; the network's unless given", Range(MIN_MTU, MAX_MTU)] = None,
        rx_queue_size: Annotated[int, "entries of receive rings, a power of two", Range(2, MAX_QUEUE_SIZE)] = 256,
        tx_queue_size: Annotated[int, "entries of transmit rings, a power of two", Range(2, MAX_QUEUE_SIZE)] = 256,
        mq: Annotated[bool, "offer all queue pairs of the network"] = True,
        mrg_rxbuf: Annotated[bool, "offer receive buffers that take a frame together"] = True,
        csum: Annotated[bool, "take frames without checksum from the driver"] = True,
        guest_csum: Annotated[bool, "let the driver take frames without checksum"] = True,
        host_tso4: Annotated[bool, "take TCP segments over IPv4 from the driver"] = True,
        host_tso6: Annotated[bool, "take TCP segments over IPv6 from the driver"] = True,
        host_ecn: Annotated[bool, "take TCP segments with ECN from the driver"] = True,
        host_uso: Annotated[bool, "take UDP segments from the driver"] = True,
        guest_tso4: Annotated[bool, "let the driver take TCP segments over IPv4"] = True,
        guest_tso6: Annotated[bool, "let the driver take TCP segments over IPv6"] = True,
        guest_ecn: Annotated[bool, "let the driver take TCP segments with ECN"] = True,
        guest_uso4: Annotated[bool, "let the driver take UDP segments over IPv4"] = True,
        guest_uso6: Annotated[bool, "let the driver take UDP segments over IPv6"] = True,
        ctrl_vq: Annotated[bool, "offer the control queue"] = True,
        ctrl_rx: Annotated[bool, "offer receive modes"] = True,
        ctrl_rx_extra: Annotated[bool, "offer further receive modes"] = True,
        ctrl_vlan: Annotated[bool, "offer a filter by VLAN"] = True,
        ctrl_mac_addr: Annotated[bool, "let the driver set its address through the control queue"] = True,
        ctrl_guest_offloads: Annotated[bool, "let the driver switch the offloads that it takes"] = True,
    ) -> None:
        given = locals()
        self.netdev = netdev
        self.sizes = (rx_queue_size, tx_queue_size)
        self.pairs = netdev.queue_pairs if mq and ctrl_vq else 1
        self.mtu = netdev.mtu if host_mtu is None else host_mtu
        self._mac = parse_mac(mac) if mac else None
        self._check()
        self.device_features = self._offered({name for name, value in given.items() if value is False})
        self.config.max_virtqueue_pairs = self.pairs
        self.config.mtu = self.mtu or 0
        self.config.status = LINK_UP
        self.plane = NetPlane(
            netdev.fds,
            framing=netdev.framing,
            vnet_header=netdev.vnet_header,
            send=getattr(netdev, "send", None),
            queue_pairs=self.pairs,
            pcap=netdev.pcap,
        )
        self.vhost = self._vhost = list(zip(netdev.vhost_fds, netdev.fds, strict=False))[: self.pairs]
        self.vhost_poll_us = netdev.vhost_poll_us
        self.control = Control(self)
        netdev.connect(self.plane.inject)

    @property
    def queues(self) -> list[Queue]:
        """A receive and a transmit queue for each pair, then the control queue (5.1.2)."""
        queues = []
        for index in range(self.pairs):
            number = index if self.pairs > 1 else ""
            queues.append(Queue(f"receiveq{number}", self.sizes[0], self.plane))
            queues.append(Queue(f"transmitq{number}", self.sizes[1], self.plane))
        if self.device_features & NetFeature.CTRL_VQ:
            queues.append(Queue("controlq", CONTROL_QUEUE_SIZE, self.controlq))
        return queues

    def served_by(self, queue: Queue, index: int, features: int) -> Handler:
        """Without MQ the control queue is the third, whatever is offered."""
        return self.controlq if index == 2 and not features & NetFeature.MQ else queue.handler

    def controlq(self, vq: VirtQueue) -> None:
        for chain in vq:
            self.control.answer(chain)
            chain.complete()

    @property
    def agreed(self) -> NetFeature:
        """What the driver accepted; nothing while there is none."""
        return self._agreed

    _agreed = NetFeature(0)

    @property
    def mac(self) -> bytes:
        return bytes(self.config.mac)

    @mac.setter
    def mac(self, mac: bytes) -> None:
        self.config.mac[:] = mac

    @property
    def link_up(self) -> bool:
        return bool(self.config.status & LINK_UP)

    def set_link(self, up: bool) -> None:
        """Plug the cable in, or pull it out: no frame passes while it is out, and the driver is told."""
        self.plane.set_link(up)
        with self.update_config() as config:
            config.status = config.status & ~LINK_UP | (LINK_UP if up else 0)
        self._lend()

    def _lend(self) -> None:
        """The kernel may serve the pairs that the driver agreed to, and knows nothing of cables."""
        pairs = self.pairs if self.agreed & NetFeature.MQ else 1
        self.vhost = self._vhost[:pairs] if self.config.status & LINK_UP else []
        self.vhost_changed()

    def config_bytes(self) -> bytes:
        if not any(self.mac):
            self.mac = self._mac or stable_mac(self.name, self.netdev.identity)
        return super().config_bytes()

    def write_config(self, offset: int, data: bytes) -> None:
        """A legacy driver sets its address here; others have a command for that (5.1.5)."""
        old = self.agreed and not self.agreed & (Feature.VERSION_1 | NetFeature.CTRL_MAC_ADDR)
        if old and offset + len(data) <= len(self.mac):
            self.config.mac[offset : offset + len(data)] = data
            self.control.filter()

    def activate(self, features: int) -> None:
        self._agreed = NetFeature(features)
        self._lend()
        self.netdev.set_offload(self._agreed & TO_DRIVER)
        self.plane.open(features, [self.loops[2 * pair] for pair in range(self.pairs)])
        self.set_queue_pairs(self.pairs if self._has_front_end else 1)
        self.control.reset()
        restored, self._restored = self._restored, None
        if restored is not None:
            self.control.restore(restored)

    @property
    def _has_front_end(self) -> bool:
        """One of vhost-user answers the control queue itself, and enables the queues one by one."""
        return NetFeature.MQ in self._agreed and NetFeature.CTRL_VQ not in self._agreed

    def serves(self, queues: Container[int]) -> None:
        """On a pair whose receive queue is not among them nobody would hear the network."""
        if self._has_front_end:
            self.set_queue_pairs(next((n for n in range(1, self.pairs) if 2 * n not in queues), self.pairs))

    _restored: dict[str, Any] | None = None
    """What the driver of another process had asked for, until it is activated here."""

    def save(self) -> dict[str, Any]:
        """Frames on their way are not part of it: networks lose some."""
        return {**super().save(), "control": self.control.save() if self.agreed else None}

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        self._restored = state["control"]
        self.plane.set_link(self.link_up)

    def set_queue_pairs(self, count: int) -> None:
        """The driver uses the first `count` pairs from now on."""
        self.netdev.set_queue_pairs(count)
        self.plane.set_queue_pairs(count)

    def set_offloads(self, offloads: NetFeature) -> None:
        """The driver takes these offloads from now on, some of those that were agreed."""
        self.netdev.set_offload(offloads)
        self.plane.set_features(self.agreed & ~int(TO_DRIVER) | offloads)

    def reset(self) -> None:
        self.plane.close()
        self._agreed = NetFeature(0)
        self._restored = None
        self.mac = bytes(6)  # the driver may have set another

    def close(self) -> None:
        self.plane.disconnect()
        self.netdev.disconnect()
        self.netdev.close()

    def _offered(self, refused: set[str]) -> NetFeature:
        """The features of the properties that are not off, as far as the network can do what they say."""
        offered = NetFeature.MAC | NetFeature.STATUS | NetFeature.MRG_RXBUF | NEEDS[NetFeature.CTRL_VQ]
        offered |= NetFeature.CTRL_VQ
        if self.netdev.vnet_header:
            offered |= TO_DRIVER | FROM_DRIVER
        else:
            offered &= ~NetFeature.CTRL_GUEST_OFFLOADS
        if not self.netdev.uso:
            offered &= ~USO
        if self.pairs == 1:
            offered &= ~NetFeature.MQ
        if self.mtu:
            offered |= NetFeature.MTU
        for name in refused:
            offered &= ~NetFeature[name.upper()]
        for needed, features in NEEDS.items():
            if not offered & needed:
                offered &= ~features
        return offered

    def _check(self) -> None:
        """Limits that concern more than one property; the range of each has been checked."""
        for name, size in zip(("rx-queue-size", "tx-queue-size"), self.sizes, strict=True):
            if size & (size - 1):
                raise ConfigError(f"{name}={size}: allowed are powers of two up to {MAX_QUEUE_SIZE}")
        if self.pairs > MAX_QUEUE_PAIRS:
            raise ConfigError(f"netdev has {self.pairs} queue pairs; at most {MAX_QUEUE_PAIRS} are allowed")
        if self.mtu is not None and not MIN_MTU <= self.mtu <= MAX_MTU:
            raise ConfigError(f"netdev has an MTU of {self.mtu}; allowed are {MIN_MTU} to {MAX_MTU}")


def stable_mac(*identity: str) -> bytes:
    """A locally administered address that is the same whenever the identity is."""
    return b"\x52\x54" + hashlib.blake2b("\0".join(identity).encode(), digest_size=4).digest()
