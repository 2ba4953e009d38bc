"""What all tests share."""

import gc
import resource


def pytest_sessionstart() -> None:
    """Room for the eventfds of 1024 queues; a cheap `gc.collect` for the tests that count what is left."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    gc.freeze()
