"""Random accesses to virtio-pci, one sequence after another on one function, with a sound driver in between."""

from random import Random
from typing import Any

import pytest
from exploring import FACTOR, SEED, budget, exploring
from hypothesis import given
from hypothesis import strategies as st
from pci_echo import Echo
from pci_explorer import Explorer

from pyvirtio.testing import Guest, strategies
from pyvirtio.testing.chaos import Access

SEQUENCES = 2_500
"""Of each of the four variants."""
VARIANTS: dict[str, dict[str, Any]] = {
    "sync": {"ioeventfd": False},
    "ioeventfd": {"ioeventfd": True},
    "modern": {"ioeventfd": True, "disable_legacy": True, "page_per_vq": True},
    "two-vectors": {"ioeventfd": False, "vectors": 2, "event_idx": False, "modern_pio_notify": True},
}


def apply(explorer: Explorer, access: Access) -> None:
    if access.value is None:
        value = access.do(explorer.driver)
        assert value is not None
        assert 0 <= value < 1 << 8 * access.size
    elif access.bar is None:
        explorer.write_config(access.offset, access.size, access.value)
    else:
        explorer.write_bar(access.bar, access.offset, access.size, access.value)


@pytest.mark.parametrize("properties", VARIANTS.values(), ids=VARIANTS)
def test_very_many_sequences(properties: dict[str, Any]) -> None:
    """10 000 in all variants: what must hold holds after each access, and the device serves whoever starts over."""
    explorer, failing = Explorer(properties), True
    try:
        for number in range(SEQUENCES * max(FACTOR, 1)):
            random = Random(f"{SEED if FACTOR else 0} {number}")
            if number % 10 == 0:
                explorer.start(legacy=random.random() < 0.5, msix=random.random() < 0.5, size=None)
                explorer.add_and_kick(b"sound", random.randint(0, 2))
                explorer.finish_io()
            for _ in range(random.randint(1, 20)):
                apply(explorer, Access.drawn(random, explorer.pci.sizes))
                explorer.check()
        failing = False
    finally:
        explorer.close(failing)


def test_what_hypothesis_draws_is_survived_too(guest: Guest) -> None:
    driver = guest.plug(Echo(), start=False)
    driver.may_break = True

    @exploring
    @budget(50)
    @given(strategies.accesses(driver), st.booleans())
    def explore(sequence: list[Access], started: bool) -> None:
        for bar, window in driver.pci.bars.items():
            driver.pci.move_bar(bar, window.base)
        driver.pci.command = 7
        if started:
            driver.start()
            driver.may_break = True
        for access in sequence:
            access.do(driver)
        assert driver.pci.read(0, 2) == 0x1AF4

    explore()
