"""Recognizes disk images that are not raw, so that nobody serves their headers by mistake."""

SIGNATURES = {
    "qcow2": (0, b"QFI\xfb"),
    "qed": (0, b"QED\0"),
    "vmdk": (0, b"KDMV"),
    "vhdx": (0, b"vhdxfile"),
    "vhd": (0, b"conectix"),
    "vdi": (64, b"\x7f\x10\xda\xbe"),
    "parallels": (0, b"WithoutFreeSpace"),
}
"""Format -> what stands where in its first sector."""


def foreign_format(sector: bytes) -> str | None:
    """The format of an image that begins with `sector`, unless it looks raw. It may be raw all the same: a guest writes
    to its disk what it likes."""
    return next((name for name, (at, magic) in SIGNATURES.items() if sector.startswith(magic, at)), None)
