"""The ways in which a hostile driver may use the ring."""

import pytest
from attack import Attack

from pyvirtio.spec import Feature
from pyvirtio.testing import Guest


@pytest.fixture(params=[False, True], ids=["flags", "event_idx"])
def event_idx(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(params=[False, True], ids=["direct", "indirect"])
def in_table(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(params=[False, True], ids=["split", "packed"])
def packed(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def attack(guest: Guest, event_idx: bool, in_table: bool, packed: bool) -> Attack:
    """With the malformed chain in the ring itself and in an indirect table, of both kinds of ring."""
    return Attack(guest, event_idx=event_idx, in_table=in_table, packed=packed)


@pytest.fixture
def either(guest: Guest, event_idx: bool, packed: bool) -> Attack:
    """For what can only be said in the ring itself, of both kinds."""
    return Attack(guest, event_idx=event_idx, packed=packed)


@pytest.fixture
def split(guest: Guest, event_idx: bool, in_table: bool) -> Attack:
    """For what only a split ring can say: where the next descriptor is."""
    return Attack(guest, event_idx=event_idx, in_table=in_table)


@pytest.fixture
def packed_ring(guest: Guest, event_idx: bool) -> Attack:
    """For what only a packed ring can say."""
    return Attack(guest, event_idx=event_idx, packed=True)


@pytest.fixture
def direct(guest: Guest, event_idx: bool) -> Attack:
    """For what can only be said in the descriptor table of a split ring."""
    return Attack(guest, event_idx=event_idx)


@pytest.fixture
def without_indirect(guest: Guest, event_idx: bool, packed: bool) -> Attack:
    return Attack(guest, event_idx=event_idx, packed=packed, features=~Feature.INDIRECT_DESC)
