"""A served device for each test."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from serving import Serve

from pyvirtio.dataplane import IoThread
from pyvirtio.device import Device
from pyvirtio.serve.server import Server, listen
from pyvirtio.testing.plugin import FAILED, nothing_left_behind


@pytest.fixture
def serve(request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> Iterator[Serve]:
    """Serves a device and returns its socket; every file descriptor and thread must be gone after the test."""
    with nothing_left_behind(unless=lambda: request.node.stash.get(FAILED, False)), ExitStack() as stack:

        def start(device: Device) -> Path:
            path = tmp_path / f"{type(device).__name__}.sock"
            iothread = IoThread("test", poll_max_ns=0)
            stack.callback(iothread.close)
            stack.callback(device.close)
            stack.enter_context(Server(device, "served", listen(path), iothread))
            return path

        yield start
        for record in caplog.get_records("call"):
            record.exc_info = None  # a traceback keeps the session alive
