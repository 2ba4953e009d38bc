"""How long something takes: a time, or a distribution of times."""

import re
from random import Random

from pyvirtio.errors import ConfigError

UNITS = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0}
LONGEST = 3600.0


def seconds(value: str | float) -> float:
    """The seconds of "5ms" or of a number; `ConfigError` for anything else."""
    if isinstance(value, str):
        match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)(ns|us|ms|s)", value)
        if match is None:
            raise ConfigError(f"{value!r} is no time such as 50us, 5ms or 1.5s")
        value = float(match[1]) * UNITS[match[2]]
    if not 0 <= value <= LONGEST:
        raise ConfigError(f"{value:g} s is no time from 0 to {LONGEST:g} s")
    return value


class Delay:
    """A time each time anew: "5ms", "1ms-5ms" (uniform), "exp:2ms" (its mean), "normal:5ms:1ms" (mean, deviation)."""

    def __init__(self, text: str | float) -> None:
        self.text = text if isinstance(text, str) else f"{text:g}s"
        kind, *times = re.split("[:-]", self.text)
        if kind not in ("exp", "normal"):
            kind, times = ("uniform" if times else "fixed"), [kind, *times]
        if len(times) != {"fixed": 1, "exp": 1}.get(kind, 2):
            raise ConfigError(f"{self.text!r} is no delay such as 5ms, 1ms-5ms, exp:2ms or normal:5ms:1ms")
        self._kind = kind
        self._times = [seconds(time) for time in times]

    def __str__(self) -> str:
        return self.text

    def sample(self, random: Random) -> float:
        """Seconds, at most an hour."""
        first, last = self._times[0], self._times[-1]
        match self._kind:
            case "uniform":
                drawn = random.uniform(first, last)
            case "exp":
                drawn = random.expovariate(1 / first) if first else 0.0
            case "normal":
                drawn = random.normalvariate(first, last)
            case _:
                drawn = first
        return min(max(0.0, drawn), LONGEST)
