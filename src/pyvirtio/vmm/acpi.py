"""The ACPI tables of the machine (ACPI 6.5, chapter 5): CPUs, interrupts, the PCI bus and how to power off."""

import struct

from pyvirtio.vmm import aml, layout
from pyvirtio.vmm.pci_bus import CONFIG_ADDRESS, IO_WINDOW, MEMORY_WINDOW, SLOTS, irq_of

RSDP = layout.BIOS_START
TABLES = RSDP + 64

S5_SLEEP_TYPE = 5
OEM = b"PYVIRT"

FADT_LENGTH = 244  # ACPI 4.0: everything up to X_GPE1_BLK
WBINVD, PROC_C1, RESET_REG_SUP = 1 << 0, 1 << 2, 1 << 10
LEGACY_DEVICES, VGA_NOT_PRESENT = 1 << 0, 1 << 2
PCAT_COMPAT, CPU_ENABLED = 1 << 0, 1 << 0
IO_SPACE, BYTE_ACCESS = 1, 1
ACTIVE_HIGH, LEVEL = 1 << 0, 3 << 2


def build(cpus: int) -> bytes:
    """Everything from the RSDP on, to be written at `RSDP`."""
    tables = bytearray()

    def place(table: bytes) -> int:
        """Add a table at the next 64 bytes; the FACS asks for that alignment."""
        address = TABLES + len(tables)
        tables.extend(table + bytes(-len(table) % 64))
        return address

    facs_address, dsdt_address = place(facs()), place(dsdt())
    entries = [place(fadt(facs_address, dsdt_address)), place(madt(cpus))]
    xsdt_address = place(table(b"XSDT", 1, struct.pack(f"<{len(entries)}Q", *entries)))
    return rsdp(xsdt_address).ljust(TABLES - RSDP, b"\0") + bytes(tables)


def table(signature: bytes, revision: int, body: bytes) -> bytes:
    """A table with its header and checksum (5.2.6)."""
    header = struct.pack("<4sIBB6s8sI4sI", signature, 36 + len(body), revision, 0, OEM, b"PYVIRTIO", 1, b"PYVI", 1)
    whole = bytearray(header + body)
    whole[9] = checksum(whole)
    return bytes(whole)


def checksum(data: bytes | bytearray) -> int:
    """What makes the sum of all bytes 0."""
    return -sum(data) & 0xFF


def rsdp(xsdt: int) -> bytes:
    """The root pointer (5.2.5): a checksum over the 20 bytes of ACPI 1.0, and one over everything."""
    whole = bytearray(struct.pack("<8sB6sBIIQB3x", b"RSD PTR ", 0, OEM, 2, 0, 36, xsdt, 0))
    whole[8] = checksum(whole[:20])
    whole[32] = checksum(whole)
    return bytes(whole)


def facs() -> bytes:
    """5.2.10; it has no checksum."""
    return struct.pack("<4sIIIIIQB31x", b"FACS", 64, 0, 0, 0, 0, 0, 2)


def fadt(facs_address: int, dsdt_address: int) -> bytes:
    """5.2.9: the power management registers, the reset register, and no 8042 to probe for."""
    whole = bytearray(FADT_LENGTH)

    def put(offset: int, fields: str, *values: int) -> None:
        struct.pack_into("<" + fields, whole, offset, *values)

    put(36, "II", facs_address, dsdt_address)
    put(46, "H", layout.SCI_IRQ)
    put(56, "I", layout.PM_EVENT_PORT)
    put(64, "I", layout.PM_CONTROL_PORT)
    put(76, "I", layout.PM_TIMER_PORT)
    put(88, "BBxB", 4, 2, 4)  # PM1_EVT_LEN, PM1_CNT_LEN, PM_TMR_LEN
    put(96, "HH", 0xFFFF, 0xFFFF)  # no C2, no C3
    put(108, "BH", 0, LEGACY_DEVICES | VGA_NOT_PRESENT)  # CENTURY, IAPC_BOOT_ARCH
    put(112, "I", WBINVD | PROC_C1 | RESET_REG_SUP)
    put(116, "BBBBQB", IO_SPACE, 8, 0, BYTE_ACCESS, layout.RESET_PORT, layout.RESET_VALUE)
    put(140, "Q", dsdt_address)
    return table(b"FACP", 4, bytes(whole[36:]))


def madt(cpus: int) -> bytes:
    """5.2.12: the local APICs, the I/O APIC, and the ISA interrupts that are not what one would assume.

    The timer is on pin 2, and the SCI is level-triggered.
    """
    body = struct.pack("<II", layout.LOCAL_APIC, PCAT_COMPAT)
    for cpu in range(cpus):
        body += struct.pack("<BBBBI", 0, 8, cpu, cpu, CPU_ENABLED)
    body += struct.pack("<BBBBII", 1, 12, cpus, 0, layout.IOAPIC, 0)
    body += struct.pack("<BBBBIH", 2, 10, 0, layout.TIMER_IRQ, layout.TIMER_GSI, 0)
    body += struct.pack("<BBBBIH", 2, 10, 0, layout.SCI_IRQ, layout.SCI_IRQ, ACTIVE_HIGH | LEVEL)
    return table(b"APIC", 4, body)


def dsdt() -> bytes:
    """The PCI bus with its windows and interrupts, the serial port, and the sleep state that powers off."""
    pci = aml.device(
        "PCI0",
        aml.name("_HID", aml.eisa_id("PNP0A03")),
        aml.name(
            "_CRS",
            aml.resources(
                aml.bus_numbers(0, 0),
                aml.io_port(CONFIG_ADDRESS, 8),
                aml.io_window(IO_WINDOW),
                aml.memory_window(MEMORY_WINDOW),
            ),
        ),
        aml.name("_PRT", aml.package(*(interrupt_route(slot) for slot in range(1, SLOTS)))),
    )
    com1 = aml.device(
        "COM1",
        aml.name("_HID", aml.eisa_id("PNP0501")),
        aml.name("_CRS", aml.resources(aml.io_port(layout.COM1_PORT, 8), aml.irq(layout.COM1_IRQ))),
    )
    sleep = aml.name("\\_S5", aml.package(aml.integer(S5_SLEEP_TYPE), *[aml.integer(0)] * 3))
    return table(b"DSDT", 2, aml.scope("\\_SB", pci, com1) + sleep)


def interrupt_route(slot: int) -> bytes:
    """A _PRT entry (6.2.13): pin A of a slot is wired to the I/O APIC."""
    return aml.package(aml.integer(slot << 16 | 0xFFFF), aml.integer(0), aml.integer(0), aml.integer(irq_of(slot)))
