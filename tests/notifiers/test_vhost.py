"""Host notifiers: kernel vhost borrows them and gives them back."""

import errno
import os

import pytest
from notified import Echo, Vhost, echo, modes, notifiers_of, queues_of

from pyvirtio.testing import Guest


def test_a7_vhost_serves_while_it_has_the_notifiers(guest: Guest) -> None:
    """Also with ioeventfd off, and twice in a row."""
    device = Echo()
    driver = guest.plug(device)
    own_mode = modes(driver)
    for _ in range(2):
        assert echo(driver.echoq) == b"hello"
        vhost = Vhost(driver)
        vhost.take()
        there = guest.accel.ioeventfds
        assert len(there) == 1
        device.threads.clear()
        for _ in range(20):
            assert echo(driver.echoq) == b"vhost"
        assert device.threads == set()
        vhost.give_back()
        assert vhost.served == 20
        assert echo(driver.echoq) == b"hello"
        assert modes(driver) == own_mode


def test_a7_a_kick_during_the_give_back_is_served(guest: Guest) -> None:
    driver = guest.plug(Echo())
    for _ in range(20):
        vhost = Vhost(driver)
        vhost.take()
        buffers = [driver.echoq.add(b"hello", 5)]
        driver.echoq.kick()
        vhost.give_back()
        buffers.append(driver.echoq.add(b"hello", 5))
        driver.echoq.kick()
        assert {buffer.wait() for buffer in buffers} <= {b"hello", b"vhost"}


def test_a7_a_kick_that_vhost_took_and_did_not_serve_is_served(guest: Guest) -> None:
    driver = guest.plug(Echo())
    vq = queues_of(driver)[0]
    notifiers_of(driver).grab()
    buffer = driver.echoq.add(b"hello", 5)
    driver.echoq.publish()
    driver.echoq.notify()
    wait_for_quiet(guest)
    assert os.eventfd_read(vq.kick_fd) > 0
    notifiers_of(driver).release()
    assert buffer.wait() == b"hello"


def wait_for_quiet(guest: Guest) -> None:
    """Let the I/O thread finish what it is at: it serves one queue after the other."""
    assert echo(guest.plug(Echo(), ioeventfd=True).echoq) == b"hello"


def test_a7_grabs_are_counted(guest: Guest) -> None:
    driver = guest.plug(Echo(4))
    notifiers, own_mode, own = notifiers_of(driver), modes(driver), guest.accel.ioeventfds
    notifiers.grab()
    there, assigns = guest.accel.ioeventfds, guest.accel.assigns
    notifiers.grab()
    assert (guest.accel.ioeventfds, guest.accel.assigns) == (there, assigns)
    assert len(there) == 4
    notifiers.release()
    assert modes(driver) == ["vhost"] * 4
    notifiers.release()
    assert modes(driver) == own_mode
    assert guest.accel.ioeventfds == own


def test_a7_a_grab_that_cannot_assign_lends_nothing(guest: Guest) -> None:
    driver = guest.plug(Echo(4), ioeventfd=False)
    guest.accel.assigns = 0
    guest.accel.fail_ioeventfd_at = {2: errno.ENOSPC}
    with pytest.raises(OSError, match="No space"):
        notifiers_of(driver).grab()
    assert guest.accel.ioeventfds == set()
    assert not notifiers_of(driver).grabbed
    assert [echo(q) for q in driver.echoq] == [b"hello"] * 4


def test_a7_flipping_the_property_does_not_take_them_from_vhost(guest: Guest) -> None:
    driver = guest.plug(Echo())
    vhost = Vhost(driver)
    vhost.take()
    wanted = driver.function.ioeventfd
    for value in (not wanted, wanted):
        driver.function.ioeventfd = value
        assert len(guest.accel.ioeventfds) == 1
        assert echo(driver.echoq) == b"vhost"
    vhost.give_back()
    assert echo(driver.echoq) == b"hello"


def test_a7_a_reset_while_vhost_holds_them(guest: Guest) -> None:
    driver = guest.plug(Echo())
    notifiers_of(driver).grab()
    driver.reset()
    assert guest.accel.ioeventfds == set()
    notifiers_of(driver).release()
    driver.start()
    assert echo(driver.echoq) == b"hello"
