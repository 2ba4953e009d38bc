"""A device on a vhost-user socket, in this process or in one of its own."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pyvirtio.dataplane import IoThread
from pyvirtio.device import Device
from pyvirtio.serve.server import Server, listen
from pyvirtio.serve.vhost_user import SPLIT_RINGS, Rings

START = 60.0
"""Seconds after which a child that has not opened its socket counts as hung."""


@contextmanager
def serve_in_process(device: Device, path: Path, rings: Rings = SPLIT_RINGS) -> Iterator[Server]:
    """Serve `device` at `path` with an I/O thread of its own; closes the device in the end."""
    iothread = IoThread("served", poll_max_ns=0)
    try:
        with Server(device, "served", listen(path), [iothread], rings=rings) as server:
            yield server
    finally:
        device.close()
        iothread.close()


@contextmanager
def serve_in_child(what: str, path: Path, *options: str) -> Iterator["subprocess.Popen[bytes]"]:
    """`pyvirtio serve WHAT` at `path`, from when its socket is there; `RuntimeError` if it ends before."""
    ready = path.with_suffix(".ready")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
        told.bind(str(ready))
        told.settimeout(0.1)
        command = [sys.executable, "-m", "pyvirtio", "serve", what, "--socket-path", str(path), *options]
        child = subprocess.Popen(command, env={**os.environ, "NOTIFY_SOCKET": str(ready)})
        try:
            _wait_for(child, told, what)
            yield child
        finally:
            child.terminate()
            child.wait()
            ready.unlink()


def _wait_for(child: "subprocess.Popen[bytes]", told: socket.socket, what: str) -> None:
    for _ in range(int(START / 0.1)):
        try:
            told.recv(100)
        except TimeoutError:
            if child.poll() is not None:
                raise RuntimeError(f"pyvirtio serve {what} ended with status {child.returncode}") from None
        else:
            return
    raise RuntimeError(f"pyvirtio serve {what} did not open its socket in {START:g} s")
