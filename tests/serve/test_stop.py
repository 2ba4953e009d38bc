"""What a stop waits for: the requests that the device holds, as long as somebody is there to hear of them."""

import logging
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from serving import Serve, count_up, programs

from pyvirtio import Chain, Device, VirtQueue, queue
from pyvirtio.devices.rng import Rng
from pyvirtio.errors import StaleChain
from pyvirtio.faults import Lost
from pyvirtio.serve import backend, wire
from pyvirtio.serve.wire import Request
from pyvirtio.testing.queue import HANG
from pyvirtio.testing.serving import serve_in_process
from pyvirtio.testing.vhost_user import FrontEnd

STOP = Request.GET_VRING_BASE, wire.VRING_STATE.pack(0, 0)


class Slow(Device, id=63):
    """Keeps its requests until the test has them answered; its other queue breaks it."""

    def __init__(self) -> None:
        self.kept: list[Chain] = []

    @queue(size=64)
    def requestq(self, vq: VirtQueue) -> None:
        self.kept += vq

    @queue(size=64)
    def otherq(self, vq: VirtQueue) -> None:
        raise RuntimeError("on purpose")

    def answer(self) -> None:
        for chain in self.kept:
            chain.write(b"late")
            chain.complete()

    def reset(self) -> None:
        self.kept.clear()


def wait_for(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + HANG
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Callable[[str], None]:
    """Waits for a line in the log; a stop says at once what it waits for."""
    monkeypatch.setattr(backend, "PATIENCE", 0.0)
    caplog.set_level(logging.WARNING, "pyvirtio")
    return lambda line: wait_for(lambda: f"served: requestq: {line}" in caplog.messages)


Said = Callable[[str], None]


def stop_with(vm: FrontEnd, device: Slow, requests: int) -> None:
    """Send the device so many requests, and stop the ring when it holds them."""
    for _ in range(requests):
        vm.requestq.add(writable=4)
    vm.requestq.kick()
    wait_for(lambda: len(device.kept) == requests)
    vm.send(*STOP)


def test_a_stop_waits_for_a_slow_device_and_says_for_what(serve: Serve, said: Said) -> None:
    slow = Slow()
    with FrontEnd(serve(slow)) as vm:
        vm.start()
        stop_with(vm, slow, 3)
        said("its stop waits for chains that Slow.requestq took and did not complete: 3; each needs its complete()")
        slow.kept.pop(0).complete()
        vm.socket.setblocking(False)
        with pytest.raises(BlockingIOError):
            vm.socket.recv(1)
        vm.socket.settimeout(HANG)
        slow.answer()
        assert wire.VRING_STATE.unpack(vm.reply()) == (0, 3)
        assert vm.requestq.ring.used_idx == 3


def test_a_front_end_that_goes_ends_the_wait(serve: Serve, said: Said) -> None:
    slow = Slow()
    path = serve(slow)
    with FrontEnd(path) as vm:
        vm.start()
        stop_with(vm, slow, 1)
        said("its stop waits for chains that Slow.requestq took and did not complete: 1; each needs its complete()")
        late = slow.kept[0]
    said("stopped with chains that Slow.requestq took and did not complete: 1; each needs its complete()")
    with FrontEnd(path) as vm:
        vm.start()
        with pytest.raises(StaleChain):
            late.complete()
        stop_with(vm, slow, 1)
        slow.answer()
        assert wire.VRING_STATE.unpack(vm.reply()) == (0, 1)


def test_a_server_that_closes_ends_the_wait(tmp_path: Path, said: Said) -> None:
    slow = Slow()
    with serve_in_process(slow, tmp_path / "s"):
        vm = FrontEnd(tmp_path / "s").start()
        stop_with(vm, slow, 1)
        said("its stop waits for chains that Slow.requestq took and did not complete: 1; each needs its complete()")
    said("stopped with chains that Slow.requestq took and did not complete: 1; each needs its complete()")
    vm.close()


SILENT = """
from pyvirtio import Device, queue

class Silent(Device, id=63):
    def __init__(self):
        self.kept = []

    @queue()
    def requestq(self, vq):
        self.kept += vq
"""


def test_sigterm_ends_a_program_that_waits_for_a_device_that_never_answers(tmp_path: Path) -> None:
    (tmp_path / "silent.py").write_text(SILENT)
    with programs(tmp_path) as start:
        server = start("silent.py:Silent", "--socket-path", "s")
        with FrontEnd(tmp_path / "s") as vm:
            vm.start()
            vm.requestq.add(writable=4)
            vm.requestq.kick()
            vm.send(*STOP)
            server.terminate()
            vm.wait_hangup()
            assert server.wait(HANG) == 0


def test_a_device_that_breaks_is_not_waited_for(serve: Serve, said: Said) -> None:
    slow = Slow()
    with FrontEnd(serve(slow)) as vm:
        vm.start(["requestq", "otherq"])
        stop_with(vm, slow, 1)
        said("its stop waits for chains that Slow.requestq took and did not complete: 1; each needs its complete()")
        vm.otherq.add(b"boom")
        vm.otherq.kick()
        assert wire.VRING_STATE.unpack(vm.reply()) == (0, 1)
        vm.wait_broken()


def test_what_is_lost_on_purpose_is_not_waited_for_long(serve: Serve, said: Said) -> None:
    rng, lost = Rng(source=count_up), Lost()
    rng.faults.add(lost)
    with FrontEnd(serve(rng)) as vm:
        vm.start()
        vm.requestq.add(writable=4)
        vm.requestq.kick()
        wait_for(lambda: lost.hits)
        assert vm.stop_ring(vm.requestq) == 1
        said("stopped with chains that Rng.requestq took and did not complete: 1; each needs its complete()")
