"""Host notifiers: kernel vhost borrows them and gives them back."""

import errno
import os

import pytest
from notified import Echo, Vhost, echo, modes, nobody, notifiers_of, queues_of

from pyvirtio import VirtQueue
from pyvirtio.notifiers import Undo
from pyvirtio.testing import Guest

RINGS = pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])


@RINGS
def test_a7_vhost_serves_while_it_has_the_notifiers(guest: Guest, packed: bool) -> None:
    """Also with ioeventfd off, and twice in a row."""
    device = Echo()
    driver = guest.plug(device, packed=packed)
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


@RINGS
def test_a7_a_kick_during_the_give_back_is_served(guest: Guest, packed: bool) -> None:
    driver = guest.plug(Echo(), packed=packed)
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
    notifiers_of(driver).grab([0], nobody)
    buffer = driver.echoq.add(b"hello", 5)
    driver.echoq.publish()
    driver.echoq.notify()
    wait_for_quiet(guest)
    assert os.eventfd_read(vq.kick_fd) > 0
    vq.signal()  # vhost does not read it
    notifiers_of(driver).release([0])
    assert buffer.wait() == b"hello"


def wait_for_quiet(guest: Guest) -> None:
    """Let the I/O thread finish what it is at: it serves one queue after the other."""
    assert echo(guest.plug(Echo(), ioeventfd=True).echoq) == b"hello"


def test_a7_pairs_of_queues_are_lent_one_by_one(guest: Guest) -> None:
    """The fifth queue, as a control queue, is never lent."""
    driver = guest.plug(Echo(5))
    own_mode, own = modes(driver), guest.accel.ioeventfds
    vhosts = [Vhost(driver, index) for index in range(4)]
    served = [b"hello"] * 5
    for first in (0, 2):
        for vhost in vhosts[first : first + 2]:
            vhost.take()
        served[first : first + 2] = [b"vhost"] * 2
        assert modes(driver) == ["vhost"] * (first + 2) + own_mode[first + 2 :]
        assert [echo(q) for q in driver.echoq] == served
    assert len(guest.accel.ioeventfds) == (5 if guest.ioeventfd else 4)
    for index in (2, 3, 0, 1):
        vhosts[index].give_back()
        served[index] = b"hello"
        assert [echo(q) for q in driver.echoq] == served
    assert modes(driver) == own_mode
    assert guest.accel.ioeventfds == own


def test_a7_a_grab_that_cannot_assign_lends_nothing(guest: Guest) -> None:
    driver = guest.plug(Echo(4), ioeventfd=False)
    guest.accel.assigns = 0
    guest.accel.fail_ioeventfd_at = {2: errno.ENOSPC}
    with pytest.raises(OSError, match="No space"):
        notifiers_of(driver).grab(range(4), nobody)
    assert guest.accel.ioeventfds == set()
    assert modes(driver) == ["sync"] * 4
    assert [echo(q) for q in driver.echoq] == [b"hello"] * 4


class Refusing:
    """Vhost that refuses one queue, and counts what it serves."""

    def __init__(self, at: int) -> None:
        self.at, self.serving = at, 0

    def serve(self, vq: VirtQueue) -> Undo:
        if vq.index == self.at:
            raise OSError(errno.EFAULT, os.strerror(errno.EFAULT))
        self.serving += 1
        return self.stop

    def stop(self) -> None:
        self.serving -= 1


@pytest.mark.parametrize("k", range(4))
def test_a7_vhost_refuses_queue_k(guest: Guest, k: int) -> None:
    vhost = Refusing(k)
    driver = guest.plug(Echo(4))
    own_mode = modes(driver)
    with pytest.raises(OSError, match="Bad address"):
        notifiers_of(driver).grab(range(4), vhost.serve)
    assert (vhost.serving, modes(driver)) == (0, own_mode)
    assert [echo(q) for q in driver.echoq] == [b"hello"] * 4


def test_a7_vhost_refuses_at_driver_ok(guest: Guest, caplog: pytest.LogCaptureFixture) -> None:
    """Ourselves then, with one warning; the next DRIVER_OK tries again."""
    vhost = Refusing(2)
    driver = guest.plug(Echo(4), start=False)
    notifiers_of(driver).grab(range(4), vhost.serve)
    driver.start()
    [warning] = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warning == "echo0: echoq2: no vhost (EFAULT: Bad address); the I/O thread serves"
    own = "ioeventfd" if guest.ioeventfd else "sync"
    assert modes(driver) == [f"{own} (EFAULT: Bad address)"] * 4
    assert [echo(q) for q in driver.echoq] == [b"hello"] * 4
    vhost.at = -1
    driver.start()
    assert (vhost.serving, modes(driver)) == (4, ["vhost"] * 4)
    driver.reset()
    assert vhost.serving == 0


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


@pytest.mark.parametrize("again", [False, True], ids=["given back", "kept"])
def test_a7_a_reset_while_vhost_holds_them(guest: Guest, again: bool) -> None:
    """Vhost stops at the reset, and has the queue of the next driver too unless it was given back."""
    driver = guest.plug(Echo())
    vhost = Vhost(driver)
    vhost.take()
    driver.reset()
    assert guest.accel.ioeventfds == set()
    assert not vhost.thread.is_alive()
    if not again:
        vhost.give_back()
    driver.start()
    assert echo(driver.echoq) == (b"vhost" if again else b"hello")
    driver.reset()


@RINGS
def test_a7_a_queue_that_is_reset_is_taken_from_vhost_and_lent_again(guest: Guest, packed: bool) -> None:
    driver = guest.plug(Echo(), packed=packed)
    vhost = Vhost(driver)
    vhost.take()
    for size in (16, 8, 4):
        assert [echo(driver.echoq) for _ in range(20)] == [b"vhost"] * 20
        driver.reset_queue(0)
        assert guest.accel.ioeventfds == set()
        driver.queue_size = size
        driver.renew_queue(0)
        assert modes(driver) == ["vhost"]
    vhost.give_back()
    assert echo(driver.echoq) == b"hello"


def test_a7_a_pause_while_vhost_holds_them(guest: Guest) -> None:
    driver = guest.plug(Echo())
    vhost = Vhost(driver)
    vhost.take()
    for _ in range(3):
        assert echo(driver.echoq) == b"vhost"
        notifiers_of(driver).stop()
        assert not vhost.thread.is_alive()
        notifiers_of(driver).start()
    assert echo(driver.echoq) == b"vhost"
    vhost.give_back()
    assert echo(driver.echoq) == b"hello"


def test_a7_vhost_stops_for_a_pause_and_goes_on(guest: Guest) -> None:
    driver = guest.plug(Echo(2))
    vhost = Refusing(-1)
    notifiers_of(driver).grab(range(2), vhost.serve)
    for _ in range(3):
        notifiers_of(driver).hold()
        assert (vhost.serving, modes(driver)) == (0, ["paused"] * 2)
        assert guest.accel.ioeventfds == set()
        notifiers_of(driver).unhold()
        assert (vhost.serving, modes(driver)) == (2, ["vhost"] * 2)
