"""`@poll` and `@every`: what a device waits for besides its queues."""

import os
import threading
from ctypes import LittleEndianStructure, c_uint32

import pytest

from pyvirtio import Device, VirtQueue, every, poll, queue
from pyvirtio.testing import Guest
from pyvirtio.testing.queue import HANG


class ThermometerConfig(LittleEndianStructure):
    """The temperature."""

    _fields_ = (("millikelvin", c_uint32),)


class Thermometer(Device, id=63, config=ThermometerConfig):
    """Warms up with every tick; `set` is an eventfd that sets the temperature."""

    def __init__(self, interval: float = 0.001) -> None:
        self.interval = interval
        self.set = os.eventfd(0, os.EFD_NONBLOCK)
        self.threads: set[str] = set()
        self.called = threading.Semaphore(0)
        self.defect = False

    @queue(size=8)
    def idleq(self, vq: VirtQueue) -> None: ...

    @every("interval")
    def tick(self) -> None:
        self.threads.add(threading.current_thread().name)
        with self.update_config() as config:
            config.millikelvin += 1
        self.called.release()
        if self.defect:
            raise ZeroDivisionError("sensor")

    @poll("set")
    def measured(self) -> None:
        self.threads.add(threading.current_thread().name)
        with self.update_config() as config:
            config.millikelvin = os.eventfd_read(self.set)
        self.called.release()

    def close(self) -> None:
        os.close(self.set)

    def wait(self, times: int = 1) -> None:
        for _ in range(times):
            assert self.called.acquire(timeout=HANG)

    def settled(self) -> int:
        """How often a method was called since the last time it was asked, nothing being able to call it."""
        count = 0
        while self.called.acquire(blocking=False):
            count += 1
        return count


def test_a_method_runs_every_so_often_on_the_io_thread_while_the_driver_is_up(guest: Guest) -> None:
    device = Thermometer()
    driver = guest.plug(device, start=False)
    driver.negotiate()
    assert device.settled() == 0
    driver.start()
    device.wait(3)
    assert device.threads == {"pyvirtio test"}
    assert driver.config.millikelvin >= 3


def test_a_readable_fd_is_a_call_of_its_method(guest: Guest) -> None:
    device = Thermometer(interval=3600)
    driver = guest.plug(device)
    os.eventfd_write(device.set, 273_150)
    device.wait()
    assert driver.config.millikelvin == 273_150
    os.eventfd_write(device.set, 300_000)
    device.wait()
    assert driver.config.millikelvin == 300_000
    assert device.threads == {"pyvirtio test"}


def test_no_method_runs_after_the_reset_and_they_come_back_with_the_driver(guest: Guest) -> None:
    device = Thermometer()
    driver = guest.plug(device)
    device.wait()
    driver.reset()
    device.settled()
    os.eventfd_write(device.set, 1)
    before = device.config.millikelvin
    driver.negotiate()
    assert device.settled() == 0
    assert device.config.millikelvin == before
    driver.start()
    device.wait(3)


def test_a_method_may_reset_its_own_device(guest: Guest) -> None:
    class Suicidal(Thermometer):
        """Resets itself from within."""

        def measured(self) -> None:
            os.eventfd_read(self.set)
            driver.function.driver.reset()
            self.called.release()

    device = Suicidal(interval=3600)
    driver = guest.plug(device)
    os.eventfd_write(device.set, 1)
    device.wait()
    assert driver.status == 0


def test_a_reset_waits_for_the_method_that_runs(guest: Guest) -> None:
    entered, leave, order = threading.Event(), threading.Event(), []

    class Slow(Thermometer):
        """Takes as long as the test wants."""

        def measured(self) -> None:
            os.eventfd_read(self.set)
            entered.set()
            assert leave.wait(HANG)
            order.append("method")

        def reset(self) -> None:
            order.append("reset")

    device = Slow(interval=3600)
    driver = guest.plug(device)
    os.eventfd_write(device.set, 1)
    assert entered.wait(HANG)
    resetting = threading.Thread(target=driver.reset)
    resetting.start()
    leave.set()
    resetting.join(HANG)
    assert order == ["method", "reset"]


def test_a_defect_in_a_method_breaks_the_device_until_its_reset(guest: Guest, caplog: pytest.LogCaptureFixture) -> None:
    device = Thermometer()
    device.defect = True
    driver = guest.plug(device)
    assert driver.wait_needs_reset() == "Thermometer.tick raised ZeroDivisionError: sensor"
    assert "thermometer0: exception in Thermometer.tick" in caplog.text
    device.settled()
    os.eventfd_write(device.set, 5)
    device.wait()  # the other goes on
    assert device.config.millikelvin == 5
    device.defect = False
    driver.start()
    device.wait(2)


class Wrong(Device, id=63):
    """Names what is not there."""

    sensor: object = None
    pace: object = None

    @queue(size=8)
    def idleq(self, vq: VirtQueue) -> None: ...


class WrongFd(Wrong):
    """No file."""

    @poll("sensor")
    def measured(self) -> None: ...


class WrongTime(Wrong):
    """No time."""

    @every("pace")
    def tick(self) -> None: ...


@pytest.mark.parametrize(
    ("device", "message"),
    [
        (WrongFd, "WrongFd.measured: @poll('sensor') is None; it has to be a file descriptor or what has a fileno()"),
        (WrongTime, "WrongTime.tick: @every('pace') is None; it has to be a number of seconds above 0"),
    ],
)
def test_what_cannot_be_waited_for_breaks_the_device(guest: Guest, device: type[Wrong], message: str) -> None:
    driver = guest.plug(device(), start=False)
    driver.start()
    driver.may_break = True
    assert driver.why_broken == message
