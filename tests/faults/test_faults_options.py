"""Faults as text."""

import random

import pytest

from pyvirtio.devices.rng import Rng
from pyvirtio.errors import ConfigError
from pyvirtio.faults import KINDS, parse
from pyvirtio.faults.options import explain, switch
from pyvirtio.faults.times import Delay, seconds


@pytest.mark.parametrize(
    "text",
    [
        "late=5ms@1%", "late=1ms-5ms", "late=exp:2ms@50%", "late=normal:5ms:1ms", "lost", "lost-interrupt@0.1%",
        "length=4294967295", "needs-reset=7", "refuse=29", "assign=1:ENOSPC", "error", "error=7", "error=100-200@50%",
        "read-error=1-2", "torn@5%", "lost@1%/requestq",
        "late=5ms/receiveq1,reorder", "flip@0.5%", "slow-reset=1s", "storm=10ms", "late=5ms@1%,reorder,late=1s@0.1%",
    ],
)  # fmt: skip
def test_a_fault_reads_as_it_is_written(text: str) -> None:
    faults, seed = parse(text)
    assert ",".join(map(str, faults)) == text
    assert seed is None


def test_a_seed_and_chances_may_be_written_in_several_ways() -> None:
    faults, seed = parse("lost@0.25,seed=0x10")
    assert [fault.chance for fault in faults] == [0.25]
    assert seed == 16


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("latte=5ms", "fault: unknown fault 'latte', did you mean late? (known: late, reorder"),
        ("late=5", "late=5: '5' is no time such as 50us, 5ms or 1.5s"),
        ("late=2h", "late=2h: '2h' is no time"),
        ("late=exp:1ms:2ms", "late=exp:1ms:2ms: 'exp:1ms:2ms' is no delay such as 5ms, 1ms-5ms, exp:2ms"),
        ("late=9999s", "late=9999s: 9999 s is no time from 0 to 3600 s"),
        ("lost@much", "lost@much: @much is no chance such as 1% or 0.01"),
        ("lost@200%", "lost@200%: Lost: chance=2 is not from 0 to 1"),
        ("lost=1", "lost=1: lost takes no value"),
        ("error=9-3", "error=9-3: sector 3 is not from 9 to"),
        ("error=x", "error=x: 'x' is no sector"),
        ("needs-reset=0", "needs-reset=0: request 0 is not from 1"),
        ("refuse=HOPE", "refuse=HOPE: 'HOPE' is no feature (the number of a bit, or NOTIFY_ON_EMPTY"),
        ("assign=1:EHELLO", "assign=1:EHELLO: 'EHELLO' is no error such as ENOSPC"),
        ("flip/requestq", "flip/requestq: flip is no fault of a queue"),
        ("seed=x", "'x' is no seed"),
        ("", "fault: unknown fault ''"),
    ],
)
def test_what_cannot_be_meant_is_one_line(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text)
    assert str(caught.value).startswith(message)


def test_faults_are_switched_on_and_off_by_the_name_of_the_device() -> None:
    rng = Rng()
    switch({"rng0": rng}, "rng0:late=5ms@1%,seed=4")
    switch({"rng0": rng}, "rng0:lost")
    assert [str(fault) for fault in rng.faults] == ["late=5ms@1%", "lost"]
    assert rng.faults.seed == 4
    switch({"rng0": rng}, "rng0:off")
    assert list(rng.faults) == []
    for text, message in (("rng1:lost", "unknown device 'rng1', did you mean rng0"), ("rng0", "write DEVICE:FAULT")):
        with pytest.raises(ConfigError, match=message):
            switch({"rng0": rng}, text)


def test_every_kind_explains_itself() -> None:
    rows = explain()
    assert [row[0] for row in rows] == list(KINDS)
    assert all(purpose.endswith(".") or purpose for _, _, purpose in rows)


@pytest.mark.parametrize(
    ("text", "low", "high", "mean"),
    [("5ms", 0.005, 0.005, 0.005), ("1ms-5ms", 0.001, 0.005, 0.003), ("exp:2ms", 0, 1, 0.002),
     ("normal:5ms:1ms", 0, 0.1, 0.005), (0.25, 0.25, 0.25, 0.25)],
)  # fmt: skip
def test_delays_are_distributed_as_they_say(text: str | float, low: float, high: float, mean: float) -> None:
    chances = random.Random(1)
    samples = [Delay(text).sample(chances) for _ in range(4000)]
    assert low <= min(samples)
    assert max(samples) <= high
    assert sum(samples) / len(samples) == pytest.approx(mean, rel=0.1)


def test_seconds() -> None:
    assert [seconds(text) for text in ("50us", "1.5s", "7ns")] == pytest.approx([50e-6, 1.5, 7e-9])
