"""A machine in one process for tests: `Guest` plugs a device and drives it over its real registers, or vhost-user."""

from pyvirtio.testing.driver import Interface, VirtioDriver
from pyvirtio.testing.machine import Guest, Transport
from pyvirtio.testing.queue import Buffer, DeviceNeedsReset, Queue
from pyvirtio.testing.raw import RawBus
from pyvirtio.testing.served import VhostUserDriver

__all__ = [
    "Buffer",
    "DeviceNeedsReset",
    "Guest",
    "Interface",
    "Queue",
    "RawBus",
    "Transport",
    "VhostUserDriver",
    "VirtioDriver",
]
