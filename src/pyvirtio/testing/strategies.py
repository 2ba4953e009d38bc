"""Hypothesis strategies for hostile drivers: batches of descriptor chains, and sequences of register accesses.

See docs/testing.md for a test that uses them. Needs `hypothesis`.

They draw what `pyvirtio.testing.chaos` draws, so that hypothesis shrinks what fails.
"""

from hypothesis import strategies as st

from pyvirtio.testing.chaos import Access, Batch, near_borders
from pyvirtio.testing.driver import VirtioDriver
from pyvirtio.testing.machine import Guest

# Not the default: every number that the generator gives is one that hypothesis knows and shrinks.
_generators = st.randoms(note_method_calls=False, use_true_random=False)


def batches(guest: Guest, *, size: int = 16) -> st.SearchStrategy[Batch]:
    """Chains for a ring of `size`, split or packed, in the RAM of `guest`; half of the batches have something wrong."""
    places = near_borders(guest.ram)
    return _generators.map(lambda random: Batch.drawn(random, places, size=size))


def accesses(driver: VirtioDriver, *, most: int = 20) -> st.SearchStrategy[list[Access]]:
    """Up to `most` accesses to the configuration space and the BARs of a function."""
    sizes = dict(driver.pci.sizes)
    return st.lists(_generators.map(lambda random: Access.drawn(random, sizes)), max_size=most)
