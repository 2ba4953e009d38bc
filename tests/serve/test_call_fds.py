"""The call fds of a front-end that wants to be waited for: nobody does, once it is gone or the server is to end."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import Serve, count_up

from pyvirtio.devices.rng import Rng
from pyvirtio.serve import wire
from pyvirtio.serve.wire import Request
from pyvirtio.testing.vhost_user import MIB, FrontEnd

FULL = (1 << 64) - 2
"""The largest count of an eventfd: whoever adds to it has to wait."""


@pytest.fixture
def path(serve: Serve) -> Path:
    return serve(Rng(source=count_up))


@pytest.fixture(params=["eventfd", "pipe", "socket"])
def full(request: pytest.FixtureRequest) -> Iterator[list[int]]:
    """A call fd that takes nothing more, and what it leads to."""
    if request.param == "eventfd":
        fds = [os.eventfd(FULL & 0xFFFFFFFF, os.EFD_NONBLOCK)]
        os.eventfd_write(fds[0], FULL - (FULL & 0xFFFFFFFF))
    else:
        fds = list(reversed(os.pipe())) if request.param == "pipe" else [end.detach() for end in socket.socketpair()]
    yield fds
    for fd in fds:
        os.close(fd)


def fill(fd: int) -> None:
    """The front-end shares the fd, and may make it blocking again."""
    os.set_blocking(fd, False)
    try:
        while True:
            os.write(fd, bytes(4096))
    except (BlockingIOError, OSError):
        os.set_blocking(fd, True)


def hostile(path: Path, call: int) -> FrontEnd:
    """A front-end to whom the device has something to say."""
    vm = FrontEnd(path, memory=MIB).start()
    vm.acked(Request.SET_VRING_CALL, wire.U64.pack(0), [call])
    fill(call)
    vm.requestq.add(writable=7)
    vm.requestq.kick()
    vm.requestq.polling = True
    return vm


def works(path: Path) -> None:
    with FrontEnd(path, memory=MIB) as vm:
        vm.start()
        buffer = vm.requestq.add(writable=7)
        vm.requestq.kick()
        assert buffer.wait() == count_up(7)


def test_the_next_front_end_is_served(path: Path, full: list[int]) -> None:
    hostile(path, full[0]).close()
    works(path)


def test_the_server_ends(path: Path, full: list[int]) -> None:
    """With the end of this test, while the front-end waits for its ring to stop."""
    vm = hostile(path, full[0])
    vm.send(Request.GET_VRING_BASE, wire.VRING_STATE.pack(0, 0))
    vm.close()
