"""Host notifiers: an assign that fails leaves the device served synchronously, with the reason."""

import errno
import os
from collections.abc import Callable

import pytest
from notified import Echo, Transitional, echo, modes, notifiers_of, queues_of

from pyvirtio import VirtQueue
from pyvirtio.spec import Status
from pyvirtio.testing import Guest

ERRNOS = [errno.ENOSPC, errno.EEXIST, errno.EMFILE]


@pytest.mark.parametrize("number", ERRNOS, ids=errno.errorcode.__getitem__)
@pytest.mark.parametrize("k", range(8))
def test_a4_assign_k_fails(guest: Guest, caplog: pytest.LogCaptureFixture, k: int, number: int) -> None:
    """Four queues with a port and an address each: any of the eight may be the one that fails."""
    device = Transitional(4)
    other = guest.plug(Echo(), ioeventfd=True)
    there, exits = guest.accel.ioeventfds, guest.accel.exits
    guest.accel.assigns = 0
    guest.accel.fail_ioeventfd_at = {k: number}
    driver = guest.plug(device, ioeventfd=True)
    name = errno.errorcode[number]
    assert guest.accel.ioeventfds == there, "exactly the steps that were taken are undone"
    assert modes(driver)[k // 2] == f"sync ({name}: {os.strerror(number)})"
    assert all(mode.startswith("sync (") for mode in modes(driver))
    assert driver.function.ioeventfd, "the property keeps what the user asked for"
    [warning] = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "transitional1" in warning
    assert f"echoq{k // 2}" in warning
    assert name in warning
    for index, q in enumerate(driver.echoq):
        assert echo(q) == b"hello", f"queue {index} is served synchronously"
        assert queues_of(driver)[index].counters["notifies"] == 1
    assert guest.accel.exits > exits
    assert echo(other.echoq) == b"hello"
    guest.accel.fail_ioeventfd_at = {}
    driver.start()
    assert modes(driver) == ["ioeventfd"] * 4, "the next DRIVER_OK tries again"
    assert len(guest.accel.ioeventfds - there) == 8
    assert [echo(q) for q in driver.echoq] == [b"hello"] * 4


@pytest.mark.parametrize("k", range(4))
def test_a4_the_io_thread_refuses_queue_k(guest: Guest, k: int) -> None:
    refusing = RefusingPoll(guest, at=k)
    driver = guest.plug(Echo(4), ioeventfd=True, start=False)
    notifiers_of(driver)._poll = refusing.poll
    driver.start()
    assert guest.accel.ioeventfds == set()
    assert refusing.polled == 0
    assert modes(driver)[k] == f"sync (ENOSPC: {os.strerror(errno.ENOSPC)})"
    assert [echo(q) for q in driver.echoq] == [b"hello"] * 4
    refusing.at = -1
    driver.start()
    assert modes(driver) == ["ioeventfd"] * 4
    assert [echo(q) for q in driver.echoq] == [b"hello"] * 4


class RefusingPoll:
    """The I/O thread's `poll`, which refuses one queue as epoll does at its limit of watches."""

    def __init__(self, guest: Guest, at: int) -> None:
        self.iothread, self.at, self.polled = guest.iothread, at, 0

    def poll(self, vq: VirtQueue) -> Callable[[], object]:
        if vq.index == self.at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        undo = self.iothread.poll(vq)
        self.polled += 1

        def undone() -> None:
            self.polled -= 1
            undo()

        return undone


def test_a4_buffers_made_available_before_the_failure_are_served(guest: Guest) -> None:
    guest.accel.fail_ioeventfd_at = {1: errno.ENOSPC}
    driver = guest.plug(Echo(2), ioeventfd=True, start=False)
    driver.negotiate()
    driver.set_up()
    buffers = [q.add(b"early", 5) for q in driver.echoq]
    for q in driver.echoq:
        q.publish()
    driver.status |= Status.DRIVER_OK
    assert [buffer.wait() for buffer in buffers] == [b"early"] * 2
