"""What the lint has found."""

import logging
import threading
from collections.abc import Callable
from typing import Literal, NamedTuple

Who = Literal["driver", "device"]
Say = Callable[[Who, str, str], object]
"""How a part of the lint reports what it has found: who, section, text."""
MOST = 1000
"""Different violations that are kept; a driver that writes nonsense makes a new one each time."""

log = logging.getLogger("pyvirtio.lint")


class Violation(NamedTuple):
    """Something that the specification does not allow: who did it, and which section (virtio 1.3) says so."""

    device: str
    who: Who
    section: str
    text: str

    def __str__(self) -> str:
        return f"{self.device}: {self.who}: {self.text} (virtio 1.3, {self.section})"


class Report:
    """Violations with how often each was seen, in the order of their first time. Any thread."""

    def __init__(self) -> None:
        self.counts: dict[Violation, int] = {}
        self._lock = threading.Lock()

    def add(self, violation: Violation) -> None:
        """Log it if it is new; beyond `MOST` different ones it is dropped."""
        with self._lock:
            count = self.counts.get(violation, 0)
            if count or len(self.counts) < MOST:
                self.counts[violation] = count + 1
        if not count:
            log.warning("%s", violation)

    def take(self) -> list[Violation]:
        """All of them; from now on there are none."""
        with self._lock:
            counts, self.counts = self.counts, {}
        return list(counts)
