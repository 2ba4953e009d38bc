"""What all tests share."""

import gc
import resource


def pytest_sessionstart() -> None:
    """Room for the eventfds of 1024 queues."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def pytest_collection_finish() -> None:
    """A cheap `gc.collect` for the tests that count what is left."""
    gc.collect()
    gc.freeze()
