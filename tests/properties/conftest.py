"""A random run says how to repeat it, before anything can go wrong."""

import pytest
from exploring import FACTOR, SEED


def pytest_collection_finish(session: pytest.Session) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if FACTOR and reporter is not None:
        reporter.write_line(f"random run: PYVIRTIO_RANDOM={FACTOR} PYVIRTIO_SEED={SEED} repeats it")
