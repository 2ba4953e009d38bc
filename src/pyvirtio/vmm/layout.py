"""Where things are in guest memory: the addresses that the loaders, the ACPI tables and the machine agree on."""

PAGE = 4096
KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

LOW_RAM_MAX = 3 * GIB
"""RAM ends here at the latest; between it and 4 GiB are PCI windows, interrupt controllers and firmware."""
HIGH_RAM_START = 4 * GIB

EBDA = 0x9FC00
"""The end of the RAM below 640 KiB that a kernel may use."""
BIOS_START, BIOS_END = 0xE0000, 0x100000
"""ACPI tables when a kernel is booted directly, the firmware's shadow otherwise."""

BOOT_PARAMS = 0x7000
PAGE_TABLES = 0x9000
COMMAND_LINE = 0x20000

IOAPIC = 0xFEC00000
LOCAL_APIC = 0xFEE00000

PM_EVENT_PORT = 0x600
PM_CONTROL_PORT = 0x604
PM_TIMER_PORT = 0x608
RESET_PORT = 0xCF9
RESET_VALUE = 0x06
COM1_PORT, COM1_IRQ = 0x3F8, 4
SCI_IRQ = 9
TIMER_IRQ, TIMER_GSI = 0, 2


def ram_ranges(size: int) -> list[tuple[int, int]]:
    """The `(address, size)` of each part of a RAM of `size` bytes."""
    low = min(size, LOW_RAM_MAX)
    return [(0, low)] + ([(HIGH_RAM_START, size - low)] if size > low else [])
