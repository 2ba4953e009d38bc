"""A machine in one process for tests: `Guest` plugs a device and drives it over its real PCI registers."""

from pyvirtio.testing.driver import Guest, Interface, VirtioDriver
from pyvirtio.testing.queue import Buffer, DeviceNeedsReset, Queue

__all__ = ["Buffer", "DeviceNeedsReset", "Guest", "Interface", "Queue", "VirtioDriver"]
