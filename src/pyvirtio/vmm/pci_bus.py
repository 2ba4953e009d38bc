"""The PCI bus of a machine: configuration mechanism 1, the addresses of the BARs, and who answers an access."""

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

from pyvirtio.errors import ConfigError
from pyvirtio.transports.pci_config import COMMAND, INTERRUPT_LINE, BarKind, Command, PciFunction, Region

CONFIG_ADDRESS = 0xCF8
CONFIG_DATA = 0xCFC
SLOTS = 32

IO_WINDOW = range(0xC000, 0x10000)
MEMORY_WINDOW = range(0xE000_0000, 0xFEC0_0000)
"""Where BARs may be, those of 64 bits too; ACPI's _CRS says the same."""

FIRST_INTX_GSI = 16
INTX_GSIS = 8


def irq_of(slot: int) -> int:
    """The GSI that INTA of a slot is wired to; ACPI's _PRT says the same."""
    return FIRST_INTX_GSI + slot % INTX_GSIS


class HostBridge(PciFunction):
    """Function 0:0.0 as firmware expects it: an i440FX whose PAM registers can be written."""

    PAM = 0x59

    def __init__(self) -> None:
        super().__init__(0, vendor=0x8086, device=0x1237, class_code=0x060000, revision=2)
        self.set_subsystem(0x1AF4, 0x1100)
        self.config.put(self.PAM, bytes(7), b"\xff" * 7)


class PciBus:
    """Bus 0 with single-function devices. Accesses may come from any thread; what nobody answers reads all ones."""

    def __init__(self, functions: Iterable[PciFunction] = ()) -> None:
        self.functions: dict[int, PciFunction] = {}
        self._address = 0
        self._regions: tuple[Region, ...] = ()
        for function in functions:
            self.add(function)

    def add(self, function: PciFunction) -> None:
        """Plug a function into its slot."""
        taken = self.functions.get(function.slot)
        if taken is not None or not 0 <= function.slot < SLOTS:
            raise ConfigError(f"pci: slot {function.slot} is " + ("taken" if taken else f"not below {SLOTS}"))
        self.functions[function.slot] = function
        function.decoding_changed = self._find_regions
        self._find_regions()

    def remove(self, function: PciFunction) -> None:
        """Unplug: the function answers nothing from now on."""
        del self.functions[function.slot]
        self._find_regions()

    def assign_bars(self) -> None:
        """Do what firmware does: place every BAR, largest first, switch decoding on, and fill in the interrupt line."""
        bars = [(bar, function) for function in self.functions.values() for bar in function.bars]
        free = {True: IO_WINDOW.start, False: MEMORY_WINDOW.start}
        for bar, function in sorted(bars, key=lambda pair: -pair[0].size):
            is_io = bar.kind is BarKind.IO
            address = -(-free[is_io] // bar.size) * bar.size
            free[is_io] = address + bar.size
            window = IO_WINDOW if is_io else MEMORY_WINDOW
            if free[is_io] > window.stop:
                raise ConfigError(f"pci: slot {function.slot}: BAR{bar.index} of {bar.size:#x} bytes does not fit")
            function.place_bar(bar, address)
        for function in self.functions.values():
            function.config_write(INTERRUPT_LINE, 1, irq_of(function.slot))
            function.config_write(COMMAND, 2, function.command | Command.IO | Command.MEMORY)

    def reset(self) -> None:
        for function in self.functions.values():
            function.reset()
        self._address = 0

    def save(self) -> dict[str, Any]:
        """The state of every function by its slot; while nothing runs."""
        return {"address": self._address, "slots": {str(slot): f.save() for slot, f in self.functions.items()}}

    def restore(self, state: dict[str, Any]) -> None:
        """Take the state of `save`; the same functions are plugged."""
        self._address = state["address"]
        for slot, function in self.functions.items():
            function.restore(state["slots"][str(slot)])

    def close(self) -> None:
        """Close every function, even if one of them fails."""
        with ExitStack() as closing:
            for function in self.functions.values():
                closing.callback(function.close)

    def pio_read(self, port: int, size: int) -> int:
        if port == CONFIG_ADDRESS and size == 4:
            return self._address
        if not CONFIG_DATA <= port < CONFIG_DATA + 4:
            return self._read("pio", port, size)
        function = self._addressed(port, size)
        if function is None:
            return (1 << 8 * size) - 1
        return function.config_read(self._config_offset(port), size)

    def pio_write(self, port: int, size: int, value: int) -> None:
        if port == CONFIG_ADDRESS and size == 4:
            self._address = value & 0x80FFFFFC
        elif not CONFIG_DATA <= port < CONFIG_DATA + 4:
            self._write("pio", port, size, value)
        elif (function := self._addressed(port, size)) is not None:
            function.config_write(self._config_offset(port), size, value)

    def mmio_read(self, address: int, size: int) -> int:
        return self._read("mmio", address, size)

    def mmio_write(self, address: int, size: int, value: int) -> None:
        self._write("mmio", address, size, value)

    def _addressed(self, port: int, size: int) -> PciFunction | None:
        """The function whose configuration space the address register names: only bus 0 and functions 0 exist."""
        if not self._address >> 31 or self._address >> 16 & 0xFF or self._address >> 8 & 7:
            return None
        if port + size > CONFIG_DATA + 4:
            return None
        return self.functions.get(self._address >> 11 & 31)

    def _config_offset(self, port: int) -> int:
        return (self._address & 0xFC) + port - CONFIG_DATA

    def _find_regions(self) -> None:
        # One assignment, so that accesses need no lock.
        self._regions = tuple(region for f in self.functions.values() for region in f.regions())

    def _region(self, space: str, address: int, size: int) -> Region | None:
        for region in self._regions:
            if region.space == space and region.start <= address and address + size <= region.end:
                return region
        return None

    def _read(self, space: str, address: int, size: int) -> int:
        region = self._region(space, address, size)
        if region is None:
            return (1 << 8 * size) - 1
        return region.function.bar_read(region.bar, address - region.start, size)

    def _write(self, space: str, address: int, size: int, value: int) -> None:
        region = self._region(space, address, size)
        if region is not None:
            region.function.bar_write(region.bar, address - region.start, size, value)
