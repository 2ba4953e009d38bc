"""A user's device in a snapshot: what it saves comes back, and its mistakes are one line."""

from typing import Any

import pytest

from pyvirtio import ConfigError, Device, VirtQueue, queue
from pyvirtio.device import is_storable
from pyvirtio.testing import Guest, VirtioDriver

STATE: dict[str, Any] = {
    "number": 1 << 70,
    "share": 0.5,
    "text": "é",
    "bytes": b"\0\xff",
    "nothing": None,
    "list": [1, [b"x"]],
    "dict": {"more": {}},
}


class Memo(Device, id=63):
    """Saves what the test gives it, and keeps what it is given back."""

    def __init__(self, memo: Any = None) -> None:
        self.memo = memo
        self.active = False

    @queue(size=8)
    def requestq(self, vq: VirtQueue) -> None:
        for chain in vq:
            chain.write(b"served")
            chain.complete()

    def activate(self, features: int) -> None:
        self.active = True

    def save(self) -> dict[str, Any]:
        return {**super().save(), "memo": self.memo}

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        assert not self.active
        self.memo = state["memo"]


def served(driver: VirtioDriver) -> bool:
    buffer = driver.requestq.add(writable=6)
    driver.requestq.kick()
    return bool(buffer.wait() == b"served")


@pytest.mark.guest(transport=("modern",), packed=(False, True))
def test_the_state_comes_back_before_the_device_is_activated(guest: Guest) -> None:
    driver, other = guest.plug(Memo(STATE)), Memo()
    assert served(driver)
    driver.restore(other, driver.save())
    assert (other.memo, other.active) == (STATE, True)
    assert served(driver)


def test_a_device_that_no_driver_was_up_for_is_not_activated(guest: Guest) -> None:
    driver, other = guest.plug(Memo("kept"), start=False), Memo()
    driver.restore(other, driver.save())
    assert (other.memo, other.active) == ("kept", False)
    driver.start()
    assert served(driver)


@pytest.mark.parametrize("memo", [{1: "x"}, {1, 2}, object(), [b"x", {"y": range(3)}], {"hex": "00"}])
def test_what_a_snapshot_cannot_hold_is_refused(guest: Guest, memo: object) -> None:
    driver = guest.plug(Memo(memo))
    with pytest.raises(ConfigError, match=r"^memo0: Memo.save\(\) returns .*; a snapshot holds numbers, text, bytes, "):
        driver.save()
    assert not is_storable(memo)


def test_exceptions_are_one_line(guest: Guest) -> None:
    class Forgetful(Memo):
        """Wants what it has not saved."""

        def restore(self, state: dict[str, Any]) -> None:
            self.memo = state["forgotten"]

    class Failing(Memo):
        """Cannot say what it is."""

        def save(self) -> dict[str, Any]:
            raise RuntimeError("busy")

    driver = guest.plug(Forgetful())
    told = r"forgetful0: Forgetful.restore\(\) cannot do with what save\(\) returned: Forgetful.restore raised KeyError"
    with pytest.raises(ConfigError, match=rf"^{told}: 'forgotten' \(test_restore.py:\d+\)$"):
        driver.restore(Forgetful(), driver.save())
    failing = guest.plug(Failing())
    with pytest.raises(ConfigError, match=r"^failing1: Failing.save\(\): Failing.save raised RuntimeError: busy \("):
        failing.save()
