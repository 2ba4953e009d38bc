import struct
from pathlib import Path

import pytest
from bzimage import INIT_SIZE, LOAD_ADDRESS, write_bzimage

from pyvirtio._core import GuestMemory
from pyvirtio.errors import ConfigError
from pyvirtio.vmm import layout
from pyvirtio.vmm.boot import E820_RAM, Kernel, LinuxBoot, e820
from pyvirtio.vmm.layout import GIB, MIB

RSDP = 0xE0000


@pytest.fixture
def kernel(tmp_path: Path) -> Kernel:
    return Kernel.read(write_bzimage(tmp_path / "bzImage", b"payload!" * 64))


def test_kernel_initrd_and_command_line_are_in_memory(kernel: Kernel) -> None:
    memory = GuestMemory.allocate(layout.ram_ranges(64 * MIB))
    boot = LinuxBoot(kernel, b"initrd", b"console=ttyS0", 64 * MIB)
    assert boot.load(memory, RSDP) == LOAD_ADDRESS + 0x200
    assert memory.read(LOAD_ADDRESS, 8) == b"payload!"
    assert memory.read(boot.initrd_address, 6) == b"initrd"
    assert memory.read(layout.COMMAND_LINE, 14) == b"console=ttyS0\0"


def test_boot_params_point_at_everything(kernel: Kernel) -> None:
    boot = LinuxBoot(kernel, b"initrd", b"", 64 * MIB)
    page = boot.boot_params(RSDP)
    assert page[0x202:0x206] == b"HdrS"
    assert struct.unpack_from("<Q", page, 0x70) == (RSDP,)
    assert struct.unpack_from("<II", page, 0x218) == (boot.initrd_address, 6)
    assert struct.unpack_from("<I", page, 0x228) == (layout.COMMAND_LINE,)
    assert page[0x1E8] == len(e820(64 * MIB))
    assert struct.unpack_from("<QQI", page, 0x2D0) == (0, layout.EBDA, E820_RAM)


def test_initrd_is_at_the_top_of_low_memory(kernel: Kernel) -> None:
    assert LinuxBoot(kernel, bytes(5000), b"", 64 * MIB).initrd_address == 64 * MIB - 8192
    assert LinuxBoot(kernel, bytes(4096), b"", 8 * GIB).initrd_address == 2 * GIB - 4096  # initrd_addr_max


def test_memory_above_the_hole_is_in_the_memory_map() -> None:
    assert [entry for entry in e820(5 * GIB) if entry[0] >= MIB] == [
        (MIB, 3 * GIB - MIB, E820_RAM),
        (4 * GIB, 2 * GIB, E820_RAM),
    ]


def test_too_little_memory_names_what_is_needed(kernel: Kernel) -> None:
    least = (LOAD_ADDRESS + INIT_SIZE) // MIB + 1
    with pytest.raises(ConfigError, match=rf"memory of 20 MiB: .* need at least {least} MiB"):
        LinuxBoot(kernel, b"x", b"", 20 * MIB)
    LinuxBoot(kernel, b"x", b"", least * MIB)


def test_command_line_longer_than_the_kernel_takes(kernel: Kernel) -> None:
    with pytest.raises(ConfigError, match="command line of 2048 bytes: the kernel takes 2047"):
        LinuxBoot(kernel, b"", b"x" * 2048, 64 * MIB)


@pytest.mark.parametrize("contents", [b"", b"#!/bin/sh\n", bytes(4096), b"\x7fELF" + bytes(1000)])
def test_what_is_no_bzimage(tmp_path: Path, contents: bytes) -> None:
    path = tmp_path / "kernel"
    path.write_bytes(contents)
    with pytest.raises(ConfigError, match=f"kernel {path}: not a bzImage"):
        Kernel.read(path)


@pytest.mark.parametrize(("protocol", "xloadflags"), [(0x204, 1), (0x20F, 0)])
def test_kernel_without_a_64_bit_entry(tmp_path: Path, protocol: int, xloadflags: int) -> None:
    path = write_bzimage(tmp_path / "bzImage", protocol=protocol, xloadflags=xloadflags)
    with pytest.raises(ConfigError, match="no 64-bit entry"):
        Kernel.read(path)


def test_kernel_that_is_cut_off_has_no_payload_beyond_its_end(tmp_path: Path) -> None:
    path = write_bzimage(tmp_path / "bzImage")
    path.write_bytes(path.read_bytes()[:900])
    assert Kernel.read(path).payload == b""


def test_missing_kernel(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"kernel .*nowhere: No such file or directory"):
        Kernel.read(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="not a file"):
        Kernel.read(tmp_path)
    with pytest.raises(ConfigError, match="kernel /dev/zero: not a file"):
        Kernel.read(Path("/dev/zero"))
