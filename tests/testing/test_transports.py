"""One test, every transport: what `guest.plug` returns looks the same over PCI and over vhost-user."""

from ctypes import LittleEndianStructure, c_uint16, c_uint32, c_uint64

import pytest

from pyvirtio import Device, VirtQueue, queue
from pyvirtio.backends.block import Memory
from pyvirtio.devices.blk import Blk
from pyvirtio.devices.rng import Rng
from pyvirtio.spec import Feature
from pyvirtio.testing import DeviceNeedsReset, Guest, VhostUserDriver, VirtioDriver
from pyvirtio.testing.blk import Disk

everywhere = pytest.mark.guest(
    transport=("modern", "legacy", "vhost-user"), indirect=(False, True), packed=(False, True)
)


class PanelConfig(LittleEndianStructure):
    _pack_ = 1
    _fields_ = (("serial", c_uint64), ("knob", c_uint32), ("level", c_uint16))


class Panel(Device, id=3, config=PanelConfig):
    """Has one knob, which the driver may turn, and counts who uses it."""

    def __init__(self) -> None:
        self.config.serial, self.config.level = 0x1122334455667788, 7
        self.resets = 0

    @queue(size=8)
    def panelq(self, vq: VirtQueue) -> None:
        for chain in vq:
            chain.write(chain.read()[::-1])
            chain.complete()

    def write_config(self, offset: int, data: bytes) -> None:
        assert offset == PanelConfig.knob.offset
        with self.update_config() as config:
            config.knob = int.from_bytes(data, "little")

    def reset(self) -> None:
        self.resets += 1


@everywhere
def test_requests_are_answered(guest: Guest) -> None:
    panel = guest.plug(Panel())
    buffers = [panel.panelq.add([b"ab", b"cd"], [3, 5]) for _ in range(2)]
    assert all(bool(buffer.table) is guest.indirect for buffer in buffers)
    panel.panelq.kick()
    assert [buffer.wait() for buffer in buffers] == [b"dcba"] * 2


@everywhere
def test_the_configuration_has_names(guest: Guest) -> None:
    panel = guest.plug(Panel())
    assert (panel.config.serial, panel.config.level) == (0x1122334455667788, 7)
    panel.config.knob = 5
    assert panel.config.knob == 5
    assert panel.config_interrupts == 1


@everywhere
def test_a_reset_starts_over(guest: Guest) -> None:
    device = Panel()
    panel = guest.plug(device, features=~int(Feature.EVENT_IDX))
    first = panel.panelq
    panel.start()
    assert device.resets == 1
    assert panel.panelq is not first
    assert not panel.features & Feature.EVENT_IDX
    buffer = panel.panelq.add(b"again", 5)
    panel.panelq.kick()
    assert buffer.wait() == b"niaga"


@everywhere
def test_a_broken_device_says_so_and_recovers(guest: Guest) -> None:
    panel = guest.plug(Panel())
    buffer = panel.panelq.add(writable=4)
    table = buffer.table[0] if buffer.table else panel.panelq.ring.desc
    guest.memory.write(table, (1 << 40).to_bytes(8, "little"))
    panel.panelq.kick()
    assert "0x10000000000" in panel.wait_needs_reset()
    with pytest.raises(DeviceNeedsReset):
        panel.check()
    panel.start()
    assert panel.why_broken is None


@everywhere
def test_a_disk_is_a_disk(guest: Guest) -> None:
    disk = Disk(guest.plug(Blk(Memory(1 << 20), num_queues=2)))
    disk.write(3, b"x" * 512, queue=1)
    assert disk.read(2, 1536) == bytes(512) + b"x" * 512 + bytes(512)
    disk.flush()


def test_a_served_device_shares_the_memory_of_the_machine(guest: Guest) -> None:
    served, plugged = guest.plug(Rng(), transport="vhost-user", queue_size=4), guest.plug(Rng())
    assert isinstance(served, VhostUserDriver)
    assert isinstance(plugged, VirtioDriver)
    assert served.requestq.ring.size == 4
    with guest.only_writes((0x1000, guest.border)):
        for driver in (served, plugged):
            buffer = driver.requestq.add(writable=64)
            driver.requestq.kick()
            assert len(buffer.wait()) == 64
    guest.unplug(served)
    assert guest.drivers == [plugged]
