"""Entropy device (virtio 1.3, 5.4)."""

import os
from collections.abc import Callable

from pyvirtio._core import VirtQueue
from pyvirtio.device import Device, queue
from pyvirtio.spec import DeviceId


class Rng(Device, id=DeviceId.ENTROPY):
    """Fills the guest's buffers with bytes from `source`."""

    MAX_BYTES = 64 * 1024  # descriptors may overlap: a small guest can describe a huge chain

    def __init__(self, source: Callable[[int], bytes] = os.urandom) -> None:
        self.source = source

    @queue(size=64)
    def requestq(self, vq: VirtQueue) -> None:
        for chain in vq:
            chain.write(self.source(min(chain.writable, self.MAX_BYTES)))
            chain.complete()
