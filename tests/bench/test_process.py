"""What a process has cost."""

import os
import subprocess

import pytest

from pyvirtio.bench.process import Usage
from pyvirtio.testing.vhost_user import MIB


def test_what_is_allocated_is_resident_and_what_runs_takes_time() -> None:
    before = Usage.of(os.getpid())
    touched = bytearray(os.urandom(64 * MIB))
    after = Usage.of(os.getpid())
    assert len(touched) == 64 * MIB
    assert after.rss - before.rss > 48 * MIB
    assert after.cpu > before.cpu


def test_a_process_that_has_ended_has_no_memory_and_one_that_is_gone_is_an_error() -> None:
    process = subprocess.Popen(["true"])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert Usage.of(process.pid).rss == 0
    process.wait()
    with pytest.raises(OSError):  # noqa: PT011
        Usage.of(process.pid)
