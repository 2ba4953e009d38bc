"""File descriptors that an I/O thread waits for, with callbacks in Python."""

import os
import threading
import weakref
from collections.abc import Iterator

import pytest

from pyvirtio._core import IoThread, Watch
from pyvirtio.testing.plugin import nothing_left_behind

HANG = 10.0


@pytest.fixture
def loop() -> Iterator[IoThread]:
    """A loop on its thread."""
    loop = IoThread(poll_max_ns=0)
    thread = threading.Thread(target=loop.run)
    thread.start()
    yield loop
    loop.close()
    thread.join(HANG)
    assert not thread.is_alive()


class Events:
    """An eventfd with a watch whose callback reads it."""

    watch: Watch

    def __init__(self, loop: IoThread) -> None:
        self.fd = os.eventfd(0, os.EFD_NONBLOCK)
        self.called = threading.Semaphore(0)
        self.threads: set[int] = set()
        self.watch = loop.watch(self.fd, self.ready)

    def ready(self) -> None:
        os.eventfd_read(self.fd)
        self.threads.add(threading.get_ident())
        self.called.release()

    def signal(self) -> None:
        os.eventfd_write(self.fd, 1)

    def wait(self) -> bool:
        return self.called.acquire(timeout=HANG)

    def close(self) -> None:
        self.watch.close()
        os.close(self.fd)


@pytest.fixture
def events(loop: IoThread) -> Iterator[Events]:
    events = Events(loop)
    yield events
    events.close()


def settle(loop: IoThread) -> None:
    """Until the loop has handled everything that happened before."""
    for _ in range(2):
        other = Events(loop)
        other.signal()
        assert other.wait()
        other.close()


def test_the_callback_runs_on_the_io_thread_whenever_the_fd_is_readable(events: Events) -> None:
    for _ in range(3):
        events.signal()
        assert events.wait()
    assert events.threads
    assert threading.get_ident() not in events.threads


def test_a_disarmed_watch_keeps_the_event_for_later(loop: IoThread, events: Events) -> None:
    events.watch.disarm()
    events.signal()
    settle(loop)
    assert not events.threads
    events.watch.arm()
    assert events.wait()


def test_a_closed_watch_holds_nothing(loop: IoThread) -> None:
    with nothing_left_behind():
        events = Events(loop)
        events.close()
        events.watch.close()
        events.watch.disarm()
        events.watch.arm()  # nothing is there any more
        gone = weakref.ref(events)
        del events
        settle(loop)
        assert gone() is None


def test_a_watch_may_be_closed_by_its_own_callback(loop: IoThread) -> None:
    fd = os.eventfd(1)
    called = threading.Event()

    def once() -> None:
        watch.close()
        called.set()

    watch = loop.watch(fd, once)
    assert called.wait(HANG)
    settle(loop)
    os.close(fd)


def test_an_exception_is_logged_and_disarms(loop: IoThread, caplog: pytest.LogCaptureFixture) -> None:
    fd = os.eventfd(1)
    calls = []

    def fail() -> None:
        calls.append(1)
        raise RuntimeError("no such thing")

    watch = loop.watch(fd, fail)
    settle(loop)
    assert len(calls) == 1
    assert [record.message for record in caplog.records] == ["exception in the callback of a watch"]
    caplog.clear()
    watch.close()
    os.close(fd)


def test_what_cannot_be_waited_for_is_an_os_error(loop: IoThread) -> None:
    with pytest.raises(OSError, match="Bad file descriptor"):
        loop.watch(-1, print)
    with open(__file__) as file, pytest.raises(PermissionError):
        loop.watch(file.fileno(), print)
