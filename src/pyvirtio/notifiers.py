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


class NotLent(NotAttached):
    """Vhost refused a queue."""


class Attachments:
    """What has been attached to which queue, and how to undo it."""

    def __init__(self) -> None:
        self._undo: dict[int, Undo] = {}

    def open(self, queues: Iterable[VirtQueue], attach: Attach) -> None:
        """Attach to those of the queues to which nothing is yet; `NotAttached` if one refuses."""
        for vq in queues:
            if vq.index not in self._undo:
                try:
                    self._undo[vq.index] = attach(vq)
                except OSError as error:
                    raise NotAttached(vq, error) from error

    def close(self, keep: Iterable[VirtQueue]) -> None:
        """Undo each step, last first, except for the queues in `keep`."""
        kept = {vq.index for vq in keep}
        with ExitStack() as undo:
            for index in [index for index in self._undo if index not in kept]:
                undo.callback(self._undo.pop(index))

    def __contains__(self, index: int) -> bool:
        return index in self._undo


def _attach(vq: VirtQueue) -> Undo:
    vq.attach()
    return vq.detach


class HostNotifiers:
    """Carries a device's queue notifications from the guest to whoever serves its queues.

    Unassigned, a notify exits to userspace and the vCPU thread serves the queue. Assigned, KVM signals
    the queue's eventfd and wakes the I/O thread, or vhost for as long as vhost has grabbed the queue.

    Three layers, opened in this order and closed in the other: `attached` (the eventfd is where kicks go, also those
    that exit all the same), `assigned` (KVM signals it without an exit), and either `polled` (the I/O thread waits for
    it) or `lent` (vhost does). While BARs move only `assigned` goes away: nothing is served twice, no kick is lost.
    """

    def __init__(
        self, name: str, queues: Sequence[VirtQueue], assign: Attach, poll: Attach, *, ioeventfd: bool
    ) -> None:
        self.name = name
        self.queues = queues
        self.running = False
        self.held = False
        self.reasons: dict[int, str] = {}
        """Why a queue is served synchronously although ioeventfd is on, by queue index."""
        self._assign = assign
        self._poll = poll
        self._ioeventfd = ioeventfd
        self._borrowers: dict[int, Attach] = {}
        self._refused = ""
        self._moving = False
        self._changing: int | None = None
        self._attached = Attachments()
        self._assigned = Attachments()
        self._polled = Attachments()
        self._lent = Attachments()
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
            self._refused = ""
            self._settle()
            # Buffers may have been made available before; an attached eventfd starts out signalled.
            self._serve_unattached()

    def stop(self) -> None:
        """No kick is carried any more; one that is under way has been served when this returns."""
        with self._lock:
            self.running = False
            self._settle()

    def grab(self, queues: Iterable[int], serve: Attach) -> None:
        """Lend the eventfds of queues to kernel vhost: assigned, whatever `ioeventfd` says, and not polled.

        While the driver is up, `serve(vq)` has vhost serve the queue and returns how to stop that; the queue then has
        the indexes at which vhost stopped. `OSError` if it fails or an eventfd cannot be assigned: then nothing was
        lent. At a later DRIVER_OK a refusal of vhost is a warning, and that run is not lent.
        """
        with self._lock:
            reasons, self.reasons, self._refused = self.reasons, {}, ""
            borrowed = dict.fromkeys(queues, serve)
            self._borrowers |= borrowed
            try:
                self._open_and_close()
            except NotAttached as failure:
                self.reasons = reasons
                self.release(borrowed)
                raise failure.error from failure

    def release(self, queues: Iterable[int]) -> None:
        """Take the eventfds of these queues back; vhost stops first."""
        with self._lock:
            for index in queues:
                self._borrowers.pop(index, None)
            self._settle()
            if self.running:
                self._serve_unattached()

    def hold(self) -> None:
        """The machine pauses: no kick is carried and no queue served by anybody until `unhold`. Twice is once."""
        with self._lock:
            if not self.held:
                self.held = True
                self._settle()
                for vq in self.queues:
                    vq.hold()

    def unhold(self) -> None:
        """Go on: what was made available before, or came from the host meanwhile, is looked at."""
        with self._lock:
            if self.held:
                self.held = False
                for vq in self.queues:
                    vq.release()
                self._settle()
                if self.running:
                    self._serve_unattached()

    def grabbed(self, index: int) -> bool:
        return index in self._borrowers and not self._refused

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

    @contextmanager
    def without(self, index: int) -> Iterator[None]:
        """Around the stop or start of one queue while the others are served: its kicks go nowhere, then where they
        are to go. One at a time."""
        with self._lock:
            self._changing = index
            self._settle()
        try:
            yield
        finally:
            with self._lock:
                self._changing = None
                self._settle()
                if self.running:
                    self._serve_unattached()

    def mode(self, index: int) -> str:
        """How a kick of this queue travels now: ioeventfd, vhost, sync (with the reason), paused; - without a ring."""
        if not self._has_ring(self.queues[index]):
            return "-"
        if self.held:
            return "paused"
        mode = ("vhost" if index in self._lent else "ioeventfd") if index in self._attached else "sync"
        reason = self.reasons.get(index) or (self._refused if index in self._borrowers else "")
        return f"{mode} ({reason})" if reason else mode

    def _settle(self) -> None:
        """Make the eventfds what the flags ask for, or do without. Calling it twice changes nothing."""
        try:
            self._open_and_close()
        except NotLent as failure:
            self._refused = str(failure)
            log.warning("%s: %s: no vhost (%s); the I/O thread serves", self.name, failure.vq.name, self._refused)
            self._settle()
        except NotAttached as failure:
            self._explain(failure)
            self._open_and_close()
            self._serve_unattached()

    def _open_and_close(self) -> None:
        served = self.running and not self.held
        ready = [vq for vq in self.queues if served and self._has_ring(vq) and vq.index != self._changing]
        lend = [vq for vq in ready if self.grabbed(vq.index)]
        attach = ready if self._ioeventfd and not self.reasons else lend
        assign = [] if self._moving or self.reasons else attach  # without, a notify exits and signals the eventfd
        poll = [vq for vq in attach if not self.grabbed(vq.index)]
        self._polled.close(keep=poll)
        self._lent.close(keep=lend)
        self._assigned.close(keep=assign)
        self._attached.close(keep=attach)
        self._attached.open(attach, _attach)
        self._assigned.open(assign, self._assign)
        self._polled.open(poll, self._poll)
        self._lent.open(lend, self._lend)

    def _has_ring(self, vq: VirtQueue) -> bool:
        return vq.ready or vq.index in self._lent  # lent, vhost has it

    def _lend(self, vq: VirtQueue) -> Undo:
        try:
            undo = self._borrowers[vq.index](vq)
        except OSError as error:
            raise NotLent(vq, error) from error
        vq.signal()  # the I/O thread may have taken a kick that it will not serve any more
        return undo

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

    def _serve_unattached(self) -> None:
        for vq in self.queues:
            if vq.index not in self._attached:
                vq.service()
