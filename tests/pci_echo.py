"""The device under random PCI accesses, and who listens for its defects."""

import logging
from ctypes import LittleEndianStructure, c_uint32

from pyvirtio import Device, VirtQueue, queue
from pyvirtio.spec import DeviceId


class EchoConfig(LittleEndianStructure):
    """One register that the driver may write."""

    _pack_ = 1
    _fields_ = (("value", c_uint32),)


class Echo(Device, id=DeviceId.CONSOLE, config=EchoConfig):
    """Three queues that give back what they get, and how often the device was reset."""

    def __init__(self) -> None:
        self.active = False
        self.resets = 0

    @queue(size=8, count=3)
    def echoq(self, vq: VirtQueue) -> None:
        for chain in vq:
            chain.write(chain.read())
            chain.complete()

    def write_config(self, offset: int, data: bytes) -> None:
        with self.update_config() as config:
            raw = bytearray(bytes(config))
            raw[offset : offset + len(data)] = data
            config.value = int.from_bytes(raw, "little")

    def activate(self, features: int) -> None:
        assert not self.active
        self.active = True

    def reset(self) -> None:
        assert self.active
        self.active = False
        self.resets += 1


class Tracebacks(logging.Handler):
    """Keeps the messages that tell of a defect, not of a guest's mistake."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info:
            self.found.append(f"{record.getMessage()}: {record.exc_info[1]!r}")
