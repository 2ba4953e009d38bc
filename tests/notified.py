"""Devices, and what the tests of host notifiers ask about them."""

import os
import select
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from pyvirtio import Device, VirtQueue, queue
from pyvirtio._core import VirtQueue as CoreQueue
from pyvirtio.dataplane import start_ring
from pyvirtio.notifiers import HostNotifiers, Undo
from pyvirtio.spec import DeviceId
from pyvirtio.testing import VirtioDriver
from pyvirtio.testing.queue import HANG, Queue


class Echo(Device, id=63):
    """Echoes on `count` queues and remembers which thread did."""

    size = 16

    def __init__(self, count: int = 1, size: int = 16) -> None:
        self.count, self.size = count, size
        self.threads: set[int] = set()
        self.seen: list[str] = []
        self.watch: Callable[[], object] = lambda: None

    @queue(size="size", count="count")
    def echoq(self, vq: VirtQueue) -> None:
        self.threads.add(threading.get_ident())
        for chain in vq:
            chain.write(chain.read())
            chain.complete()

    def activate(self, features: int) -> None:
        self.seen.append(f"activate {self.watch()}")

    def reset(self) -> None:
        self.seen.append(f"reset {self.watch()}")


class Transitional(Echo, id=DeviceId.ENTROPY):
    """The same, with a device type that has a legacy interface too."""


class Gate(Device, id=63):
    """Its handler waits until it is let through: it keeps the thread that serves it busy."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.open = threading.Event()

    @queue(size=16)
    def gateq(self, vq: VirtQueue) -> None:
        self.entered.set()
        assert self.open.wait(HANG)
        for chain in vq:
            chain.complete()


def echo(q: Queue, data: bytes = b"hello") -> bytes:
    buffer = q.add(data, len(data))
    q.kick()
    return buffer.wait()


def queues_of(driver: VirtioDriver) -> list[VirtQueue]:
    return driver.function.dataplane.queues


def notifiers_of(driver: VirtioDriver) -> HostNotifiers:
    return driver.function.dataplane.notifiers


def modes(driver: VirtioDriver) -> list[str]:
    return [notifiers_of(driver).mode(index) for index in range(len(queues_of(driver)))]


def wait_for_kicks(vq: VirtQueue, kicks: int) -> None:
    """Sleep until the I/O thread has read that many from the eventfd."""
    deadline = time.monotonic() + HANG
    while vq.counters["kicks"] < kicks:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def function_level_reset(driver: VirtioDriver) -> None:
    advanced_features = driver.pci.capability(0x13)
    assert advanced_features is not None
    driver.pci.write(advanced_features + 4, 1, 1)


def nobody(vq: VirtQueue) -> Undo:
    """Borrows the eventfds of a queue and does not serve it."""
    return lambda: None


class Vhost:
    """Stands in for kernel vhost: serves a queue of a device from its ring's position on, woken by the kick eventfd.

    Like vhost it is given the ring and the eventfds and knows nothing of the device. The queue of the device keeps
    its ring meanwhile, which nobody serves, and gets the positions back.
    """

    def __init__(self, driver: VirtioDriver, index: int = 0) -> None:
        self.driver, self.index = driver, index
        self.served = 0
        self.vq = driver.function.dataplane.queues[index]
        self.own = CoreQueue(driver.function.dataplane.state, f"vhost{index}", index, self.vq.max_size)

    def take(self) -> None:
        notifiers_of(self.driver).grab([self.index], self.serve)

    def give_back(self) -> None:
        notifiers_of(self.driver).release([self.index])

    def serve(self, vq: VirtQueue) -> Undo:
        assert vq is self.vq
        self.stopped = os.eventfd(0)
        self.thread = threading.Thread(target=self.run)
        at = self.restart(*self.vq.stop())
        interrupts = self.driver.function.interrupts
        vector = interrupts.msix.vector(interrupts.queue_vectors[self.index]) if interrupts.msix else None
        self.own.set_interrupt(interrupts.isr, vector)
        start_ring(self.own, handler=self.handle, at=at, **self.ring)
        self.thread.start()
        return self.stop

    def stop(self) -> None:
        os.eventfd_write(self.stopped, 1)
        self.thread.join()
        os.close(self.stopped)
        self.vq.stop()
        self.restart(*self.own.stop())

    @property
    def ring(self) -> dict[str, Any]:
        state = self.driver.function.driver
        ring = {"memory": state.memory, "setup": state.setups[self.index], "features": state.features}
        return ring | {"legacy": state.legacy}

    def restart(self, next_avail: int, next_used: int) -> tuple[int, int]:
        at = next_avail, next_used
        self.driver.function.dataplane.start_queue(self.index, at=at, **self.ring)
        return at

    def run(self) -> None:
        poll = select.poll()
        poll.register(self.vq.kick_fd, select.POLLIN)
        poll.register(self.stopped, select.POLLIN)
        self.own.service()
        while self.stopped not in [fd for fd, _ in poll.poll()]:
            with suppress(BlockingIOError):
                os.eventfd_read(self.vq.kick_fd)
            self.own.service()

    def handle(self, vq: VirtQueue) -> None:
        for chain in vq:
            chain.read()
            chain.write(b"vhost")
            chain.complete()
            self.served += 1
