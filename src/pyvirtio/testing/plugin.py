"""The pytest plugin: the fixture `guest`, which runs each test synchronously and with ioeventfd."""

import gc
import os
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager

import pytest

from pyvirtio.testing.driver import Guest
from pyvirtio.testing.queue import HANG

FAILED = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    item.stash[FAILED] = report.failed or item.stash.get(FAILED, False)
    return report


@pytest.fixture(params=[False, True], ids=["sync", "ioeventfd"])
def guest(request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture) -> Iterator[Guest]:
    """A machine without devices, closed after the test; every file descriptor and thread must be gone then."""
    with nothing_left_behind(unless=lambda: request.node.stash.get(FAILED, False)):
        yield from _machine(request.param)
        request.node.funcargs.clear()  # devices that other fixtures made
        caplog.get_records("call").clear()  # a traceback in a record keeps the device alive


def _machine(ioeventfd: bool) -> Iterator[Guest]:
    with Guest(ioeventfd=ioeventfd) as machine:
        yield machine
        for driver in machine.drivers:
            assert driver.may_break or not driver.why_broken, f"{driver.name} broke: {driver.why_broken}"
    vars(machine).clear()  # pytest keeps the object itself


@contextmanager
def nothing_left_behind(unless: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Fail if the block leaves more file descriptors or threads than there were.

    A test that failed lives on in its traceback, which is what `unless` is for.
    """
    before = _held()
    yield
    if unless():
        return
    if _held() != before:
        gc.collect()  # what is left may hang in a cycle
    deadline = time.monotonic() + HANG
    while more := {what: count for what, count in _held().items() if count > before[what]}:
        assert time.monotonic() < deadline, f"held before: {before}, and now: {more}"
        time.sleep(0.001)  # the kernel's thread outlives `Thread.join` by a moment


def _held() -> dict[str, int]:
    return {"fds": len(os.listdir("/proc/self/fd")), "threads": len(os.listdir("/proc/self/task"))}
