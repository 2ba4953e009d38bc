"""A disk that lies now and then, the same lies in each run: does what relies on it notice?

    pyvirtio run ... --drive file=disk.img,id=d0,if=none --device examples/lying_disk.py:LyingDisk,drive=d0,seed=7

What it does wrong is a list, `device.faults`, and can be changed while it runs.
"""

from typing import Annotated

from pyvirtio.backends.block import BlockBackend
from pyvirtio.devices.blk import Blk
from pyvirtio.faults import Flip, ReadError, Torn
from pyvirtio.properties import Range


class LyingDisk(Blk):
    """A virtio-blk disk with torn writes, flipped bits, and a bad sector; `faults` can be switched off any time."""

    def __init__(
        self,
        drive: BlockBackend,
        seed: Annotated[int, "which lies they are"] = 1,
        percent: Annotated[int, "how often each of them is told", Range(0, 100)] = 1,
        bad: Annotated[str, "sectors that cannot be read, as in 100-107"] = "100",
    ) -> None:
        super().__init__(drive)
        often = percent / 100
        self.faults.add(Torn(chance=often), Flip(chance=often), ReadError(bad), seed=seed)
