"""Any sequence of accesses to virtio-pci: registers, configuration space, BARs, kicks, resets, and I/O in between."""

import errno
import sys
from typing import Any

from exploring import budget, exploring
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from pci_explorer import Explorer

SIZES = st.sampled_from([1, 2, 4])
WIDE = st.sampled_from([1, 2, 4, 4, 8])
WORDS = st.one_of(
    st.sampled_from([0, 1, 2, 3, 7, 8, 0xFF, 0x1000, 0xFFFF, 0xFFFF_FFFF, 2**63, 2**64 - 1]),
    st.integers(0, 64),
    st.integers(0, 2**64 - 1),
)
QUEUES = st.one_of(st.integers(0, 3), st.integers(0, 0xFFFF))
OFFSETS = st.one_of(
    st.integers(0, 64), st.integers(0x1000, 0x1004), st.integers(0x2000, 0x2010), st.integers(0, 0xFFFF)
)
STATUSES = st.one_of(st.sampled_from([0, 3, 4, 7, 7, 11, 11, 15, 15, 0x80, 0x4F]), st.integers(0, 255))
COMMANDS = st.one_of(st.sampled_from([7, 7, 7, 0x407, 3, 5, 6, 0]), st.integers(0, 0xFFFF))
PROPERTIES = st.fixed_dictionaries(
    {"ioeventfd": st.booleans()},
    optional={
        "disable_legacy": st.just(True),
        "page_per_vq": st.just(True),
        "modern_pio_notify": st.just(True),
        "vectors": st.sampled_from([0, 1, 2, 70]),
        "event_idx": st.just(False),
        "indirect_desc": st.just(False),
        "packed": st.just(True),
        "in_order": st.just(True),
    },
)
COMMON = st.sampled_from(
    [
        "device_feature_select", "driver_feature_select", "driver_feature", "config_msix_vector", "queue_select",
        "queue_size", "queue_msix_vector", "queue_enable", "queue_desc", "queue_driver", "queue_device",
        "queue_reset",
    ]
)  # fmt: skip


LEGACY = st.sampled_from(["driver_features", "queue_address", "queue_address", "queue_select", "queue_msix_vector"])
STEPS = ["home", "reset", "version", "features", "agree", "select", "addresses", "enable", "driver_ok", "avail"]
STARTS = st.fixed_dictionaries({"legacy": st.booleans(), "msix": st.booleans(), "size": st.sampled_from([None, 2, 8])})
DATA = st.binary(max_size=40)
OURS = st.integers(0, 2)


class PciStateMachine(RuleBasedStateMachine):
    """The rules are what a guest and its user can do; `check` holds after each of them."""

    explorer: Explorer

    @initialize(properties=PROPERTIES, start=st.one_of(STARTS, st.none()))
    def plug(self, properties: dict[str, Any], start: dict[str, Any] | None) -> None:
        self.explorer = Explorer(properties)
        if start is not None:
            self.explorer.start(**start)

    # What a sound driver and the user do.

    @rule(how=STARTS)
    def start(self, how: dict[str, Any]) -> None:
        self.explorer.start(**how)

    @rule(data=DATA, index=OURS)
    def add_and_kick(self, data: bytes, index: int) -> None:
        self.explorer.add_and_kick(data, index)

    @rule(data=DATA, index=OURS)
    def add_while_paused(self, data: bytes, index: int) -> None:
        self.explorer.add_while_paused(data, index)

    @rule(pause=st.booleans())
    def finish_io(self, pause: bool) -> None:
        self.explorer.finish_io()
        if pause:
            self.explorer.add_while_paused(b"afterwards", 0)
            self.explorer.finish_io()

    @rule(on=st.booleans())
    def flip_ioeventfd(self, on: bool) -> None:
        self.explorer.function.ioeventfd = on

    @rule(count=st.integers(0, 5), error=st.sampled_from([errno.ENOSPC, errno.EMFILE]))
    def let_an_assign_fail(self, count: int, error: int) -> None:
        self.explorer.let_assign_fail(count, error)

    @rule(bar=st.integers(0, 4), place=st.integers(0, 9))
    def move_bar(self, bar: int, place: int) -> None:
        self.explorer.move_bar(bar, place)

    @rule()
    def function_level_reset(self) -> None:
        self.explorer.function_level_reset()

    # What any guest can do.

    @rule(
        omitted=st.one_of(st.just(set()), st.sets(st.sampled_from(STEPS), max_size=3)),
        index=OURS,
        ring=OURS,
        avail_idx=st.integers(0, 5),
        features=st.sampled_from([0, 2**32 - 1, 1 << 28, 1 << 29]),
    )
    def set_up_by_hand(self, omitted: set[str], index: int, ring: int, avail_idx: int, features: int) -> None:
        self.explorer.set_up_by_hand(omitted, index, ring, avail_idx, features)

    @rule(value=STATUSES, legacy=st.booleans())
    def write_status(self, value: int, legacy: bool) -> None:
        self.explorer.write_status(value, legacy=legacy)

    @rule(name=COMMON, value=WORDS, ring=OURS)
    def write_common(self, name: str, value: int, ring: int) -> None:
        self.explorer.write_common(name, value, ring)

    @rule(name=LEGACY, value=st.one_of(st.just(0), st.just(0x90), WORDS))
    def write_legacy(self, name: str, value: int) -> None:
        self.explorer.write_legacy(name, value)

    @rule(index=OURS)
    def give_a_legacy_queue_up(self, index: int) -> None:
        self.explorer.write_legacy("queue_select", index)
        self.explorer.write_legacy("queue_address", 0)

    @rule(command=COMMANDS)
    def write_command(self, command: int) -> None:
        self.explorer.write_config(4, 2, command)

    @rule(bar=st.integers(0, 4), offset=OFFSETS, size=WIDE, value=WORDS)
    def write_bar(self, bar: int, offset: int, size: int, value: int) -> None:
        self.explorer.write_bar(bar, offset, size, value)

    @rule(offset=st.integers(0, 255), size=SIZES, value=WORDS)
    def write_config(self, offset: int, size: int, value: int) -> None:
        self.explorer.write_config(offset, size, value)

    @rule(bar=st.integers(0, 6), offset=OFFSETS, length=st.integers(0, 5), value=WORDS)
    def write_window(self, bar: int, offset: int, length: int, value: int) -> None:
        self.explorer.write_window(bar, offset, length, value)

    @rule(entry=st.integers(0, 3), word=st.integers(0, 3), value=st.sampled_from([0, 1, 0xFEE0_0000, 0xFFFF_FFFF]))
    def write_msix_entry(self, entry: int, word: int, value: int) -> None:
        self.explorer.write_bar(1, 16 * entry + 4 * word, 4, value)

    @rule(control=st.sampled_from([0, 0x8000, 0x8000, 0xC000, 0x4000]))
    def write_msix_control(self, control: int) -> None:
        self.explorer.write_msix_control(control)

    @rule(index=QUEUES, size=WIDE, way=st.sampled_from(["modern", "legacy", "pio", "window"]))
    def notify(self, index: int, size: int, way: str) -> None:
        self.explorer.notify(index, size, way)

    @rule(bar=st.integers(0, 6), offset=OFFSETS, size=SIZES)
    def read(self, bar: int, offset: int, size: int) -> None:
        limit = 1 << 8 * size
        assert 0 <= self.explorer.read_bar(bar, offset, size) < limit
        assert 0 <= self.explorer.pci.read(offset % 256, size) < limit
        self.explorer.read_window(bar, offset, size)

    @invariant()
    def check(self) -> None:
        self.explorer.check()

    def teardown(self) -> None:
        if hasattr(self, "explorer"):
            failing = sys.exc_info()[0] is not None
            self.explorer.close(failing)


exploring(PciStateMachine)
TestPciStateMachine = PciStateMachine.TestCase
TestPciStateMachine.settings = budget(100, stateful_step_count=50)
