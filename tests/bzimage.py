"""The smallest file that looks like a bzImage to a loader."""

import struct
from pathlib import Path

LOAD_ADDRESS = 16 << 20
INIT_SIZE = 8 << 20


def write_bzimage(path: Path, payload: bytes = b"\x90" * 512, *, protocol: int = 0x20F, xloadflags: int = 1) -> Path:
    image = bytearray(512 * 2)  # the boot sector and one set-up sector
    image[0x1F1] = 1
    image[0x1FE:0x200] = b"\x55\xaa"
    image[0x200:0x202] = bytes([0xEB, 0x268 - 0x202])
    image[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", image, 0x206, protocol)
    struct.pack_into("<I", image, 0x22C, 0x7FFF_FFFF)
    struct.pack_into("<H", image, 0x236, xloadflags)
    struct.pack_into("<I", image, 0x238, 2047)
    struct.pack_into("<QI", image, 0x258, LOAD_ADDRESS, INIT_SIZE)
    path.write_bytes(image + payload)
    return path
