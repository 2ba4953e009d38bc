"""How far the property-based tests explore.

By default they try the same examples in every run. `PYVIRTIO_RANDOM=N` tries N times as many, others in each run;
the seed is printed at the start, and `PYVIRTIO_SEED=seed` with the same N repeats that run.
"""

import os
import random
from collections.abc import Callable
from typing import Any, TypeVar

from hypothesis import HealthCheck, seed, settings

FACTOR = int(os.environ.get("PYVIRTIO_RANDOM", "0"))
SEED = int(os.environ.get("PYVIRTIO_SEED", "") or random.SystemRandom().getrandbits(32))

Test = TypeVar("Test", bound=Callable[..., Any])


def budget(examples: int, **more: Any) -> settings:
    """Settings of a test that tries so many examples by default; `more` are further settings."""
    return settings(
        max_examples=examples * max(FACTOR, 1),
        derandomize=not FACTOR,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
        **more,
    )


def exploring(test: Test) -> Test:
    """Start from the seed of a random run. Outermost, but for a state machine: there it decorates the class."""
    return seed(SEED)(test) if FACTOR else test
