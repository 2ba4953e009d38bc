"""A thermometer: a device type of its own, with a configuration space and a queue of alarms.

    pyvirtio run ... --device examples/thermometer.py:Thermometer,file=/sys/class/thermal/thermal_zone0/temp

A driver reads the temperature from the configuration space and is told when it changes. It may set `alarm` there, and
leaves buffers in the queue: one comes back, with the temperature in it, whenever the alarm goes off.
"""

from ctypes import LittleEndianStructure, c_int32
from pathlib import Path
from struct import pack
from threading import Lock
from typing import Annotated

from pyvirtio import Chain, Device, VirtQueue, every, queue


class ThermometerConfig(LittleEndianStructure):
    """Both in thousandths of a degree Celsius."""

    _pack_ = 1
    _fields_ = (("temperature", c_int32), ("alarm", c_int32))


class Thermometer(Device, id=63, config=ThermometerConfig):
    """Measures while a driver is there."""

    def __init__(
        self,
        file: Annotated[str, "where the temperature is, in thousandths of a degree"],
        period: Annotated[float, "seconds between two measurements"] = 1.0,
    ) -> None:
        self.file, self.period = Path(file), period
        self.config.temperature = self.read()
        self.config.alarm = 100_000
        self.due: int | None = None
        """The temperature of an alarm that the driver does not know of yet."""
        self.waiting: list[Chain] = []
        self.lock = Lock()

    def read(self) -> int:
        return int(self.file.read_text())

    @queue(size=16)
    def alarmq(self, vq: VirtQueue) -> None:
        self.waiting.extend(vq)
        self.tell()

    @every("period")
    def measure(self) -> None:
        was, now = self.config.temperature, self.read()
        if now == was:
            return
        with self.update_config() as config:
            config.temperature = now
        if was < self.config.alarm <= now:
            self.due = now
            self.tell()

    def tell(self) -> None:
        """Give a buffer back if an alarm is due. Two threads may come here: the queue may be served by a vCPU."""
        with self.lock:
            if self.due is not None and self.waiting:
                chain = self.waiting.pop(0)
                chain.write(pack("<i", self.due))
                chain.complete()
                self.due = None

    def write_config(self, offset: int, data: bytes) -> None:
        if offset == ThermometerConfig.alarm.offset and len(data) == 4:
            with self.update_config() as config:
                config.alarm = int.from_bytes(data, "little", signed=True)

    def reset(self) -> None:
        self.waiting.clear()
        self.due = None
