"""The plugin as a user's tests see it."""

import pytest

from pyvirtio.testing.plugin import Serve
from pyvirtio.testing.vhost_user import FrontEnd

pytest_plugins = ["pytester"]

KEEP_SIGNALS = ("-p", "no:faulthandler")
"""A pytest within pytest would leave without the handlers of signals that this process has, SIGBUS among them."""

DICE = """
import pytest
from pyvirtio import Device, queue

class Dice(Device, id=4):
    @queue(size=8)
    def requestq(self, vq):
        for chain in vq:
            chain.write(b"6" * chain.writable)
            chain.complete()

def throw(driver):
    buffer = driver.requestq.add(writable=3)
    driver.requestq.kick()
    return buffer.wait()
"""


def test_a_test_runs_in_every_variant_that_its_marker_names(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        DICE
        + """
@pytest.mark.guest(transport=("legacy", "vhost-user"), indirect=(False, True))
class TestDice:
    def test_all(self, guest):
        assert throw(guest.plug(Dice())) == b"666"

    @pytest.mark.guest(indirect=False, ioeventfd=True)
    def test_few(self, guest):
        assert throw(guest.plug(Dice())) == b"666"

def test_plain(guest):
    assert throw(guest.plug(Dice())) == b"666"
"""
    )
    shown = pytester.runpytest_inprocess("-v", "-p", "no:cacheprovider", *KEEP_SIGNALS)
    shown.assert_outcomes(passed=10)
    for name in (
        "test_all[sync-legacy]", "test_all[sync-legacy-indirect]", "test_all[ioeventfd-legacy]",
        "test_all[ioeventfd-legacy-indirect]", "test_all[vhost-user]", "test_all[vhost-user-indirect]",
        "test_few[ioeventfd-legacy]", "test_few[vhost-user]", "test_plain[sync]", "test_plain[ioeventfd]",
    ):  # fmt: skip
        assert name in shown.stdout.str()


def test_a_string_is_served_by_a_child(serve: Serve) -> None:
    with FrontEnd(serve("rng")) as front_end:
        front_end.start()
        buffer = front_end.requestq.add(writable=100)
        front_end.requestq.kick()
        assert len(buffer.wait()) == 100


def test_a_child_that_ends_at_once_is_an_error(serve: Serve) -> None:
    with pytest.raises(RuntimeError, match="pyvirtio serve nonsense ended with status 2"):
        serve("nonsense")


def test_a_failing_test_shows_its_rings_and_what_its_driver_did_last(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        DICE
        + """
@pytest.mark.guest(transport=("modern", "legacy"))
def test_wrong(guest):
    assert throw(guest.plug(Dice())) == b"777"
"""
    )
    shown = pytester.runpytest_inprocess("--pyvirtio-trace-on-failure", "-p", "no:cacheprovider", *KEEP_SIGNALS)
    shown.assert_outcomes(failed=4)
    shown.stdout.fnmatch_lines(
        [
            "*- pyvirtio -*",
            "dice0.requestq: size 8 avail_flags 0 avail_idx 1 used_event * used_idx 1 *, pending heads []",
            "mmio write dice0.queue_enable (2): 0x1",
            "mmio write dice0.requestq: notify (2): 0x0",
        ]
    )
    shown.stdout.fnmatch_lines(
        ["pio write  dice0.queue_address (4): 0x*", "pio write  dice0.requestq: notify (2): 0x0"]
    )
