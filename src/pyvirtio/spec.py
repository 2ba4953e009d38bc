"""The numbers of the virtio specification (1.3) that more than one module needs, under the names it gives them."""

from enum import IntEnum, IntFlag


class DeviceId(IntEnum):
    """Device types (section 5)."""

    NET = 1
    BLOCK = 2
    CONSOLE = 3
    ENTROPY = 4
    BALLOON = 5
    SCSI = 8
    INPUT = 18
    VSOCK = 19
    FS = 26


class Status(IntFlag):
    """Bits of the device status field (2.1)."""

    ACKNOWLEDGE = 1
    DRIVER = 2
    DRIVER_OK = 4
    FEATURES_OK = 8
    NEEDS_RESET = 64
    FAILED = 128


class Feature(IntFlag):
    """Feature bits that belong to no device type (6); the legacy ones are in 6.3."""

    NOTIFY_ON_EMPTY = 1 << 24
    ANY_LAYOUT = 1 << 27
    INDIRECT_DESC = 1 << 28
    EVENT_IDX = 1 << 29
    VERSION_1 = 1 << 32
    ACCESS_PLATFORM = 1 << 33
    RING_PACKED = 1 << 34
    IN_ORDER = 1 << 35
    RING_RESET = 1 << 40


class BlkFeature(IntFlag):
    """Feature bits of the block device (5.2.3)."""

    SEG_MAX = 1 << 2
    RO = 1 << 5
    BLK_SIZE = 1 << 6
    FLUSH = 1 << 9
    TOPOLOGY = 1 << 10
    CONFIG_WCE = 1 << 11
    MQ = 1 << 12
    DISCARD = 1 << 13
    WRITE_ZEROES = 1 << 14


class NetFeature(IntFlag):
    """Feature bits of the network device (5.1.3)."""

    CSUM = 1 << 0
    GUEST_CSUM = 1 << 1
    CTRL_GUEST_OFFLOADS = 1 << 2
    MTU = 1 << 3
    MAC = 1 << 5
    GUEST_TSO4 = 1 << 7
    GUEST_TSO6 = 1 << 8
    GUEST_ECN = 1 << 9
    GUEST_UFO = 1 << 10
    HOST_TSO4 = 1 << 11
    HOST_TSO6 = 1 << 12
    HOST_ECN = 1 << 13
    HOST_UFO = 1 << 14
    MRG_RXBUF = 1 << 15
    STATUS = 1 << 16
    CTRL_VQ = 1 << 17
    CTRL_RX = 1 << 18
    CTRL_VLAN = 1 << 19
    CTRL_RX_EXTRA = 1 << 20
    GUEST_ANNOUNCE = 1 << 21
    MQ = 1 << 22
    CTRL_MAC_ADDR = 1 << 23
    GUEST_USO4 = 1 << 54
    GUEST_USO6 = 1 << 55
    HOST_USO = 1 << 56


WRAP_COUNTER = 1 << 15
"""The wrap counter, beside an index of a packed ring (2.8.1); a fresh ring starts at index 0 with the counter at 1."""

SECTOR = 512
"""Bytes in the unit of the block device's `sector` and `capacity` fields (5.2.4), whatever its block size."""

NO_VECTOR = 0xFFFF
"""VIRTIO_MSI_NO_VECTOR (4.1.5.1.2): no interrupt for this event."""

MAX_QUEUE_SIZE = 1024
MAX_QUEUES = 1024
