"""Host notifiers: how a virtqueue notification travels from the guest to whoever serves the queue.

The state is derived: every event sets a flag and settles. See docs/ioeventfd.md for the contract.
"""

import errno
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from threading import RLock

from pyvirtio._core import VirtQueue

Undo = Callable[[], object]
Attach = Callable[[VirtQueue], Undo]

log = logging.getLogger("pyvirtio")


class NotAttached(Exception):
    """A step of `Attachments.open` failed; the steps before it have been undone."""

    def __init__(self, vq: VirtQueue, error: OSError) -> None:
        name = errno.errorcode.get(error.errno or 0, "OSError")
        super().__init__(f"{name}: {error.strerror or error}")
        self.vq = vq
        self.error = error
        self.errno_name = name


class Attachments:
    """What has been attached to a set of queues: all of the ready ones, or none."""

    _undo: ExitStack | None = None

    def open(self, queues: Iterable[VirtQueue], attach: Attach) -> None:
        """Attach to each ready queue; `NotAttached` if one refuses. Does nothing while open."""
        if self._undo is not None:
            return
        with ExitStack() as undo:
            for vq in queues:
                if vq.ready:
                    try:
                        undo.callback(attach(vq))
                    except OSError as error:
                        raise NotAttached(vq, error) from error
            self._undo = undo.pop_all()

    def close(self) -> None:
        """Undo each step, last first. Does nothing while closed."""
        undo, self._undo = self._undo, None
        if undo is not None:
            undo.close()

    def __bool__(self) -> bool:
        return self._undo is not None


def _attach(vq: VirtQueue) -> Undo:
    vq.attach()
    return vq.detach


class HostNotifiers:
    """Carries a device's queue notifications from the guest to whoever serves its queues.

    Unassigned, a notify exits to userspace and the vCPU thread serves the queue. Assigned, KVM signals
    the queue's eventfd and wakes the I/O thread, or vhost for as long as vhost has grabbed them.

    Three layers, opened in this order and closed in the other: `attached` (the eventfd is where kicks go, also those
    that exit all the same), `assigned` (KVM signals it without an exit), `polled` (the I/O thread waits for it).
    While BARs move only `assigned` goes away, so nothing is served twice and no kick is lost.
    """

    def __init__(
        self, name: str, queues: Sequence[VirtQueue], assign: Attach, poll: Attach, *, ioeventfd: bool
    ) -> None:
        self.name = name
        self.queues = queues
        self.running = False
        self.reasons: dict[int, str] = {}
        """Why a queue is served synchronously although ioeventfd is on, by queue index."""
        self._assign = assign
        self._poll = poll
        self._ioeventfd = ioeventfd
        self._grabs = 0
        self._moving = False
        self._attached = Attachments()
        self._assigned = Attachments()
        self._polled = Attachments()
        self._lock = RLock()

    @property
    def ioeventfd(self) -> bool:
        """What the user asked for; no failure and no reset changes it. Can be switched while the guest runs."""
        return self._ioeventfd

    @ioeventfd.setter
    def ioeventfd(self, value: bool) -> None:
        with self._lock:
            self._ioeventfd = value
            self.reasons = {}
            self._settle()

    def start(self) -> None:
        """The driver is up (DRIVER_OK): from here on a kick may arrive. Repeating it changes nothing."""
        with self._lock:
            if self.running:
                return
            self.running = True
            self.reasons = {}
            self._settle()
            if not self._attached:
                # Buffers may have been made available before; an attached eventfd starts out signalled.
                self._serve_once()

    def stop(self) -> None:
        """No kick is carried any more; one that is under way has been served when this returns."""
        with self._lock:
            self.running = False
            self._settle()

    def grab(self) -> None:
        """Lend the eventfds to kernel vhost: assigned, whatever `ioeventfd` says, not polled, and signalled. Counted.

        `OSError` if the eventfds cannot be assigned; then nothing was lent.
        """
        with self._lock:
            reasons, self.reasons = self.reasons, {}
            self._grabs += 1
            try:
                self._open_and_close()
            except NotAttached as failure:
                self._grabs -= 1
                self.reasons = reasons
                self._settle()
                raise failure.error from failure
            for vq in self.queues:
                if vq.ready:
                    vq.signal()  # the I/O thread may have taken a kick that it will not serve any more

    def release(self) -> None:
        """Take the eventfds back. Whoever was lent them has stopped, and restored the indexes of the queues."""
        with self._lock:
            self._grabs -= 1
            self._settle()
            if self.running and not self._attached:
                self._serve_once()

    @property
    def grabbed(self) -> bool:
        return self._grabs > 0

    @contextmanager
    def moving(self) -> Iterator[None]:
        """Around a change of the notify addresses: unassigned at the old ones before, assigned at the new after."""
        with self._lock:
            self._moving = True
            self._settle()
            try:
                yield
            finally:
                self._moving = False
                self._settle()

    def mode(self, index: int) -> str:
        """How a kick of this queue travels now: ioeventfd, vhost, sync (with the reason), or - while it has no ring."""
        if not self.queues[index].ready:
            return "-"
        mode = ("vhost" if self.grabbed else "ioeventfd") if self._attached else "sync"
        reason = self.reasons.get(index)
        return f"{mode} ({reason})" if reason else mode

    def _settle(self) -> None:
        """Make the eventfds what the flags ask for, or serve synchronously. Calling it twice changes nothing."""
        try:
            self._open_and_close()
        except NotAttached as failure:
            self._explain(failure)
            self._open_and_close()
            if not self._attached:
                self._serve_once()

    def _open_and_close(self) -> None:
        attach = self.running and (self.grabbed or (self._ioeventfd and not self.reasons))
        assign = attach and not self._moving and not self.reasons  # without, a notify exits and signals the eventfd
        poll = attach and not self.grabbed
        if not poll:
            self._polled.close()
        if not assign:
            self._assigned.close()
        if not attach:
            self._attached.close()
        if attach:
            self._attached.open(self.queues, _attach)
        if assign:
            self._assigned.open(self.queues, self._assign)
        if poll:
            self._polled.open(self.queues, self._poll)

    def _explain(self, failure: NotAttached) -> None:
        """Keep why each queue is synchronous until the next DRIVER_OK, and say it once."""
        for vq in self.queues:
            if vq.ready:
                self.reasons[vq.index] = f"{failure.vq.name} failed: {failure.errno_name}"
        self.reasons[failure.vq.index] = str(failure)
        log.warning(
            "%s: %s: no ioeventfd (%s); notifies are served synchronously",
            self.name,
            failure.vq.name,
            self.reasons[failure.vq.index],
        )

    def _serve_once(self) -> None:
        for vq in self.queues:
            vq.service()
