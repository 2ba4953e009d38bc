"""What a process has cost so far, as the kernel accounts for it."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Self

CPUCLOCK_SCHED = 2


@dataclass(frozen=True)
class Usage:
    """`cpu` is the seconds that all threads have run, those that have ended too; `rss` the resident bytes (VmRSS)."""

    cpu: float
    rss: int

    @classmethod
    def of(cls, pid: int) -> Self:
        """`OSError` if there is no such process."""
        return cls(_cpu_time(pid), _resident(pid))


def _cpu_time(pid: int) -> float:
    # The clock of clock_getcpuclockid(3), which Python has for threads only.
    return time.clock_gettime((~pid << 3) | CPUCLOCK_SCHED)


def _resident(pid: int) -> int:
    """Guest memory that the process has touched is counted as well."""
    status = Path(f"/proc/{pid}/status").read_text()
    lines = (line.split() for line in status.splitlines())
    return next((int(words[1]) << 10 for words in lines if words[0] == "VmRSS:"), 0)  # a zombie has none
