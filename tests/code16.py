"""16-bit machine code for guests in tests: each function is one instruction, a label is a name.

    assemble(0x7C00, mov_dx(0x3F8), mov_al(0x48), OUT_DX_AL, label("stop"), HLT, jmp("stop"))

Jumps and addresses are resolved by `assemble`.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Label:
    name: str


@dataclass(frozen=True)
class Reference:
    """An instruction that ends in a label: its distance in `width` bytes, or its address."""

    opcode: bytes
    name: str
    width: int
    relative: bool


Item = bytes | Label | Reference

CLI, STI, HLT = b"\xfa", b"\xfb", b"\xf4"
IN_AL_DX = b"\xec"
OUT_DX_AL, OUT_DX_AX = b"\xee", b"\xef"
XOR_AX_AX = b"\x31\xc0"
MOV_AL_AH = b"\x88\xe0"
MOV_DS_AX, MOV_SS_AX = b"\x8e\xd8", b"\x8e\xd0"


def label(name: str) -> Label:
    return Label(name)


def mov_al(value: int) -> bytes:
    return bytes([0xB0, value])


def mov_ah(value: int) -> bytes:
    return bytes([0xB4, value])


def mov_ax(value: int) -> bytes:
    return b"\xb8" + value.to_bytes(2, "little")


def mov_dx(value: int) -> bytes:
    return b"\xba" + value.to_bytes(2, "little")


def mov_sp(value: int) -> bytes:
    return b"\xbc" + value.to_bytes(2, "little")


def mov_si(name: str) -> Reference:
    """SI = the address of a label."""
    return Reference(b"\xbe", name, 2, relative=False)


def mov_ax_from(address: int) -> bytes:
    """AX = the word at an address."""
    return b"\xa1" + address.to_bytes(2, "little")


def load_ax(name: str) -> Reference:
    return Reference(b"\xa1", name, 2, relative=False)


def load_dl(name: str) -> Reference:
    return Reference(b"\x8a\x16", name, 2, relative=False)


def store_dl(name: str) -> Reference:
    return Reference(b"\x88\x16", name, 2, relative=False)


def add_ax_to(name: str) -> Reference:
    return Reference(b"\x01\x06", name, 2, relative=False)


def inc_word(name: str) -> Reference:
    return Reference(b"\xff\x06", name, 2, relative=False)


def dec_word(name: str) -> Reference:
    """Sets the zero flag."""
    return Reference(b"\xff\x0e", name, 2, relative=False)


def cmp_ax(value: int) -> bytes:
    """The zero flag says whether they are equal."""
    return b"\x3d" + value.to_bytes(2, "little")


def inc_word_at(address: int) -> bytes:
    return b"\xff\x06" + address.to_bytes(2, "little")


def cmp_word_at(address: int, value: int) -> bytes:
    """A word with a number up to 127."""
    return b"\x83\x3e" + address.to_bytes(2, "little") + bytes([value])


def any_of_al(bits: int) -> bytes:
    """The zero flag says whether none of them is set."""
    return bytes([0xA8, bits])


def interrupt(number: int) -> bytes:
    return bytes([0xCD, number])


def jmp(name: str) -> Reference:
    return Reference(b"\xe9", name, 2, relative=True)


def jc(name: str) -> Reference:
    return Reference(b"\x0f\x82", name, 2, relative=True)


def jz(name: str) -> Reference:
    return Reference(b"\x0f\x84", name, 2, relative=True)


def jnz(name: str) -> Reference:
    return Reference(b"\x0f\x85", name, 2, relative=True)


def out(port: int, value: int) -> bytes:
    """One byte to a port; changes AL and DX."""
    return mov_dx(port) + mov_al(value) + OUT_DX_AL


def out_word(port: int, value: int) -> bytes:
    return mov_dx(port) + mov_ax(value) + OUT_DX_AX


def text(port: int, message: str) -> bytes:
    return b"".join(out(port, ord(character)) for character in message)


def assemble(origin: int, *items: Item) -> bytes:
    """The code, to be placed at `origin`."""
    addresses: dict[str, int] = {}
    position = origin
    for item in items:
        if isinstance(item, Label):
            addresses[item.name] = position
        else:
            position += len(item) if isinstance(item, bytes) else len(item.opcode) + item.width
    code = b""
    for item in items:
        if isinstance(item, Reference):
            end = origin + len(code) + len(item.opcode) + item.width
            value = addresses[item.name] - (end if item.relative else 0)
            code += item.opcode + (value & 0xFFFF).to_bytes(item.width, "little")
        elif isinstance(item, bytes):
            code += item
    return code


def firmware_image(*items: Item) -> bytes:
    """64 KiB that end in a jump to the code at their start: what a CPU executes after a reset, with CS = ROM."""
    size, reset_vector = 0x10000, 0xFFF0
    image = bytearray(assemble(0, *items).ljust(size, b"\0"))
    image[reset_vector : reset_vector + 3] = b"\xe9" + (size - reset_vector - 3).to_bytes(2, "little")  # jmp 0
    return bytes(image)
