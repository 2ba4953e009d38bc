import struct
from collections.abc import Iterator

import pytest

from pyvirtio.vmm import acpi, aml, layout

BASE = acpi.RSDP


def tables(blob: bytes) -> dict[bytes, bytes]:
    """All tables by signature, found as an operating system does: from the RSDP."""
    assert blob[:8] == b"RSD PTR "
    assert sum(blob[:20]) % 256 == sum(blob[:36]) % 256 == 0
    (xsdt_address,) = struct.unpack_from("<Q", blob, 24)
    xsdt = table_at(blob, xsdt_address)
    pointers = struct.unpack(f"<{len(xsdt[36:]) // 8}Q", xsdt[36:])
    found = {table[:4]: table for table in (xsdt, *(table_at(blob, pointer) for pointer in pointers))}
    facs, dsdt = struct.unpack_from("<II", found[b"FACP"], 36)
    assert facs % 64 == 0
    return {**found, b"FACS": table_at(blob, facs), b"DSDT": table_at(blob, dsdt)}


def table_at(blob: bytes, address: int) -> bytes:
    (length,) = struct.unpack_from("<I", blob, address - BASE + 4)
    return blob[address - BASE : address - BASE + length]


def test_every_table_is_reached_and_adds_up_to_zero() -> None:
    found = tables(acpi.build(2))
    assert set(found) == {b"XSDT", b"FACP", b"APIC", b"FACS", b"DSDT"}
    for signature, table in found.items():
        assert signature == b"FACS" or sum(table) % 256 == 0


def test_tables_for_the_most_cpus_fit_below_1_mib() -> None:
    assert BASE + len(acpi.build(128)) <= layout.BIOS_END


def madt_entries(madt: bytes) -> Iterator[bytes]:
    rest = madt[44:]
    while rest:
        yield rest[: rest[1]]
        rest = rest[rest[1] :]


def test_madt_has_the_cpus_and_the_interrupts_that_differ_from_isa() -> None:
    entries = list(madt_entries(tables(acpi.build(3))[b"APIC"]))
    assert [entry[3] for entry in entries if entry[0] == 0] == [0, 1, 2]
    assert [struct.unpack("<I", entry[4:8]) for entry in entries if entry[0] == 1] == [(layout.IOAPIC,)]
    overrides = [struct.unpack("<BIH", entry[3:]) for entry in entries if entry[0] == 2]
    assert overrides == [(0, 2, 0), (9, 9, 0xD)]


def test_fadt_claims_no_8042_and_has_a_reset_register() -> None:
    fadt = tables(acpi.build(1))[b"FACP"]
    (boot_flags,) = struct.unpack_from("<H", fadt, 109)
    assert not boot_flags & 1 << 1
    assert struct.unpack_from("<BBBBQB", fadt, 116) == (1, 8, 0, 1, layout.RESET_PORT, layout.RESET_VALUE)


def test_dsdt_has_the_bus_the_serial_port_and_how_to_power_off() -> None:
    dsdt = tables(acpi.build(1))[b"DSDT"]
    assert b"PCI0" in dsdt
    assert b"COM1" in dsdt
    assert dsdt.endswith(bytes.fromhex("08 5c 5f53355f 12 07 04 0a05 00 00 00"))  # Name(\_S5_, Package{5, 0, 0, 0})


@pytest.mark.parametrize(
    ("length", "encoded"), [(0, "01"), (62, "3f"), (63, "41 04"), (4093, "4f ff"), (4094, "81 00 01")]
)
def test_package_lengths_count_themselves(length: int, encoded: str) -> None:
    start = bytes.fromhex(encoded)
    assert aml._with_length(bytes(length)) == start + bytes(length)


def test_eisa_id() -> None:
    assert aml.eisa_id("PNP0A03") == bytes.fromhex("0c 41d00a03")


@pytest.mark.parametrize(
    ("value", "encoded"), [(0, "00"), (1, "01"), (2, "0a02"), (256, "0b0001"), (0x1FFFF, "0cffff0100")]
)
def test_integers_take_the_shortest_form(value: int, encoded: str) -> None:
    assert aml.integer(value) == bytes.fromhex(encoded)
