"""Faults of the device as a whole, and of the host under it."""

import errno
import os

from pyvirtio._core import VirtQueue
from pyvirtio.errors import ConfigError
from pyvirtio.faults.engine import Fault, Faults, Part, Running, Undo
from pyvirtio.faults.later import Later
from pyvirtio.faults.ring import number
from pyvirtio.faults.times import seconds
from pyvirtio.spec import Feature


class SlowReset(Fault):
    """A reset takes that much longer: a PCI driver reads the old status until it is over (virtio 1.3, 4.1.4.3.2)."""

    kind = "slow-reset"

    def __init__(self, time: str | float = "1s", *, chance: float = 1.0) -> None:
        super().__init__(chance=chance)
        self.value_text = time if isinstance(time, str) else f"{time:g}s"
        self.seconds = seconds(time)

    @property
    def value(self) -> str:
        return self.value_text

    def reset_time(self) -> float:
        return self.seconds if self.hit(self.chances) else 0.0


class Refuse(Fault):
    """FEATURES_OK does not stick while the driver accepts this feature: its name, or the number of its bit."""

    kind = "refuse"

    def __init__(self, feature: str | int = Feature.EVENT_IDX.bit_length() - 1, *, chance: float = 1.0) -> None:
        super().__init__(chance=chance)
        name = str(feature).upper()
        if name in Feature.__members__:
            feature = Feature[name].bit_length() - 1
        self.bit = number(feature, f"feature (the number of a bit, or {', '.join(Feature.__members__)})", 0, 63)

    @property
    def value(self) -> int:
        return self.bit

    def refused(self, features: int) -> int:
        refused = features & 1 << self.bit
        return refused if refused and self.hit(self.chances) else 0


class Assign(Fault):
    """The host cannot assign the ioeventfd of this queue, for instance "1" or "1:ENOSPC"; at the next DRIVER_OK."""

    kind = "assign"

    def __init__(self, queue: str | int = 0, *, chance: float = 1.0) -> None:
        super().__init__(chance=chance)
        index, _, name = str(queue).partition(":")
        self.queue = number(index, "queue", 0, 0xFFFF)
        self.errno: int = getattr(errno, name or "ENOSPC", 0)
        if not self.errno:
            raise ConfigError(f"{name!r} is no error such as ENOSPC, EEXIST or EMFILE")

    @property
    def value(self) -> str:
        return f"{self.queue}:{errno.errorcode[self.errno]}"

    def assigning(self, vq: VirtQueue) -> None:
        if vq.index == self.queue and self.hit(self.chances):
            raise OSError(self.errno, os.strerror(self.errno))


def storm(running: Running, faults: Faults) -> Undo:
    """Send configuration changes while the faults are on."""
    storms = [_Blowing(running, fault, Later(running.loop)) for fault in faults if isinstance(fault, Storm)]

    def undo() -> None:
        for blowing in storms:
            blowing.end()

    return undo


class Storm(Fault):
    """The configuration changes, and the driver is told, again and again at this interval."""

    kind = "storm"

    def __init__(self, interval: str | float = "1ms", *, chance: float = 1.0) -> None:
        super().__init__(chance=chance)
        self.value_text = interval if isinstance(interval, str) else f"{interval:g}s"
        self.interval = seconds(interval)

    def part(self) -> Part:
        return storm

    @property
    def value(self) -> str:
        return self.value_text


class _Blowing:
    """One storm on one device."""

    def __init__(self, running: Running, fault: Storm, later: Later) -> None:
        self.running, self.fault, self.later = running, fault, later
        self._ended = False
        self._again()

    def _again(self) -> None:
        self.later.call(self.fault.interval, self._blow)

    def _blow(self) -> None:
        if self._ended:
            return
        if self.running.state.driver_ok and self.fault.hit(self.fault.chances):
            self._change()
        self._again()

    def _change(self) -> None:
        device = self.running.device
        if device.config is None:
            device.config_changed()
        else:
            with device.update_config():
                pass

    def end(self) -> None:
        self._ended = True
        self.later.close()
