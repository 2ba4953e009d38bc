"""Faults as text: `late=5ms@1%,lost@0.1%/receiveq,seed=7`, for `--fault` and the monitor."""

import re
from collections.abc import Mapping

from pyvirtio.device import Device
from pyvirtio.errors import ConfigError
from pyvirtio.faults.device import Assign, Refuse, SlowReset, Storm
from pyvirtio.faults.disk import Error, Flip, ReadError, Torn, WriteError
from pyvirtio.faults.engine import Fault
from pyvirtio.faults.ring import (
    Duplicate,
    Late,
    Length,
    Lost,
    LostInterrupt,
    NeedsReset,
    Reorder,
    RingFault,
    Short,
    Spurious,
    number,
)
from pyvirtio.properties import unknown

KINDS: dict[str, type[Fault]] = {
    cls.kind: cls
    for cls in (
        Late, Reorder, Duplicate, Lost, Short, Length, LostInterrupt, Spurious, NeedsReset,
        SlowReset, Storm, Refuse, Assign,
        Error, ReadError, WriteError, Torn, Flip,
    )
}  # fmt: skip
"""By the name in `--fault`."""


def parse(text: str) -> tuple[list[Fault], int | None]:
    """The faults that a text describes, and the seed if it names one. `ConfigError` for what it cannot mean."""
    faults, seed = [], None
    for item in text.split(","):
        if item.startswith("seed="):
            seed = number(item.removeprefix("seed="), "seed", 0, 1 << 64)
        else:
            faults.append(_fault(item))
    return faults, seed


def _fault(item: str) -> Fault:
    item, slash, queue = item.partition("/")
    what, at, chance = item.partition("@")
    kind, equals, value = what.partition("=")
    if kind not in KINDS:
        raise ConfigError(unknown("fault", "fault", kind, list(KINDS)))
    try:
        chosen = {"chance": _chance(chance)} if at else {}
        fault = KINDS[kind](*([value] if equals else []), **chosen)
    except TypeError:
        raise ConfigError(f"{item}: {kind} takes no value") from None
    except ConfigError as error:
        raise ConfigError(f"{item}: {error}") from None
    if slash:
        if not isinstance(fault, RingFault):
            raise ConfigError(f"{item}/{queue}: {kind} is no fault of a queue")
        fault.queue = queue
    return fault


def _chance(text: str) -> float:
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)(%?)", text)
    if match is None:
        raise ConfigError(f"@{text} is no chance such as 1% or 0.01")
    return float(match[1]) / (100 if match[2] else 1)


def switch(devices: Mapping[str, Device], text: str) -> None:
    """Do what `blk0:late=5ms@1%` says, on top of what is on already; `blk0:off` switches all faults of blk0 off."""
    name, colon, wanted = text.partition(":")
    if not colon:
        raise ConfigError(f"fault {text}: write DEVICE:FAULT[=VALUE][@CHANCE],..., or DEVICE:off")
    if name not in devices:
        raise ConfigError(unknown(f"fault {text}", "device", name, list(devices)))
    if wanted == "off":
        if active := devices[name].active_faults:
            active.clear()
        return
    faults, seed = parse(wanted)
    devices[name].faults.add(*faults, seed=seed)


def explain() -> list[tuple[str, str, str]]:
    """Each kind with its default value and what it does."""
    rows = []
    for kind, cls in KINDS.items():
        purpose = (cls.__doc__ or "").strip().split("\n\n")[0].replace("\n    ", " ")
        value = cls().value
        rows.append((kind, "-" if value is None else str(value), purpose))
    return rows
