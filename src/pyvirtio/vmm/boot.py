"""Loading Linux without firmware (Documentation/arch/x86/boot.rst: the 64-bit boot protocol)."""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pyvirtio._core import GuestMemory
from pyvirtio.errors import ConfigError
from pyvirtio.vmm import layout
from pyvirtio.vmm.layout import MIB, PAGE

HEADER = 0x1F1  # of the set-up header, in the bzImage and in boot_params alike
MIN_PROTOCOL = 0x20C  # 2.12 brought xloadflags
XLF_KERNEL_64 = 1 << 0
ENTRY_64 = 0x200
LOADED_HIGH = 1 << 0
LOADER_UNDEFINED = 0xFF

E820_RAM, E820_RESERVED = 1, 2


@dataclass(frozen=True)
class Kernel:
    """A bzImage with the fields of its set-up header that a loader needs; addresses and sizes in bytes."""

    path: Path
    header: bytes
    payload: bytes
    load_address: int
    init_size: int
    initrd_max: int
    command_line_max: int

    @classmethod
    def read(cls, path: Path) -> Self:
        image = read_file(path, "kernel")
        if len(image) < 0x268 or image[0x202:0x206] != b"HdrS" or image[0x1FE:0x200] != b"\x55\xaa":
            raise ConfigError(f"kernel {path}: not a bzImage (an x86-64 Linux kernel such as /boot/vmlinuz-*)")
        (version,) = struct.unpack_from("<H", image, 0x206)
        (xloadflags,) = struct.unpack_from("<H", image, 0x236)
        if version < MIN_PROTOCOL or not xloadflags & XLF_KERNEL_64:
            raise ConfigError(f"kernel {path}: no 64-bit entry (boot protocol {version >> 8}.{version & 0xFF})")
        initrd_max, command_line_max = (struct.unpack_from("<I", image, offset)[0] for offset in (0x22C, 0x238))
        load_address, init_size = struct.unpack_from("<QI", image, 0x258)
        setup_sectors = image[HEADER] or 4
        return cls(
            path,
            header=image[HEADER : 0x202 + image[0x201]],
            payload=image[(setup_sectors + 1) * 512 :],
            load_address=load_address,
            init_size=init_size,
            initrd_max=initrd_max,
            command_line_max=command_line_max,
        )

    @property
    def end(self) -> int:
        """What the kernel needs while it unpacks itself ends here."""
        return self.load_address + max(self.init_size, len(self.payload))


@dataclass(frozen=True)
class LinuxBoot:
    """A kernel, its initial RAM disk and command line, checked against the size of the memory."""

    kernel: Kernel
    initrd: bytes
    command_line: bytes
    memory_size: int

    def __post_init__(self) -> None:
        if len(self.command_line) > self.kernel.command_line_max:
            raise ConfigError(
                f"command line of {len(self.command_line)} bytes: the kernel takes {self.kernel.command_line_max}"
            )
        needed = self.kernel.end + len(self.initrd) + PAGE
        if self.initrd_address < self.kernel.end:
            raise ConfigError(
                f"memory of {self.memory_size // MIB} MiB: kernel {self.kernel.path} and its initrd "
                f"({len(self.initrd) // MIB} MiB) need at least {-(-needed // MIB)} MiB"
            )

    @property
    def initrd_address(self) -> int:
        """As high as the kernel allows, so that it is not in the way of the kernel unpacking itself."""
        top = min(self.memory_size, layout.LOW_RAM_MAX, self.kernel.initrd_max + 1)
        return (top - len(self.initrd)) // PAGE * PAGE

    def load(self, memory: GuestMemory, rsdp: int) -> int:
        """Write everything into guest memory; return the address of the kernel's 64-bit entry."""
        memory.write(self.kernel.load_address, self.kernel.payload)
        memory.write(self.initrd_address, self.initrd)
        memory.write(layout.COMMAND_LINE, self.command_line + b"\0")
        memory.write(layout.BOOT_PARAMS, self.boot_params(rsdp))
        return self.kernel.load_address + ENTRY_64

    def boot_params(self, rsdp: int) -> bytes:
        """struct boot_params, the "zero page"."""
        page = bytearray(PAGE)
        page[HEADER : HEADER + len(self.kernel.header)] = self.kernel.header
        struct.pack_into("<B", page, 0x210, LOADER_UNDEFINED)
        struct.pack_into("<B", page, 0x211, page[0x211] | LOADED_HIGH)
        struct.pack_into("<II", page, 0x218, self.initrd_address if self.initrd else 0, len(self.initrd))
        struct.pack_into("<I", page, 0x228, layout.COMMAND_LINE)
        struct.pack_into("<Q", page, 0x070, rsdp)
        table = e820(self.memory_size)
        page[0x1E8] = len(table)
        for number, entry in enumerate(table):
            struct.pack_into("<QQI", page, 0x2D0 + 20 * number, *entry)
        return bytes(page)


def e820(memory_size: int) -> list[tuple[int, int, int]]:
    """The memory map: `(address, size, type)`."""
    (_, low), *high = layout.ram_ranges(memory_size)
    return [
        (0, layout.EBDA, E820_RAM),
        (layout.BIOS_START, layout.BIOS_END - layout.BIOS_START, E820_RESERVED),
        (layout.BIOS_END, low - layout.BIOS_END, E820_RAM),
        *((address, size, E820_RAM) for address, size in high),
    ]


def read_file(path: Path, what: str) -> bytes:
    """The contents of a file that the user named; ConfigError if it cannot be read."""
    if path.exists() and not path.is_file():
        raise ConfigError(f"{what} {path}: not a file")
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{what} {path}: {error.strerror}") from None
