"""What the tests of `pyvirtio serve` share."""

from collections.abc import Callable
from pathlib import Path

from pyvirtio.device import Device

Serve = Callable[[Device], Path]
"""The fixture: serves a device until the test is over; returns its socket."""


def count_up(length: int) -> bytes:
    return bytes(n % 256 for n in range(length))
