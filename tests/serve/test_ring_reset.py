"""RING_RESET over vhost-user: the front-end stops the ring of a queue that its driver resets (virtio 1.3, 2.6.1)."""

import pytest
from notified import Echo, echo

from pyvirtio.devices.rng import Rng
from pyvirtio.serve.wire import Request
from pyvirtio.spec import Feature
from pyvirtio.testing import Guest
from pyvirtio.testing.served import VhostUserDriver

RINGS = pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
NOTED = pytest.mark.parametrize("noted", [False, True], ids=["", "noted"])


def running(guest: Guest, *, packed: bool, noted: bool = False) -> VhostUserDriver:
    driver = guest.plug(Echo(2), transport="vhost-user", packed=packed, start=False)
    assert isinstance(driver, VhostUserDriver)
    driver.negotiate()
    if noted:
        driver.get_inflight(2, 16)
    driver.set_mem_table()
    for index, queue in enumerate(driver.device.queues):
        driver.set_up_queue(index, queue.name, queue.size)
    assert [echo(q) for q in driver.echoq] == [b"hello"] * 2
    return driver


@RINGS
@NOTED
def test_it_comes_back_with_another_size_while_the_other_goes_on(guest: Guest, packed: bool, noted: bool) -> None:
    driver = running(guest, packed=packed, noted=noted)
    for size in (4, 16, 8):
        driver.queue_size = size
        driver.reset_queue(0)
        driver.queues[0].notify()
        assert echo(driver.echoq[1]) == b"hello"
        renewed = driver.renew_queue(0)
        assert renewed.ring.size == size
        assert [echo(renewed) for _ in range(3 * size)] == [b"hello"] * 3 * size
    assert echo(driver.echoq[1]) == b"hello"


def test_it_is_offered_only_if_asked_for(guest: Guest) -> None:
    for asked in (False, True):
        driver = guest.plug(Rng(), transport="vhost-user", ring_reset=asked)
        assert isinstance(driver, VhostUserDriver)
        assert bool(driver.get(Request.GET_FEATURES) & Feature.RING_RESET) is asked
