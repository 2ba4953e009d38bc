"""Faults of the device as a whole, and of the host under it."""

import errno

import pytest

from pyvirtio.backends.block import Memory
from pyvirtio.devices.blk import Blk
from pyvirtio.devices.rng import Rng
from pyvirtio.faults import Assign, Refuse, SlowReset, Storm
from pyvirtio.spec import Feature, Status
from pyvirtio.testing import Guest
from pyvirtio.testing.blk import Disk


def test_a_slow_reset_reads_the_old_status_until_it_is_over(guest: Guest) -> None:
    device = Rng()
    driver = guest.plug(device)
    device.faults.add(SlowReset("100ms"))
    driver.status = Status(0)
    assert Status.DRIVER_OK in driver.status
    driver.reset()  # waits for 0
    assert driver.status == 0
    device.faults.clear()
    driver.start()


def test_a_refused_feature_keeps_features_ok_from_sticking(guest: Guest, caplog: pytest.LogCaptureFixture) -> None:
    device = Rng()
    device.faults.add(Refuse("EVENT_IDX"))
    driver = guest.plug(device, start=False)
    with pytest.raises(AssertionError, match="refused"):
        driver.negotiate()
    assert "features refused: 0x20000000" in caplog.text
    driver.features_wanted = ~int(Feature.EVENT_IDX)
    driver.start()


def test_a_storm_of_configuration_changes_and_the_disk_works(guest: Guest) -> None:
    device = Blk(Memory(1 << 20))
    driver = guest.plug(device)
    generation = driver.common.config_generation
    storm = Storm("1ms")
    device.faults.add(storm)
    driver.requestq.wait_until(lambda: driver.config_interrupts >= 3, "three changes")
    assert driver.common.config_generation != generation
    Disk(driver).write(0, bytes(512))
    device.faults.clear()
    assert storm.hits >= 3
    assert driver.config.capacity == 2048


@pytest.mark.parametrize(("text", "code"), [("1", errno.ENOSPC), ("1:EMFILE", errno.EMFILE)])
def test_the_ioeventfd_of_a_queue_cannot_be_assigned(text: str, code: int, caplog: pytest.LogCaptureFixture) -> None:
    with Guest(ioeventfd=True) as guest:
        device = Blk(Memory(1 << 20), num_queues=3)
        device.faults.add(Assign(text))
        driver = guest.plug(device)
        notifiers = driver.function.dataplane.notifiers
        assert guest.accel.ioeventfds == set()
        assert notifiers.mode(1).startswith(f"sync ({errno.errorcode[code]}")
        Disk(driver).write(0, bytes(512))
        device.faults.clear()
        driver.start()
        assert notifiers.mode(1) == "ioeventfd"
