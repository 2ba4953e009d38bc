"""Each rule of the initialisation of a modern device, broken once."""

from collections.abc import Callable
from ctypes import LittleEndianStructure, c_uint8, c_uint32, c_uint64

import pytest

from pyvirtio import Device, VirtQueue, queue
from pyvirtio.spec import Feature, Status
from pyvirtio.testing import Guest, VirtioDriver

pytestmark = pytest.mark.guest(lint=True)


class PanelConfig(LittleEndianStructure):
    _pack_ = 1
    _fields_ = (("serial", c_uint64), ("level", c_uint32), ("mac", c_uint8 * 6))


class Panel(Device, id=3, config=PanelConfig):
    @queue(size=8)
    def panelq(self, vq: VirtQueue) -> None:
        for chain in vq:
            chain.complete()


KNOWN = Status.ACKNOWLEDGE | Status.DRIVER


def status(*values: int) -> Callable[[VirtioDriver], None]:
    def write(driver: VirtioDriver) -> None:
        for value in values:
            driver.common.device_status = value

    return write


def common(name: str, value: int, before: int = KNOWN) -> Callable[[VirtioDriver], None]:
    def write(driver: VirtioDriver) -> None:
        driver.common.device_status = before
        setattr(driver.common, name, value)

    return write


def after_start(name: str, value: int) -> Callable[[VirtioDriver], None]:
    def write(driver: VirtioDriver) -> None:
        driver.start()
        driver.common.queue_select = 0
        setattr(driver.common, name, value)

    return write


def no_version(driver: VirtioDriver) -> None:
    driver.common.device_status = KNOWN
    driver.registers.accept(int(Feature.EVENT_IDX))
    driver.common.device_status = KNOWN | Status.FEATURES_OK


def late_features(driver: VirtioDriver) -> None:
    driver.negotiate()
    driver.registers.accept(0)


def no_such_queue(driver: VirtioDriver) -> None:
    driver.negotiate()
    driver.registers.set_queue_size(9, 8)


def unagreed_reset(driver: VirtioDriver) -> None:
    driver.features_wanted = ~int(Feature.RING_RESET)
    after_start("queue_reset", 1)(driver)


def early_config(driver: VirtioDriver) -> None:
    driver.common.device_status = KNOWN
    driver.config.level = 3


def not_read_back(driver: VirtioDriver) -> None:
    driver.common.device_status = KNOWN
    driver.registers.accept(driver.registers.offered())
    status(KNOWN | Status.FEATURES_OK, KNOWN | Status.FEATURES_OK | Status.DRIVER_OK)(driver)


def early_notify(driver: VirtioDriver) -> None:
    driver.negotiate()
    driver.set_up()
    driver.panelq.notify()


def blind_vector(driver: VirtioDriver) -> None:
    driver.negotiate()
    driver.set_up()
    driver.common.config_msix_vector = 0
    driver.status |= Status.DRIVER_OK


BROKEN: dict[str, tuple[str, Callable[[VirtioDriver], object]]] = {
    "no wait for the reset": ("4.1.4.3.2", status(KNOWN, 0, Status.ACKNOWLEDGE)),
    "a bit is cleared": ("2.1.1", status(KNOWN, Status.DRIVER)),
    "on after FAILED": ("2.1.1", status(KNOWN | Status.FAILED, KNOWN | Status.FAILED | Status.FEATURES_OK)),
    "DRIVER first": ("3.1.1", status(Status.DRIVER)),
    "FEATURES_OK skipped": ("3.1.1", status(KNOWN, KNOWN | Status.DRIVER_OK)),
    "FEATURES_OK not read back": ("3.1.1", not_read_back),
    "features before DRIVER": ("3.1.1", lambda driver: driver.registers.offered()),
    "features not offered": ("2.2.1", common("driver_feature", 1 << 5)),
    "features after FEATURES_OK": ("3.1.1", late_features),
    "VERSION_1 not accepted": ("6.1", no_version),
    "a read-only register": ("4.1.4.3.2", common("num_queues", 1)),
    "a queue before FEATURES_OK": ("3.1.1", common("queue_size", 8)),
    "a queue that does not exist": ("4.1.4.3.2", no_such_queue),
    "a size of 5": ("4.1.4.3.2", common("queue_size", 5, KNOWN | Status.FEATURES_OK)),
    "queue_enable = 0": ("4.1.4.3.2", after_start("queue_enable", 0)),
    "queue_reset without the feature": ("2.6.1", unagreed_reset),
    "the address of an enabled queue": ("4.1.4.3.2", after_start("queue_desc", 0x8000)),
    "the vector of an enabled queue": ("4.1.4.3.2", after_start("queue_msix_vector", 0)),
    "a vector not read back": ("4.1.5.1.2.2", blind_vector),
    "a notify before DRIVER_OK": ("3.1.1", early_notify),
    "the configuration before DRIVER": ("3.1.1", lambda driver: driver.config.level),
    "a write to it before FEATURES_OK": ("3.1.1", early_config),
    "half of a register": ("4.1.3.1", lambda driver: driver.registers.common.read(20, 2)),
    "a byte of a field of 4": ("4.1.3.1", lambda driver: driver.config.read(8, 1)),
    "4 bytes of an array": ("4.1.3.1", lambda driver: driver.config.read(12, 4)),
}  # fmt: skip


@pytest.mark.parametrize("rule", BROKEN)
def test_a_driver_that_breaks_a_rule_is_told_which(guest: Guest, rule: str) -> None:
    assert guest.lint is not None
    section, break_it = BROKEN[rule]
    break_it(guest.plug(Panel(), start=False, disable_legacy=True))
    found = guest.lint.take()
    assert {violation.who for violation in found} == {"driver"}
    assert section in {violation.section for violation in found}


def test_the_isr_is_not_for_drivers_with_msix(guest: Guest) -> None:
    assert guest.lint is not None
    driver = guest.plug(Panel())
    driver.registers.read_isr()
    assert [violation.section for violation in guest.lint.take()] == ["4.1.4.5.2"]


def test_a_notify_of_a_queue_that_is_not_enabled(guest: Guest) -> None:
    assert guest.lint is not None
    driver = guest.plug(Panel(), ioeventfd=False)
    window, offset = driver.notifiers[0]
    window.write(offset + 4, 2, 1)
    assert [violation.section for violation in guest.lint.take()] == ["2.9"]


def test_a_driver_that_starts_over_is_clean(guest: Guest) -> None:
    assert guest.lint is not None
    driver = guest.plug(Panel(), msix=False)
    driver.start()
    assert driver.config.serial == 0
    assert driver.config.bytes(12, 6) == bytes(6)
    driver.config.level = 3
    driver.panelq.add(b"x")
    driver.panelq.kick()
    assert guest.lint.take() == []


def test_a_violation_is_counted_and_logged_once(guest: Guest, caplog: pytest.LogCaptureFixture) -> None:
    assert guest.lint is not None
    driver = guest.plug(Panel())
    for _ in range(3):
        driver.common.num_queues = 1
    line = "panel0: driver: wrote to num_queues (virtio 1.3, 4.1.4.3.2)"
    assert caplog.messages.count(line) == 1
    assert list(guest.lint.report.counts.values()) == [3]
    assert [str(violation) for violation in guest.lint.take()] == [line]


def test_a_hostile_driver_does_not_fill_the_memory(guest: Guest) -> None:
    assert guest.lint is not None
    driver = guest.plug(Panel())
    for value in range(2000):
        driver.common.queue_select = value
        driver.common.queue_size = 8
    assert len(guest.lint.violations) == 1000
    guest.lint.take()
