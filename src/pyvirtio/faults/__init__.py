"""Faults on purpose: what a device, its transport or its disk can get wrong, switchable while it runs.

    device.faults.add(Late("5ms", chance=0.01), LostInterrupt(chance=0.001), seed=7)

See docs/faults.md for each, and for what Linux's drivers do with it.
"""

from pyvirtio.faults.device import Assign, Refuse, SlowReset, Storm
from pyvirtio.faults.disk import DiskFault, Error, Flip, ReadError, Torn, WriteError
from pyvirtio.faults.engine import Fault, Faults
from pyvirtio.faults.options import KINDS, parse
from pyvirtio.faults.ring import (
    Duplicate,
    Late,
    Length,
    Lost,
    LostInterrupt,
    NeedsReset,
    Reorder,
    RingFault,
    Short,
    Spurious,
)

__all__ = [
    "KINDS",
    "Assign",
    "DiskFault",
    "Duplicate",
    "Error",
    "Fault",
    "Faults",
    "Flip",
    "Late",
    "Length",
    "Lost",
    "LostInterrupt",
    "NeedsReset",
    "ReadError",
    "Refuse",
    "Reorder",
    "RingFault",
    "Short",
    "SlowReset",
    "Spurious",
    "Storm",
    "Torn",
    "WriteError",
    "parse",
]
