"""A network for one test: a process of its own in new user and network namespaces, which needs no privilege."""

import ctypes
import functools
import os
import subprocess
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest

CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
REFUSED, FAILED = 2, 1

Test = TypeVar("Test", bound=Callable[..., None])


def own_network(test: Test) -> Test:
    """Run the test as root of a network with nothing but a loopback interface. Its fixtures are of this process."""

    @functools.wraps(test)
    def run(*arguments: Any, **fixtures: Any) -> None:
        report, write = os.pipe()
        child = os.fork()
        if not child:
            os._exit(_child(write, functools.partial(test, *arguments, **fixtures)))
        os.close(write)
        with os.fdopen(report) as file:
            said = file.read()
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status == REFUSED:
            pytest.skip(f"this host permits no network namespaces: {said}")
        assert status == 0, said

    return run  # type: ignore[return-value]


def _child(write: int, test: Callable[[], None]) -> int:
    with os.fdopen(write, "w") as report:
        try:
            _unshare()
            ip("link set lo up")
        except OSError as error:
            report.write(str(error.strerror))
            return REFUSED
        try:
            test()
        except BaseException:
            report.write(traceback.format_exc())
            return FAILED
    return 0


def _unshare() -> None:
    uid, gid = os.geteuid(), os.getegid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWUSER | CLONE_NEWNET) == 0:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
        Path("/proc/self/gid_map").write_text(f"0 {gid} 1")
    elif libc.unshare(CLONE_NEWNET):  # in a chroot there are no user namespaces, but root needs none
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def ip(command: str) -> str:
    """Run the command `ip` of iproute2, in the current network."""
    return subprocess.run(["ip", *command.split()], check=True, capture_output=True, text=True).stdout
