"""What the tests of `pyvirtio serve` share."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pyvirtio.testing.plugin import Serve

__all__ = ["Serve", "count_up", "programs"]


def count_up(length: int) -> bytes:
    return bytes(n % 256 for n in range(length))


Start = Callable[..., "subprocess.Popen[bytes]"]


@contextmanager
def programs(directory: Path) -> Iterator[Start]:
    """Runs `pyvirtio serve` with some arguments; returns when its sockets are there. All end with the block."""
    processes = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready:
        ready.bind(str(directory / "ready"))
        ready.settimeout(60)

        def run(*arguments: str, pass_fds: Sequence[int] = ()) -> "subprocess.Popen[bytes]":
            command = [sys.executable, "-m", "pyvirtio", "serve", *arguments]
            environment = {**os.environ, "NOTIFY_SOCKET": str(directory / "ready")}
            processes.append(subprocess.Popen(command, env=environment, cwd=directory, pass_fds=pass_fds))
            assert ready.recv(100) == b"READY=1"
            return processes[-1]

        try:
            yield run
        finally:
            for process in processes:
                process.kill()
                process.wait()
