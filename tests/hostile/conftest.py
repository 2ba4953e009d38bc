"""The ways in which a hostile driver may use the ring."""

import pytest
from attack import Attack

from pyvirtio.spec import Feature
from pyvirtio.testing import Guest


@pytest.fixture(params=[False, True], ids=["flags", "event_idx"])
def event_idx(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(params=[False, True], ids=["direct", "indirect"])
def attack(request: pytest.FixtureRequest, guest: Guest, event_idx: bool) -> Attack:
    """With the malformed chain in the ring's own table, and in an indirect one."""
    return Attack(guest, event_idx=event_idx, in_table=request.param)


@pytest.fixture
def direct(guest: Guest, event_idx: bool) -> Attack:
    """For what can only be said in the ring's own table."""
    return Attack(guest, event_idx=event_idx)


@pytest.fixture
def without_indirect(guest: Guest, event_idx: bool) -> Attack:
    return Attack(guest, event_idx=event_idx, features=~Feature.INDIRECT_DESC)
