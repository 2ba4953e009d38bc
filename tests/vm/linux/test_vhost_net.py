"""The kernel's own vhost-net under the driver in this process: what a Linux guest does not get to see.

Here because it needs /dev/vhost-net, which the lab has.
"""

import socket
import time
from collections.abc import Callable

import pytest
from own_network import own_network
from tapped import tapped

from pyvirtio.spec import NetFeature
from pyvirtio.testing import VirtioDriver
from pyvirtio.testing.driver import Interface
from pyvirtio.testing.net import Nic, frame
from pyvirtio.testing.queue import HANG
from pyvirtio.vhost.kernel import VhostNet


def driver_of(nic: Nic) -> VirtioDriver:
    assert isinstance(nic.driver, VirtioDriver)
    return nic.driver


def vhost_of(nic: Nic) -> VhostNet:
    vhost = driver_of(nic).function.vhost
    assert vhost is not None
    return vhost


def chains(nic: Nic) -> int:
    """What was served here."""
    return sum(vq.counters["chains"] for vq in driver_of(nic).function.dataplane.queues)


def exchange(nic: Nic, host: socket.socket, numbers: range) -> None:
    """One frame after the other each way."""
    for number in numbers:
        nic.send(frame(number, 60 + number)).wait()
        assert host.recv(2000) == frame(number, 60 + number)
        nic.post()
        host.send(frame(number, 60 + number))
        assert nic.receive().frame == frame(number, 60 + number)


@pytest.mark.parametrize(("transport", "msix", "merge"), [("modern", True, True), ("legacy", False, False)])
@own_network
def test_the_kernel_moves_the_frames(transport: Interface, msix: bool, merge: bool) -> None:
    """The header has 10 bytes for a legacy driver without mergeable buffers, else 12."""
    features = ~0 if merge else ~int(NetFeature.MRG_RXBUF)
    with tapped(transport=transport, msix=msix, features=features, vhostforce=True) as (nic, host):
        exchange(nic, host, range(10))
        assert chains(nic) == 0


@own_network
def test_the_kernel_polls_before_it_sleeps() -> None:
    with tapped(vhostforce=True, poll_us=50) as (nic, host):
        exchange(nic, host, range(10))
        assert chains(nic) == 0


@pytest.mark.parametrize("ioeventfd", [False, True])
@own_network
def test_the_queues_are_given_and_taken_back(ioeventfd: bool) -> None:
    """Buffers that wait in the ring meanwhile are used once, by whoever comes."""
    with tapped(ioeventfd=ioeventfd, queues=2, vhostforce=True) as (nic, host):
        for turn in range(10):
            vhost_of(nic).enabled = turn % 2 == 1
            before = chains(nic)
            exchange(nic, host, range(2 * turn, 2 * turn + 2))
            assert (chains(nic) == before) is vhost_of(nic).enabled
            nic.post()
            vhost_of(nic).enabled = not vhost_of(nic).enabled
            host.send(frame(turn))
            assert nic.receive().frame == frame(turn)


@own_network
def test_a_masked_vector_is_pending() -> None:
    with tapped(vhostforce=True) as (nic, host):
        driver = driver_of(nic)
        table, vector = driver.msix, driver.function.interrupts.queue_vectors[0]
        assert table is not None
        for number in range(10):
            nic.post()
            table.mask(vector, True)
            host.send(frame(number))
            wait_for(lambda: table.pending(vector))
            table.mask(vector, False)
            assert nic.receive().frame == frame(number)
            assert not table.pending(vector)


@own_network
def test_across_resets() -> None:
    with tapped(vhostforce=True) as (nic, host):
        driver = driver_of(nic)
        for turn in range(5):
            nic.post(count=8)
            driver.reset()
            driver.start()
            exchange(again := Nic(driver, driver.features), host, range(turn, turn + 2))
            assert chains(again) == 0
            nic = again


def wait_for(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + HANG
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.001)
