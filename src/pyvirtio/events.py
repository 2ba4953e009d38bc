"""What a device waits for besides its queues: file descriptors and timers on its I/O thread."""

import logging
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from threading import RLock

from pyvirtio import _core
from pyvirtio._core import DeviceState, Timer
from pyvirtio.device import Device, Event, events_of

log = logging.getLogger("pyvirtio")


class Events:
    """Calls the `@poll` and `@every` methods of a device between `start` and `stop`. Its owner serialises the two."""

    def __init__(self, device: Device, state: DeviceState, loop: _core.IoThread) -> None:
        self.device, self.state, self.loop = device, state, loop
        self._running: ExitStack | None = None

    def start(self) -> None:
        """From here on the methods are called. Repeating it changes nothing."""
        if self._running is not None:
            return
        with ExitStack() as undo:
            for event in events_of(self.device):
                undo.callback(self._watch(event))
            self._running = undo.pop_all()

    def stop(self) -> None:
        """No method runs any more when this returns, unless it is one of them that stops."""
        running, self._running = self._running, None
        if running is not None:
            running.close()

    def _watch(self, event: Event) -> Callable[[], object]:
        """Begin with one; return how to end it."""
        with ExitStack() as undo:
            method = _Method(self.device.name, event, self.state)
            if event.seconds is None:
                assert event.fd is not None
                watch = self.loop.watch(event.fd, method.run)
            else:
                timer = Timer()
                watch = self.loop.watch(timer.fd, partial(method.expired, timer))
                timer.start(event.seconds, event.seconds)
                undo.callback(timer.stop)
            undo.callback(watch.close)
            undo.callback(method.end)
            return undo.pop_all().close


class _Method:
    """One method, which its end waits for."""

    def __init__(self, device: str, event: Event, state: DeviceState) -> None:
        self.device, self.event, self.state = device, event, state
        self._lock = RLock()
        self._ended = False

    def run(self) -> None:
        with self._lock:
            if self._ended:
                return
            try:
                self.event.method()
            except Exception as error:
                self._ended = True
                log.exception("%s: exception in %s", self.device, self.event.name)
                self.state.fail(f"{self.event.name} raised {type(error).__name__}: {error}")
                raise  # disarms the watch

    def expired(self, timer: Timer) -> None:
        if timer.take():
            self.run()

    def end(self) -> None:
        with self._lock:
            self._ended = True
