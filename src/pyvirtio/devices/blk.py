"""Block device (virtio 1.3, 5.2)."""

from ctypes import LittleEndianStructure, c_uint8, c_uint16, c_uint32, c_uint64
from typing import Annotated, Any

from pyvirtio._core import BlkPlane
from pyvirtio.backends.block import BlockBackend
from pyvirtio.device import Device, queue
from pyvirtio.errors import ConfigError
from pyvirtio.properties import Range, Size
from pyvirtio.spec import MAX_QUEUE_SIZE, MAX_QUEUES, SECTOR, BlkFeature, DeviceId


class BlkConfig(LittleEndianStructure):
    """`struct virtio_blk_config` (5.2.4) up to the write-zeroes fields."""

    _pack_ = 1
    _fields_ = (
        ("capacity", c_uint64),  # in sectors of 512 bytes
        ("size_max", c_uint32),
        ("seg_max", c_uint32),
        ("cylinders", c_uint16),
        ("heads", c_uint8),
        ("sectors", c_uint8),
        ("blk_size", c_uint32),
        ("physical_block_exp", c_uint8),
        ("alignment_offset", c_uint8),
        ("min_io_size", c_uint16),  # in logical blocks, as opt_io_size
        ("opt_io_size", c_uint32),
        ("writeback", c_uint8),
        ("unused0", c_uint8),
        ("num_queues", c_uint16),
        ("max_discard_sectors", c_uint32),
        ("max_discard_seg", c_uint32),
        ("discard_sector_alignment", c_uint32),
        ("max_write_zeroes_sectors", c_uint32),
        ("max_write_zeroes_seg", c_uint32),
        ("write_zeroes_may_unmap", c_uint8),
        ("unused1", c_uint8 * 3),
    )


class Blk(Device, id=DeviceId.BLOCK, config=BlkConfig):
    """A disk on a `BlockBackend`. The core parses every request and, for a raw file, does the I/O as well."""

    pci_class = 0x010000
    ioeventfd = True
    MAX_SECTORS = 0x3FFFFF
    """Limit of one discard or write-zeroes segment."""
    ID_BYTES = 20

    def __init__(
        self,
        drive: Annotated[BlockBackend, "id of the --drive that holds the image"],
        *,
        num_queues: Annotated[int, "request queues", Range(1, MAX_QUEUES)] = 1,
        queue_size: Annotated[int, "entries of each ring, a power of two", Range(2, MAX_QUEUE_SIZE)] = 256,
        serial: Annotated[str, "serial number, up to 20 characters (GET_ID)"] = "",
        logical_block_size: Annotated[Size | None, "the backend's unless given", Range(512, 65536)] = None,
        physical_block_size: Annotated[Size | None, "the logical one unless given", Range(512, 1 << 21)] = None,
        min_io_size: Annotated[Size, "smallest efficient request; 0 = not said", Range(0, 1 << 24)] = 0,
        opt_io_size: Annotated[Size, "best request size; 0 = not said", Range(0, 1 << 31)] = 0,
        write_cache: Annotated[bool, "start as a write-back cache; off flushes after each write"] = True,
        config_wce: Annotated[bool, "let the driver switch the write cache"] = True,
        discard: Annotated[bool, "offer discard where the backend can"] = True,
        write_zeroes: Annotated[bool, "offer write-zeroes where the backend can"] = True,
    ) -> None:
        self.drive = drive
        self.num_queues = num_queues
        self.queue_size = queue_size
        self.write_cache = write_cache and not drive.writethrough
        logical = logical_block_size or drive.block_size
        self._check(serial, logical, physical_block_size or logical, min_io_size, opt_io_size)
        self._logical = logical
        self._serial = serial
        native = drive.native()
        self.device_features = self._features(config_wce, native is not None, discard, write_zeroes)
        self._fill_config(logical, physical_block_size or logical, min_io_size, opt_io_size)
        self.serve_from(drive)

    def serve_from(self, disk: BlockBackend) -> None:
        """Make a plane over `disk`, the drive or another view of its data, for whoever starts the queues next."""
        native = disk.native()
        self.plane = BlkPlane(
            disk if native is None else native,
            capacity=disk.capacity,
            readonly=disk.readonly,
            flush=self._offered(BlkFeature.FLUSH),
            discard=self._offered(BlkFeature.DISCARD),
            write_zeroes=self._offered(BlkFeature.WRITE_ZEROES),
            serial=self._serial.encode(),
            block_size=self._logical,
            max_discard_sectors=self.config.max_discard_sectors,
            max_write_zeroes_sectors=self.config.max_write_zeroes_sectors,
        )
        self._set_cache()

    @queue(size="queue_size", count="num_queues", native=True)
    def requestq(self) -> BlkPlane:
        """One plane serves every request queue."""
        return self.plane

    def activate(self, features: int) -> None:
        self._flushes = bool(features & BlkFeature.FLUSH)
        self._set_cache()

    def reset(self) -> None:
        self.config.writeback = self.write_cache

    def write_config(self, offset: int, data: bytes) -> None:
        """A driver may switch `writeback` only (5.2.5)."""
        if offset == BlkConfig.writeback.offset and len(data) == 1 and self._offered(BlkFeature.CONFIG_WCE):
            self.config.writeback = data[0] & 1
            self._set_cache()

    def save(self) -> dict[str, Any]:
        """The contents of the disk are not part of it: they stay where they are, flushed."""
        flush = getattr(self.drive, "flush", None)
        if flush is not None and not self.drive.readonly:
            flush()
        return super().save()

    def restore(self, state: dict[str, Any]) -> None:
        capacity = self.config.capacity
        super().restore(state)
        if self.config.capacity != capacity:
            raise ConfigError(f"{self.name}: the disk has {capacity} sectors now, and had {self.config.capacity}")

    def resize(self, capacity: int) -> None:
        """Give the disk another size, in bytes, and tell the driver. `ConfigError` or `OSError` if it cannot be."""
        resize = getattr(self.drive, "resize", None)
        if resize is None:
            raise ConfigError(f"{self.name}: a {type(self.drive).__name__} cannot be resized")
        if capacity < SECTOR or capacity % self._logical:
            raise ConfigError(f"{capacity} bytes; a disk is whole blocks of {self._logical} bytes, at least one")
        self.plane.capacity = min(capacity, self.drive.capacity)  # no request may meet the part that comes or goes
        try:
            resize(capacity)
        finally:
            self.plane.capacity = self.drive.capacity
        with self.update_config() as config:
            config.capacity = capacity // SECTOR

    def close(self) -> None:
        self.drive.close()

    _flushes = False

    def _set_cache(self) -> None:
        # A driver that cannot flush expects every completed write to be durable (5.2.6.2).
        self.plane.writethrough = not (self._flushes and self.config.writeback)

    def _offered(self, feature: BlkFeature) -> bool:
        return bool(self.device_features & feature)

    def _features(self, config_wce: bool, native: bool, discard: bool, write_zeroes: bool) -> BlkFeature:
        offered = BlkFeature.SEG_MAX | BlkFeature.BLK_SIZE | BlkFeature.TOPOLOGY
        if self.num_queues > 1:
            offered |= BlkFeature.MQ
        if self.drive.readonly:
            return offered | BlkFeature.RO
        if native or self.drive.offers("flush"):
            offered |= BlkFeature.FLUSH
            if config_wce:
                offered |= BlkFeature.CONFIG_WCE
        if discard and (native or self.drive.offers("discard")):
            offered |= BlkFeature.DISCARD
        if write_zeroes and (native or self.drive.offers("write_zeroes")):
            offered |= BlkFeature.WRITE_ZEROES
        return offered

    def _fill_config(self, logical: int, physical: int, min_io: int, opt_io: int) -> None:
        config: BlkConfig = self.config
        config.capacity = self.drive.capacity // SECTOR
        # The header and the status take a descriptor each. Drivers trust seg_max whatever the ring's size, which
        # over vhost-user is the front-end's to choose: 128 by QEMU's default.
        config.seg_max = max(min(self.queue_size, 128) - 2, 1)
        config.blk_size = logical
        config.physical_block_exp = (physical // logical).bit_length() - 1
        config.min_io_size = min_io // logical
        config.opt_io_size = opt_io // logical
        config.writeback = self.write_cache
        config.num_queues = self.num_queues
        if self._offered(BlkFeature.DISCARD):
            config.max_discard_sectors = self.MAX_SECTORS
            config.max_discard_seg = 1
            config.discard_sector_alignment = logical // SECTOR
        if self._offered(BlkFeature.WRITE_ZEROES):
            config.max_write_zeroes_sectors = self.MAX_SECTORS
            config.max_write_zeroes_seg = 1
            config.write_zeroes_may_unmap = 1

    def _check(self, serial: str, logical: int, physical: int, min_io: int, opt_io: int) -> None:
        """Limits that concern more than one property; the range of each has been checked."""
        if len(serial.encode()) > self.ID_BYTES:
            raise ConfigError(f"serial={serial}: {len(serial.encode())} bytes, at most {self.ID_BYTES} are allowed")
        if self.queue_size & (self.queue_size - 1):
            raise ConfigError(f"queue-size={self.queue_size}: allowed are powers of two up to {MAX_QUEUE_SIZE}")
        for name, value in (("logical-block-size", logical), ("physical-block-size", physical)):
            if value & (value - 1):
                raise ConfigError(f"{name}={value}: allowed are powers of two from 512")
        if physical < logical:
            raise ConfigError(f"physical-block-size={physical}: less than logical-block-size={logical}")
        if self.drive.capacity % logical:
            raise ConfigError(
                f"logical-block-size={logical}: the disk of {self.drive.capacity} bytes is no multiple of it"
            )
        for name, value in (("min-io-size", min_io), ("opt-io-size", opt_io)):
            if value % logical or value // logical > 0xFFFF:
                raise ConfigError(f"{name}={value}: allowed are multiples of {logical} up to {0xFFFF * logical}")
