"""Booting from a firmware image, such as SeaBIOS, instead of loading a kernel."""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pyvirtio.errors import ConfigError
from pyvirtio.vmm import layout
from pyvirtio.vmm.boot import read_file
from pyvirtio.vmm.layout import GIB, KIB, MIB

MIN_SIZE, MAX_SIZE = 64 * KIB, 8 * MIB
SHADOW_SIZE = layout.BIOS_END - layout.BIOS_START


@dataclass(frozen=True)
class Firmware:
    """An image that ends at 4 GiB, where the CPU's first instruction is fetched from its last 16 bytes."""

    path: Path
    image: bytes

    @classmethod
    def read(cls, path: Path) -> Self:
        image = read_file(path, "firmware")
        if not MIN_SIZE <= len(image) <= MAX_SIZE or len(image) % (64 * KIB):
            raise ConfigError(
                f"firmware {path}: {len(image)} bytes; an image is a multiple of 64 KiB up to {MAX_SIZE // MIB} MiB"
            )
        return cls(path, image)

    @property
    def address(self) -> int:
        return 4 * GIB - len(self.image)

    @property
    def shadow(self) -> tuple[int, bytes]:
        """The end of the image as it is also seen below 1 MiB, as RAM: `(address, bytes)`."""
        tail = self.image[-SHADOW_SIZE:]
        return layout.BIOS_END - len(tail), tail
