"""The pytest plugin, which comes with the package: the fixtures `guest`, `serve` and `vm`.

`guest` is the in-process driver; the marker of the same name says in which variants a test runs. `serve` puts a device
on a vhost-user socket, `vm` boots Linux.
"""

import gc
import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pyvirtio.device import Device
from pyvirtio.testing import trace
from pyvirtio.testing.machine import Guest
from pyvirtio.testing.queue import HANG
from pyvirtio.testing.serving import serve_in_child, serve_in_process

if TYPE_CHECKING:
    from pyvirtio.testing.linux import LinuxGuest

FAILED = pytest.StashKey[bool]()
MODES = {"ioeventfd": (False, True)}
"""The variants of every test that says nothing else."""
MARKERS = [
    "guest(**choices): run the test in each combination of these arguments of Guest; a tuple has several choices",
    "vm(**options): the arguments of the LinuxGuest that the fixture `vm` is",
]

Serve = Callable[[Device | str], Path]
"""What the fixture `serve` is."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("pyvirtio", "virtio devices")
    group.addoption("--pyvirtio-lint", action="store_true", help="fail tests that break the protocol")
    group.addoption(
        "--pyvirtio-trace-on-failure", action="store_true", help="show the rings and the last accesses of failed tests"
    )


def pytest_configure(config: pytest.Config) -> None:
    for marker in MARKERS:
        config.addinivalue_line("markers", marker)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    machine = getattr(item, "funcargs", {}).get("guest")
    asked = report.when == "call" and report.failed and item.config.getoption("--pyvirtio-trace-on-failure")
    if asked and isinstance(machine, Guest):
        report.sections.append(("pyvirtio", trace.describe(machine)))
    item.stash[FAILED] = report.failed or item.stash.get(FAILED, False)
    return report


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "guest" in metafunc.fixturenames:
        choices = {**MODES, **_arguments(metafunc.definition, "guest")}
        shown = [name for name, value in choices.items() if isinstance(value, tuple) and name != "ioeventfd"]
        variants = _variants(choices)
        metafunc.parametrize("guest", variants, indirect=True, ids=[_name(variant, shown) for variant in variants])


def _arguments(node: pytest.Item, marker: str) -> dict[str, Any]:
    """The keyword arguments of all markers of this name; the closest to the test counts."""
    return {key: value for mark in reversed(list(node.iter_markers(marker))) for key, value in mark.kwargs.items()}


def _variants(choices: dict[str, Any]) -> list[dict[str, Any]]:
    """Every combination that there is: a kick over vhost-user is always an eventfd, legacy rings are split."""
    each = [value if isinstance(value, tuple) else (value,) for value in choices.values()]
    found = [dict(zip(choices, values, strict=True)) for values in product(*each)]
    for variant in found:
        if variant.get("transport") == "vhost-user":
            variant["ioeventfd"] = True
        if variant.get("transport") == "legacy" and "packed" in variant:
            variant["packed"] = False
    return [variant for n, variant in enumerate(found) if variant not in found[:n]]


def _name(variant: dict[str, Any], shown: Iterable[str]) -> str:
    """What the variant is called in the name of the test: its mode, and what there are several choices for."""
    mode = [] if variant.get("transport") == "vhost-user" else ["ioeventfd" if variant["ioeventfd"] else "sync"]
    values = [name if variant[name] is True else str(variant[name]) for name in shown if variant[name]]
    return "-".join([*mode, *values])


@pytest.fixture
def guest(request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture) -> Iterator[Guest]:
    """A machine without devices, closed after the test; every file descriptor and thread must be gone then."""
    with nothing_left_behind(unless=lambda: request.node.stash.get(FAILED, False)):
        yield from _machine({**_asked_for(request.config), **request.param})
        request.node.funcargs.clear()  # devices that other fixtures made
        for record in caplog.get_records("call"):
            record.exc_info = None  # a traceback keeps the device alive
        caplog.get_records("call").clear()


def _asked_for(config: pytest.Config) -> dict[str, Any]:
    """What the command line asks of every machine."""
    options = {"lint": "--pyvirtio-lint", "trace": "--pyvirtio-trace-on-failure"}
    return {name: config.getoption(option) for name, option in options.items()}


def _machine(choices: dict[str, Any]) -> Iterator[Guest]:
    with Guest(**choices) as machine:
        yield machine
        for driver in machine.drivers:
            assert driver.may_break or not driver.why_broken, f"{driver.name} broke: {driver.why_broken}"
        if machine.lint:
            assert machine.lint.take() == [], "what the specification does not allow"
    vars(machine).clear()  # pytest keeps the object itself


@pytest.fixture
def serve(request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> Iterator[Serve]:
    """Serves a device on a vhost-user socket until the test is over; returns the path of the socket.

    A `Device` is served in this process, and every file descriptor and thread must be gone after the test; a string
    is what `pyvirtio serve` takes, in a process of its own.
    """
    with nothing_left_behind(unless=lambda: request.node.stash.get(FAILED, False)), ExitStack() as stack:

        def start(device: Device | str) -> Path:
            path = tmp_path / f"served{next(numbers)}.sock"
            served = serve_in_child if isinstance(device, str) else serve_in_process
            stack.enter_context(served(device, path))  # type: ignore[arg-type]
            return path

        numbers = iter(range(1 << 16))
        yield start
        for record in caplog.get_records("call"):
            record.exc_info = None  # a traceback keeps the session alive


@pytest.fixture
def vm(request: pytest.FixtureRequest) -> Iterator["LinuxGuest"]:
    """A Linux guest to plug devices into and boot; skipped where KVM cannot run Linux (`pyvirtio lab` can)."""
    from pyvirtio.accel.host import linux_capable
    from pyvirtio.testing.linux import LinuxGuest

    if unfit := linux_capable():
        pytest.skip(f"{unfit}: pyvirtio lab -- pytest {request.node.nodeid.partition('::')[0]}")
    with LinuxGuest(**_arguments(request.node, "vm")) as machine:
        yield machine


@contextmanager
def nothing_left_behind(unless: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Fail if the block leaves more file descriptors or threads than there were.

    A test that failed lives on in its traceback, which is what `unless` is for.
    """
    before = _held()
    yield
    if unless():
        return
    for generation in range(3):  # what is left may hang in a cycle, most likely a young one
        if _held() == before:
            break
        gc.collect(generation)
    deadline = time.monotonic() + HANG
    while more := {what: count for what, count in _held().items() if count > before[what]}:
        assert time.monotonic() < deadline, f"held before: {before}, and now: {more}"
        time.sleep(0.001)  # the kernel's thread outlives `Thread.join` by a moment


def _held() -> dict[str, int]:
    return {"fds": len(os.listdir("/proc/self/fd")), "threads": len(os.listdir("/proc/self/task"))}
