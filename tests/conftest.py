"""What all tests share."""

import gc
import resource
from collections.abc import Generator
from itertools import count

import pytest

TESTS = count(1)


def pytest_sessionstart() -> None:
    """Room for the eventfds of 1024 queues."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def pytest_collection_finish() -> None:
    freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Generator[None, object, object]:
    done = yield
    if next(TESTS) % 100 == 0:
        freeze()
    return done


def freeze() -> None:
    """A cheap `gc.collect` for the tests that count what is left: it need not look at what pytest keeps of others."""
    gc.collect()
    gc.freeze()
