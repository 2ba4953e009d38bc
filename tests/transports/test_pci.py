"""What a virtio-pci function looks like: ids, BARs, capabilities, configuration, and the properties behind them."""

from ctypes import LittleEndianStructure, c_uint8, c_uint16, c_uint32
from itertools import pairwise
from typing import Any, Literal

import pytest

from pyvirtio import ConfigError, Device, VirtQueue, queue
from pyvirtio.devices.rng import Rng
from pyvirtio.spec import DeviceId
from pyvirtio.testing import Guest
from pyvirtio.testing.driver import VirtioDriver
from pyvirtio.testing.registers import COMMON_CFG, DEVICE_CFG, ISR_CFG, NOTIFY_CFG, PCI_CFG, structures

Transport = Literal["modern", "legacy"]

LEGACY, MSIX, PIO_NOTIFY, MODERN = 0, 1, 2, 4
VENDOR, MSIX_CAP, ADVANCED_FEATURES = 0x09, 0x11, 0x13


class Gadget(Device, id=63):
    """A device type without a legacy interface, with as many queues as asked for."""

    def __init__(self, queues: int = 1) -> None:
        self.count = queues

    @queue(size=8, count="count")
    def ringq(self, vq: VirtQueue) -> None:
        for chain in vq:
            chain.complete()


class PanelConfig(LittleEndianStructure):
    """What the panel shows; its length is no multiple of four."""

    _pack_ = 1
    _fields_ = (("level", c_uint32), ("colour", c_uint16), ("lamp", c_uint8))


class Panel(Gadget, id=DeviceId.CONSOLE, config=PanelConfig):
    """A device with configuration space, which the driver may write, that asks for ioeventfd."""

    pci_class = 0x078000
    ioeventfd = True

    def write_config(self, offset: int, data: bytes) -> None:
        with self.update_config() as config:
            raw = bytearray(bytes(config))
            raw[offset : offset + len(data)] = data
            for name, _ in PanelConfig._fields_:
                setattr(config, name, getattr(PanelConfig.from_buffer(raw), name))


def ids(driver: VirtioDriver) -> tuple[int, int, int, int]:
    """Vendor and device, revision, class, subsystem vendor and id."""
    read = driver.pci.read
    return read(2, 2), read(8, 1), read(8, 4) >> 8, read(0x2E, 2)


def test_the_ids_of_a_transitional_device(guest: Guest) -> None:
    assert ids(guest.plug(Panel(), start=False)) == (0x1003, 0, 0x078000, DeviceId.CONSOLE)
    assert ids(guest.plug(Rng(), start=False)) == (0x1005, 0, 0x00FF00, DeviceId.ENTROPY)


def test_the_ids_of_a_modern_device(guest: Guest) -> None:
    assert ids(guest.plug(Panel(), start=False, disable_legacy=True)) == (0x1043, 1, 0x078000, 0x1100)
    assert ids(guest.plug(Gadget(), start=False)) == (0x1040 + 63, 1, 0x00FF00, 0x1100)


def test_vendor_and_interrupt_pin(guest: Guest) -> None:
    rng = guest.plug(Rng(), start=False)
    assert rng.pci.read(0, 2) == rng.pci.read(0x2C, 2) == 0x1AF4
    assert rng.pci.read(0x3D, 1) == 1


@pytest.mark.parametrize(
    ("properties", "bars"),
    [
        ({}, {LEGACY, MSIX, MODERN}),
        ({"disable_legacy": True}, {MSIX, MODERN}),
        ({"vectors": 0}, {LEGACY, MODERN}),
        ({"modern_pio_notify": True}, {LEGACY, MSIX, PIO_NOTIFY, MODERN}),
        ({"disable_modern": True}, {LEGACY, MSIX}),
    ],
)
def test_which_bars_there_are(guest: Guest, properties: dict[str, Any], bars: set[int]) -> None:
    transport: Transport = "legacy" if properties.get("disable_modern") else "modern"
    rng = guest.plug(Rng(), start=False, transport=transport, **properties)
    assert set(rng.pci.bars) == bars
    assert {index for index, window in rng.pci.bars.items() if window.space == "pio"} == bars & {LEGACY, PIO_NOTIFY}


def test_the_modern_bar_is_64_bit_prefetchable_memory(guest: Guest) -> None:
    rng = guest.plug(Rng(), start=False)
    assert rng.pci.read(0x20, 1) & 0xF == 0xC


def test_one_aligned_capability_of_each_kind(guest: Guest) -> None:
    rng = guest.plug(Rng(), start=False)
    found = list(rng.pci.capabilities)
    assert sorted(cap.id for cap in found) == [VENDOR] * 5 + [MSIX_CAP, ADVANCED_FEATURES]
    assert all(cap.offset % 4 == 0 for cap in found)
    for kind in (COMMON_CFG, NOTIFY_CFG, ISR_CFG, DEVICE_CFG, PCI_CFG):
        assert len(structures(rng.pci, kind)) == 1
    assert rng.msix is not None
    assert rng.pci.read(rng.msix.offset + 4, 4) & 7 == MSIX, "the table is not in the BAR of the structures"


def test_structures_lie_apart_inside_their_bar(guest: Guest) -> None:
    rng = guest.plug(Gadget(queues=40), start=False, page_per_vq=True)
    spans = []
    for kind in (COMMON_CFG, ISR_CFG, DEVICE_CFG, NOTIFY_CFG):
        [found] = structures(rng.pci, kind)
        assert found.bar == MODERN
        assert found.offset % 4096 == 0
        spans.append((found.offset, found.offset + found.length))
    spans.sort()
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))
    assert spans[-1][1] <= rng.pci.sizes[MODERN]


@pytest.mark.parametrize(("page_per_vq", "step"), [(False, 4), (True, 4096)])
def test_each_queue_has_its_own_notify_address(guest: Guest, page_per_vq: bool, step: int) -> None:
    gadget = guest.plug(Gadget(queues=3), page_per_vq=page_per_vq)
    offsets = [gadget.registers.notifier(index)[1] for index in range(3)]
    assert [offset - offsets[0] for offset in offsets] == [0, step, 2 * step]
    for vq in gadget.queues:
        buffer = vq.add(b"x")
        vq.kick()
        buffer.wait()


@pytest.mark.parametrize("queues", [1, 4])
def test_vectors_are_one_more_than_queues_by_default(guest: Guest, queues: int) -> None:
    gadget = guest.plug(Gadget(queues), start=False)
    assert gadget.msix is not None
    assert gadget.msix.count == queues + 1


@pytest.mark.parametrize("ioeventfd", [False, True], ids=["sync", "ioeventfd"])
def test_1024_queues(ioeventfd: bool) -> None:
    with Guest(ioeventfd=ioeventfd, memory=64 << 20) as guest:
        gadget = guest.plug(Gadget(queues=1024))
        assert gadget.common.num_queues == 1024
        vq = gadget.queues[1023]
        buffer = vq.add(b"x")
        vq.kick()
        buffer.wait()


@pytest.mark.parametrize("device", [Rng, Gadget])
def test_no_interface_at_all_is_refused(guest: Guest, device: type[Device]) -> None:
    with pytest.raises(ConfigError, match="gadget7: disable-modern with"):
        guest.plug(device(), name="gadget7", disable_modern=True, disable_legacy=device is Rng)


@pytest.mark.parametrize("vectors", [-1, 2049])
def test_vectors_that_a_table_cannot_have(guest: Guest, vectors: int) -> None:
    with pytest.raises(ConfigError, match=f"rng7: vectors={vectors}: allowed are 0 to 2048"):
        guest.plug(Rng(), name="rng7", vectors=vectors)


def test_a_device_without_a_legacy_interface_has_no_legacy_bar(guest: Guest) -> None:
    assert LEGACY not in guest.plug(Gadget(), start=False).pci.bars


@pytest.mark.parametrize(("event_idx", "indirect_desc"), [(False, True), (True, False)])
def test_ring_features_can_be_switched_off(guest: Guest, event_idx: bool, indirect_desc: bool) -> None:
    rng = guest.plug(Rng(), start=False, event_idx=event_idx, indirect_desc=indirect_desc)
    assert rng.registers.offered() == indirect_desc << 28 | event_idx << 29 | 1 << 32 | 1 << 40


def test_ioeventfd_is_the_default_of_the_device_type() -> None:
    with Guest(ioeventfd=None) as guest:
        assert guest.plug(Panel()).function.ioeventfd
        assert not guest.plug(Rng()).function.ioeventfd
        assert guest.plug(Rng(), ioeventfd=True).function.ioeventfd


@pytest.mark.parametrize("transport", ["modern", "legacy"])
def test_config_past_the_end_reads_0_and_ignores_writes(guest: Guest, transport: Transport) -> None:
    panel = guest.plug(Panel(), transport=transport)
    panel.config.level, panel.config.lamp = 0x11223344, 0x55
    for offset, size in ((4, 4), (6, 2), (7, 1), (8, 4)):
        panel.config.write(offset, size, 0xFFFFFFFF & (1 << 8 * size) - 1)
    assert panel.config.bytes(0, 8) == bytes.fromhex("44332211 0000 55 00")
    assert panel.config.read(4, 4) == 0x550000
    assert panel.config.read(7, 1) == 0


def test_config_changes_its_generation_and_tells_the_driver(guest: Guest) -> None:
    panel = guest.plug(Panel())
    generation = panel.common.config_generation
    with panel.function.device.update_config() as config:
        config.level = 7
    assert panel.common.config_generation != generation
    assert panel.config.level == 7
    assert panel.config_interrupts == 1


@pytest.mark.parametrize("transport", ["modern", "legacy"])
def test_a_config_change_sets_both_isr_bits(guest: Guest, transport: Transport) -> None:
    panel = guest.plug(Panel(), transport=transport, msix=False)
    with panel.function.device.update_config() as config:
        config.level = 7
    assert guest.accel.lines[panel.pci.slot].level
    assert panel.registers.read_isr() == 3
    assert not guest.accel.lines[panel.pci.slot].level
    assert panel.registers.read_isr() == 0


class Broken(Panel):
    """A device whose author made mistakes."""

    def write_config(self, offset: int, data: bytes) -> None:
        raise ZeroDivisionError("write_config")

    resets = 0

    def reset(self) -> None:
        self.resets += 1
        if self.resets == 1:
            raise ZeroDivisionError("reset")


@pytest.mark.parametrize("transport", ["modern", "legacy"])
def test_a_device_that_fails_breaks_alone_and_can_be_reset(
    guest: Guest, transport: Transport, caplog: pytest.LogCaptureFixture
) -> None:
    broken, rng = guest.plug(Broken(), transport=transport), guest.plug(Rng(source=bytes))
    broken.config.level = 1
    assert broken.wait_needs_reset().startswith(
        "Broken.write_config raised ZeroDivisionError: write_config (test_pci.py"
    )
    broken.start()
    assert "failed to reset" in caplog.text
    for driver, vq in ((broken, broken.queues[0]), (rng, rng.requestq)):
        buffer = vq.add(writable=16)
        vq.kick()
        buffer.wait()
        assert not driver.why_broken
