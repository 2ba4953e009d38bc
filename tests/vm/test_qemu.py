"""SeaBIOS under QEMU (TCG, so it runs anywhere) boots a disk that `pyvirtio serve` serves over vhost-user."""

import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from code16 import (
    CLI,
    HLT,
    MOV_AL_AH,
    MOV_DS_AX,
    MOV_SS_AX,
    OUT_DX_AL,
    STI,
    XOR_AX_AX,
    add_ax_to,
    assemble,
    cmp_ax,
    dec_word,
    inc_word,
    interrupt,
    jc,
    jmp,
    jnz,
    label,
    load_ax,
    load_dl,
    mov_ah,
    mov_ax_from,
    mov_dx,
    mov_si,
    mov_sp,
    out,
    store_dl,
    text,
)
from serving import programs

QEMU = "qemu-system-x86_64"
HANG_GUARD = 120
SECTORS = 500
BOOT_SECTOR, BUFFER = 0x7C00, 0x8000
COM1, EXIT_PORT = 0x3F8, 0x501

pytestmark = pytest.mark.skipif(not shutil.which(QEMU), reason=f"{QEMU} is not installed")


def boot_sector() -> bytes:
    """Reads sectors 1 to SECTORS by int 13h (extended read, AH = 42h), prints the sum of their first words, exits."""
    packet = struct.pack("<BBHHH", 16, 0, 1, BUFFER, 0)
    code = assemble(
        BOOT_SECTOR,
        *(CLI, XOR_AX_AX, MOV_DS_AX, MOV_SS_AX, mov_sp(BOOT_SECTOR), STI, store_dl("drive")),
        label("next"),
        *(mov_si("packet"), load_dl("drive"), mov_ah(0x42), interrupt(0x13), jc("failed")),
        *(mov_ax_from(BUFFER), add_ax_to("sum"), inc_word("sector"), dec_word("left")),
        *(load_ax("left"), cmp_ax(0), jnz("next")),
        *(text(COM1, "sum "), load_ax("sum"), mov_dx(COM1), OUT_DX_AL, MOV_AL_AH, OUT_DX_AL),
        label("off"),
        *(out(EXIT_PORT, 0), HLT, jmp("off")),
        label("failed"),
        *(text(COM1, "failed"), jmp("off")),
        *(label("packet"), packet, label("sector"), struct.pack("<Q", 1)),
        *(label("drive"), b"\0", label("sum"), b"\0\0", label("left"), struct.pack("<H", SECTORS)),
    )
    assert len(code) <= 510
    return code.ljust(510, b"\0") + b"\x55\xaa"


def first_word(sector: int) -> int:
    return sector * 7919 & 0xFFFF


SUM = sum(map(first_word, range(1, SECTORS + 1))) & 0xFFFF


@pytest.fixture
def server(tmp_path: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """Serves the disk at `s`."""
    sectors = (struct.pack("<H", first_word(sector)) * 256 for sector in range(1, 2048))
    (tmp_path / "disk.img").write_bytes(boot_sector() + b"".join(sectors))
    with programs(tmp_path) as start:
        yield start("blk", "--blk-file", "disk.img", "--socket-path", "s")


def boot(tmp_path: Path, *properties: str) -> bytes:
    """What the guest prints."""
    front_end = ",".join(["vhost-user-blk-pci,chardev=disk,num-queues=1", *properties])
    command = [QEMU, "-accel", "tcg", "-nodefaults", "-display", "none", "-serial", f"file:{tmp_path / 'serial'}"]
    command += ["-object", "memory-backend-memfd,id=mem,size=64M,share=on"]
    command += ["-machine", "q35,memory-backend=mem", "-m", "64M"]
    command += ["-chardev", f"socket,id=disk,path={tmp_path / 's'}", "-device", front_end]
    command += ["-device", f"isa-debug-exit,iobase={EXIT_PORT},iosize=1"]
    subprocess.run(command, timeout=HANG_GUARD, check=False)
    return (tmp_path / "serial").read_bytes()


@pytest.mark.parametrize("properties", [["disable-modern=on", "disable-legacy=off"], ["disable-legacy=on"]])
@pytest.mark.usefixtures("server")
def test_boots_and_reads_what_is_on_the_disk(tmp_path: Path, properties: list[str]) -> None:
    assert boot(tmp_path, *properties) == b"sum " + struct.pack("<H", SUM)


def test_one_server_serves_one_machine_after_another(server: "subprocess.Popen[bytes]", tmp_path: Path) -> None:
    for _ in range(3):
        assert boot(tmp_path) == b"sum " + struct.pack("<H", SUM)
    server.terminate()
    assert server.wait(HANG_GUARD) == 0
