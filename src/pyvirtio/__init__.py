"""Userspace virtio for KVM, programmable in Python.

A device is a class and a virtqueue is a method: see `Device` and `queue`.
"""

from pyvirtio._core import Chain, VirtQueue
from pyvirtio.backends.block import BlockBackend
from pyvirtio.backends.net import NetBackend
from pyvirtio.device import Device, every, poll, queue
from pyvirtio.errors import ConfigError, GuestError, ProtocolError, StaleChain
from pyvirtio.spec import DeviceId

__all__ = [
    "BlockBackend",
    "Chain",
    "ConfigError",
    "Device",
    "DeviceId",
    "GuestError",
    "NetBackend",
    "ProtocolError",
    "StaleChain",
    "VirtQueue",
    "every",
    "poll",
    "queue",
]
