"""A bootable disk: its boot sector reads the sectors behind it through the firmware and says what it found."""

import struct

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
    store_dl,
    text,
)

BOOT_SECTOR, BUFFER = 0x7C00, 0x8000
COM1 = 0x3F8
SECTORS = 2048


def image(count: int, *, leave: bytes, halfway: bytes = b"") -> bytes:
    """A disk of 1 MiB that boots, reads sectors 1 to `count`, and prints `answer(count)` on the first serial port.

    `halfway` and `leave` are code that runs after half of the sectors, and at the end.
    """
    sectors = (struct.pack("<H", _first_word(sector)) * 256 for sector in range(1, SECTORS))
    return _boot_sector(count, leave, halfway) + b"".join(sectors)


def answer(count: int) -> bytes:
    """The sum of the first words of sectors 1 to `count`, as the boot sector prints it."""
    return b"sum " + struct.pack("<H", sum(map(_first_word, range(1, count + 1))) & 0xFFFF)


def _first_word(sector: int) -> int:
    return sector * 7919 & 0xFFFF


def _boot_sector(count: int, leave: bytes, halfway: bytes) -> bytes:
    """Reads by int 13h, extended read (AH = 42h), one sector at a time."""
    packet = struct.pack("<BBHHH", 16, 0, 1, BUFFER, 0)
    code = assemble(
        BOOT_SECTOR,
        *(CLI, XOR_AX_AX, MOV_DS_AX, MOV_SS_AX, mov_sp(BOOT_SECTOR), STI, store_dl("drive")),
        label("next"),
        *(mov_si("packet"), load_dl("drive"), mov_ah(0x42), interrupt(0x13), jc("failed")),
        *(mov_ax_from(BUFFER), add_ax_to("sum"), inc_word("sector"), dec_word("left")),
        *(load_ax("left"), cmp_ax(count // 2), jnz("go on"), halfway),
        label("go on"),
        *(load_ax("left"), cmp_ax(0), jnz("next")),
        *(text(COM1, "sum "), load_ax("sum"), mov_dx(COM1), OUT_DX_AL, MOV_AL_AH, OUT_DX_AL),
        label("off"),
        *(leave, HLT, jmp("off")),
        label("failed"),
        *(text(COM1, "failed"), jmp("off")),
        *(label("packet"), packet, label("sector"), struct.pack("<Q", 1)),
        *(label("drive"), b"\0", label("sum"), b"\0\0", label("left"), struct.pack("<H", count)),
    )
    assert len(code) <= 510
    return code.ljust(510, b"\0") + b"\x55\xaa"
