"""Networks that are written in Python."""

import threading

import pytest
from wire import counters, device_of, plug

from pyvirtio.backends.net import NetBackend
from pyvirtio.devices.net import Net
from pyvirtio.testing import Guest
from pyvirtio.testing.net import Nic, frame
from pyvirtio.testing.queue import HANG


class Collector(NetBackend):
    """A network in Python that keeps what the guest sends."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []

    def send(self, frame: bytes) -> None:
        self.sent.append(frame)


def test_a_network_in_python_gets_frames_and_injects_them(guest: Guest) -> None:
    network = Collector()
    nic = plug(guest, network)
    nic.send(frame(24, 99)).wait()
    assert network.sent == [frame(24, 99)]
    nic.post(count=2)
    assert network.inject([frame(25), frame(26)]) == 2
    assert [nic.receive().frame for _ in range(2)] == [frame(25), frame(26)]


def test_injected_frames_wait_for_buffers_up_to_a_limit(guest: Guest) -> None:
    network = Collector()
    nic = plug(guest, network)
    frames = [frame(number) for number in range(1100)]
    assert network.inject(frames) == 1024
    assert counters(nic) == {"rx_dropped_overflow": 76}
    for number in range(1024):
        nic.post()
        assert nic.receive().frame == frame(number)
    nic.post()
    assert network.inject([frame(2000)]) == 1


def test_injected_frames_are_dropped_while_no_driver_is_there(guest: Guest) -> None:
    network = Collector()
    driver = guest.plug(Net(network))
    assert network.inject([frame(1)] * 3) == 3
    driver.reset()
    assert network.inject([frame(1)]) == 0
    dropped = device_of(driver).plane.counters
    assert (dropped["rx_dropped_reset"], dropped["rx_dropped_overflow"]) == (3, 1)


def test_a_host_error_of_a_python_network_drops_the_frame(guest: Guest) -> None:
    class Failing(NetBackend):
        """Cannot reach anybody."""

        def send(self, frame: bytes) -> None:
            raise OSError("no route")

    nic = plug(guest, Failing())
    nic.send(frame(27)).wait()
    assert counters(nic) == {"tx_dropped_error": 1}


def test_a_defect_of_a_python_network_breaks_the_device_and_nothing_else(
    guest: Guest, caplog: pytest.LogCaptureFixture
) -> None:
    class Defective(NetBackend):
        """Does not work."""

        def send(self, frame: bytes) -> None:
            raise RuntimeError("not implemented")

    driver = guest.plug(Net(Defective()))
    Nic(driver, driver.features).send(frame(28))
    assert "the backend raised" in driver.wait_needs_reset()
    assert "not implemented" in (driver.why_broken or "")
    assert "exception in a network backend" in caplog.text
    driver.start()
    network = guest.plug(Net(Collector()))
    Nic(network, network.features).send(frame(29)).wait()


def test_frames_are_injected_from_any_thread(guest: Guest) -> None:
    network = Collector()
    nic = plug(guest, network)
    nic.post(count=200)
    threads = [threading.Thread(target=inject, args=(network, start)) for start in range(0, 200, 50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG)
    received = [nic.receive().frame for _ in range(200)]
    assert sorted(received) == sorted(frame(number) for number in range(200))


def inject(network: NetBackend, start: int) -> None:
    for number in range(start, start + 50):
        assert network.inject([frame(number)]) == 1
