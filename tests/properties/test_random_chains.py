"""Random descriptor chains, well formed and mutated, against a model that walks them as the specification says."""

import time
from itertools import count
from random import Random

import pytest
from chain_model import SMALL, Malformed, Memory, Oracle, compare, recovers
from exploring import FACTOR, SEED, budget, exploring
from hypothesis import given
from hypothesis import strategies as st

from pyvirtio.spec import Feature
from pyvirtio.testing import Guest, strategies
from pyvirtio.testing.chaos import Batch, near_borders
from pyvirtio.testing.driver import VirtioDriver
from pyvirtio.testing.queue import HANG

CHAINS = 10_000
"""Of each of the ten variants."""


class Ring:
    """A ring that batches go to, and what the device has used of it so far."""

    def __init__(self, driver: VirtioDriver) -> None:
        self.vq = driver.queues[0]
        self.ring = self.vq.ring
        self.used: list[tuple[int, int]] = []

    def offer(self, heads: list[int]) -> None:
        for head in heads:
            self.ring.offer(head)
        self.vq.publish()
        self.vq.notify()


def check(driver: VirtioDriver, placed: Ring, batch: Batch) -> bool:
    """Offer one batch and compare; whether the device has survived it."""
    guest, ring = driver.guest, placed.ring
    heads = batch.place(placed.vq)
    for slot, head in enumerate(heads):
        ring.write_avail(ring.next_avail + slot, head)
    model, broken = Memory(guest), False
    try:
        for element in model.serve(ring, heads, bool(driver.features & Feature.INDIRECT_DESC)):
            placed.used.append(element)
    except Malformed:
        broken = True
    placed.offer(heads)
    driver.may_break = broken
    wait(driver, placed, broken)
    model.write(ring.avail + 2, ring.next_avail.to_bytes(2, "little"))
    compare(guest, model, ring.used_range)
    for slot, element in list(enumerate(placed.used))[-ring.size :]:
        assert ring.used_element(slot) == element
    return not broken


def wait(driver: VirtioDriver, placed: Ring, broken: bool) -> None:
    """Until every chain is used, and the device has broken if it is to break.

    Looks at memory, not at interrupts: the driver must not write to the ring meanwhile.
    """
    expected, deadline = len(placed.used) & 0xFFFF, time.monotonic() + HANG
    while placed.ring.used_idx != expected or bool(driver.why_broken) is not broken:
        assert time.monotonic() < deadline, f"used {placed.ring.used_idx}, wanted {expected}; {driver.why_broken}"
        time.sleep(0.0002)


everywhere = pytest.mark.guest(transport=("modern", "legacy", "vhost-user"), memory=SMALL)


@everywhere
@pytest.mark.parametrize("event_idx", [False, True], ids=["flags", "event_idx"])
def test_the_device_serves_what_is_a_chain_and_breaks_on_anything_else(guest: Guest, event_idx: bool) -> None:
    driver = guest.plug(Oracle(), event_idx=event_idx, start=False)
    sizes = st.sampled_from([None] if guest.transport == "legacy" else [2, 4, 8, 16])

    @exploring
    @budget(25)
    @given(st.lists(strategies.batches(guest), min_size=1, max_size=3), sizes, st.sampled_from([True, True, False]))
    def explore(sequence: list[Batch], size: int | None, indirect: bool) -> None:
        driver.queue_size = size
        driver.features_wanted = ~0 if indirect else ~int(Feature.INDIRECT_DESC)
        driver.start()
        placed = Ring(driver)
        for batch in sequence:
            if not check(driver, placed, batch):
                break
        recovers(driver)

    explore()


@everywhere
@pytest.mark.parametrize("event_idx", [False, True], ids=["flags", "event_idx"])
def test_very_many_chains(guest: Guest, event_idx: bool) -> None:
    """100 000 in all variants; what fails here says how to repeat it, the test above can make it smaller."""
    driver = guest.plug(Oracle(), event_idx=event_idx)
    placed, chains, places = Ring(driver), 0, near_borders(guest.ram)
    for number in count():
        batch = Batch.drawn(Random(f"{SEED if FACTOR else 0} {number}"), places)
        if not check(driver, placed, batch):
            driver.start()
            placed = Ring(driver)
        chains += len(batch.chains)
        if chains >= CHAINS * max(FACTOR, 1):
            break
    recovers(driver)
