"""Every register has its name in the specification: it is read and written by that, and nothing else changes."""

from collections.abc import Callable

import pytest

from pyvirtio import Device
from pyvirtio.backends.block import Memory
from pyvirtio.backends.chardev import Null
from pyvirtio.backends.net import NetBackend
from pyvirtio.devices.balloon import Balloon
from pyvirtio.devices.blk import Blk
from pyvirtio.devices.console import Console
from pyvirtio.devices.net import Net
from pyvirtio.devices.rng import Rng
from pyvirtio.spec import NO_VECTOR, Feature, Status
from pyvirtio.testing import Guest
from pyvirtio.testing.pci import Registers
from pyvirtio.testing.registers import COMMON, LEGACY, Modern

SAME = None
"""Read-only: what it was before."""
DRIVER = Status.ACKNOWLEDGE | Status.DRIVER

MODERN_WRITES: dict[str, tuple[int, int | None]] = {
    "device_feature_select": (1, 1),
    "device_feature": (0, SAME),
    "driver_feature_select": (1, 1),
    "driver_feature": (1, 1),
    "config_msix_vector": (0, 0),
    "num_queues": (7, SAME),
    "device_status": (DRIVER, DRIVER),
    "config_generation": (9, SAME),
    "queue_select": (1, 1),
    "queue_size": (32, 32),
    "queue_msix_vector": (9, NO_VECTOR),
    "queue_notify_off": (5, SAME),
    "queue_desc": (0x1_2345_6000, 0x1_2345_6000),
    "queue_driver": (0x1_2345_7000, 0x1_2345_7000),
    "queue_device": (0x1_2345_8000, 0x1_2345_8000),
    "queue_enable": (1, 1),
    "queue_notif_config_data": (3, SAME),
    "queue_reset": (1, SAME),
}
"""What is written to each register, in this order, and what it reads afterwards."""
LEGACY_WRITES: dict[str, tuple[int, int | None]] = {
    "device_features": (0, SAME),
    "driver_features": (int(Feature.EVENT_IDX), int(Feature.EVENT_IDX)),
    "queue_select": (1, 1),
    "queue_size": (8, SAME),
    "queue_address": (1, 1),
    "queue_notify": (1, SAME),
    "device_status": (DRIVER, DRIVER),
    "isr_status": (1, SAME),
    "config_msix_vector": (0, 0),
    "queue_msix_vector": (9, NO_VECTOR),
}


def values(registers: Registers) -> dict[str, int]:
    return {name: getattr(registers, name) for name in registers.layout}


def check(registers: Registers, writes: dict[str, tuple[int, int | None]]) -> None:
    """Write each; what else a write changes is what depends on the selected queue or half of the features."""
    for name, (value, expected) in writes.items():
        before = values(registers)
        setattr(registers, name, value)
        after = values(registers)
        assert after[name] == (before[name] if expected is SAME else expected), name
        changed = {other for other in after if after[other] != before[other]} - {name}
        assert not changed or name.endswith("select"), (name, changed)


def test_every_register_of_the_common_configuration(guest: Guest) -> None:
    assert set(MODERN_WRITES) == set(COMMON)
    driver = guest.plug(Net(NetBackend()), start=False)
    driver.msix.control = 0x8000  # type: ignore[union-attr]
    check(driver.common, MODERN_WRITES)
    assert isinstance(driver.registers, Modern)
    assert driver.registers.isr.status == 0


def test_every_register_of_the_legacy_interface(guest: Guest) -> None:
    assert set(LEGACY_WRITES) == set(LEGACY)
    driver = guest.plug(Net(NetBackend()), transport="legacy", start=False)
    driver.msix.control = 0x8000  # type: ignore[union-attr]
    check(driver.common, LEGACY_WRITES)


DEVICES: dict[str, tuple[Callable[[], Device], set[str]]] = {
    "balloon": (Balloon, {"actual"}),
    "blk": (lambda: Blk(Memory(1 << 20)), set()),
    "console": (lambda: Console(Null()), set()),
    "net": (lambda: Net(NetBackend(), mac="52:54:00:12:34:56"), set()),
    "rng": (Rng, set()),
}
"""Every type of device, and the fields of its configuration that keep any value that a driver writes."""


@pytest.mark.guest(transport=("modern", "legacy", "vhost-user"))
@pytest.mark.parametrize("name", DEVICES)
def test_every_field_of_the_configuration_of_a_device(guest: Guest, name: str) -> None:
    make, writable = DEVICES[name]
    device = make()
    config = guest.plug(device).config
    layout = config.layout
    assert set(layout) == {field[0] for field in getattr(device.config_layout, "_fields_", ())}
    for field, (offset, size) in layout.items():
        there = device.config_bytes()[offset : offset + size]
        assert getattr(config, field) == int.from_bytes(there, "little"), field
        written = int.from_bytes(bytes(range(1, size + 1)), "little")
        setattr(config, field, written)
        expected = written if field in writable else int.from_bytes(there, "little")
        assert getattr(config, field) == expected, field
