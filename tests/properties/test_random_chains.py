"""Random descriptor chains, well formed and mutated, against a model that walks them as the specification says."""

import time
from itertools import count
from random import Random

import pytest
from chain_model import SMALL, Model, Oracle, compare, model_of, recovers
from exploring import FACTOR, SEED, budget, exploring
from hypothesis import given
from hypothesis import strategies as st

from pyvirtio.spec import Feature
from pyvirtio.testing import Guest, strategies
from pyvirtio.testing.chaos import Batch, near_borders
from pyvirtio.testing.driver import VirtioDriver
from pyvirtio.testing.queue import HANG

CHAINS = 6_300
"""Of each of the sixteen variants."""


def check(driver: VirtioDriver, batch: Batch) -> bool:
    """Offer one batch and compare; whether the device has survived it."""
    vq = driver.queues[0]
    batch.place(vq)
    model = model_of(driver)
    driver.may_break = broken = not model.run()
    vq.publish()
    vq.notify()
    wait(driver, model, broken)
    compare(driver.guest, model)
    model.go_on()
    return not broken


def wait(driver: VirtioDriver, model: Model, broken: bool) -> None:
    """Until the ring is as the model says, and the device has broken if it is to break.

    Looks at memory, not at interrupts: the driver must not write to the ring meanwhile.
    """
    deadline = time.monotonic() + HANG
    while not model.reached() or bool(driver.why_broken) is not broken:
        assert time.monotonic() < deadline, f"to break: {broken}; {driver.why_broken}; {driver.queues[0].ring.state()}"
        time.sleep(0.00002)


everywhere = pytest.mark.guest(transport=("modern", "legacy", "vhost-user"), packed=(False, True), memory=SMALL)


@everywhere
@pytest.mark.parametrize("event_idx", [False, True], ids=["flags", "event_idx"])
def test_the_device_serves_what_is_a_chain_and_breaks_on_anything_else(guest: Guest, event_idx: bool) -> None:
    driver = guest.plug(Oracle(), event_idx=event_idx, start=False)

    @exploring
    @budget(25)
    @given(
        st.lists(strategies.batches(guest), min_size=1, max_size=3), sizes(guest), st.sampled_from([True, True, False])
    )
    def explore(sequence: list[Batch], size: int | None, indirect: bool) -> None:
        driver.queue_size = size
        driver.features_wanted = ~0 if indirect else ~int(Feature.INDIRECT_DESC)
        driver.start()
        for batch in sequence:
            if not check(driver, batch):
                break
        recovers(driver)

    explore()


def sizes(guest: Guest) -> st.SearchStrategy[int | None]:
    """Which a driver may choose: a legacy one none, and only packed rings need not be powers of two."""
    if guest.transport == "legacy":
        return st.none()
    return st.sampled_from([2, 3, 5, 8, 16] if guest.packed else [None, 2, 4, 8, 16])


@everywhere
@pytest.mark.parametrize("event_idx", [False, True], ids=["flags", "event_idx"])
def test_very_many_chains(guest: Guest, event_idx: bool) -> None:
    """More than 100 000 in all variants; what fails here says how to repeat it, the test above can make it smaller."""
    driver = guest.plug(Oracle(), event_idx=event_idx, msix=False)  # the test above has MSI-X
    chains, places = 0, near_borders(guest.ram)
    for number in count():
        batch = Batch.drawn(Random(f"{SEED if FACTOR else 0} {number}"), places)
        if not check(driver, batch):
            driver.start()
        chains += len(batch.chains)
        if chains >= CHAINS * max(FACTOR, 1):
            break
    recovers(driver)
