"""What the author of a device gets to read: each message names the class, the method and the rule."""

import re
from collections.abc import Callable
from contextlib import suppress
from ctypes import BigEndianStructure, LittleEndianStructure, c_uint8, c_uint16, c_uint32
from queue import Queue
from typing import Annotated, Any, Literal

import pytest

from pyvirtio import Chain, ConfigError, Device, StaleChain, VirtQueue, every, poll, queue
from pyvirtio.accel.inproc import InProcess
from pyvirtio.backends.block import Memory
from pyvirtio.devices.blk import Blk
from pyvirtio.properties import Range
from pyvirtio.testing import Guest
from pyvirtio.testing.queue import HANG
from pyvirtio.testing.trace import describe
from pyvirtio.testing.vhost_user import Refused
from pyvirtio.vmm.board import Board, allocate

A_TIME = "a number of seconds above 0, or the name of the attribute that holds it"


class Packed(LittleEndianStructure):
    """Five bytes."""

    _pack_ = 1
    _fields_ = (("small", c_uint8), ("large", c_uint32))


class Idle(Device, id=63):
    """A device that does nothing."""

    def __init__(
        self,
        speed: Annotated[int, "rounds per second", Range(1, 10)] = 1,
        unit: Literal["K", "C"] = "K",
        label: str = "",
        exact: bool = False,
        scale: float = 1,
    ) -> None: ...

    @queue(size=8)
    def idleq(self, vq: VirtQueue) -> None: ...


def refused(device: Device) -> str:
    with Guest() as guest, pytest.raises(ConfigError) as caught:
        guest.plug(device)
    return str(caught.value)


def test_a_device_without_queues() -> None:
    class Empty(Device, id=63):
        """Nothing."""

    assert refused(Empty()) == "empty0: Empty has no queue; declare each with @queue() on the method that serves it"


def test_a_device_without_a_type() -> None:
    class Nameless(Device):
        """No id."""

        @queue()
        def requestq(self, vq: VirtQueue) -> None: ...

    message = "nameless0: Nameless has the device type 0; write class Nameless(Device, id=1 to 63)"
    assert refused(Nameless()) == message


def test_a_queue_whose_size_names_nothing() -> None:
    class Lost(Device, id=63):
        """Names an attribute that it does not have."""

        @queue(size="entries")
        def requestq(self, vq: VirtQueue) -> None: ...

    message = "Lost.requestq: @queue names the attribute 'entries', which is None; it has to be an integer"
    assert refused(Lost()) == message


def test_two_devices_of_one_name() -> None:
    with Board(InProcess(allocate(16 << 20))) as board:
        board.add(Idle(), "idle0")
        with pytest.raises(ConfigError, match=r"^idle0: a device of that name is plugged already"):
            board.add(Idle(), "idle0")


def test_a_method_that_waits_for_what_is_not_there() -> None:
    class Misspelt(Idle):
        """Has an interval, and waits for another."""

        @every("intervall")
        def tick(self) -> None: ...

    rule = "set it in __init__, to None where it comes later"
    message = f"Misspelt.tick: @every('intervall') names an attribute that is not there; {rule}"
    assert refused(Misspelt()) == message


def test_a_method_that_waits_for_what_is_no_time() -> None:
    class Backwards(Idle):
        """Waits for less than nothing."""

        interval = -1

        @every("interval")
        def tick(self) -> None: ...

    assert refused(Backwards()) == "Backwards.tick: @every('interval') is -1; it has to be a number of seconds above 0"


def _bare() -> None:
    class Bare(Device, id=63):
        @queue  # type: ignore[arg-type]
        def requestq(self, vq: VirtQueue) -> None: ...  # type: ignore[misc]


def _without_a_queue() -> None:
    class Forgetful(Device, id=63):
        @queue()
        def requestq(self) -> None: ...


def _without_a_time() -> None:
    class Hasty(Device, id=63):
        @every(0)
        def tick(self) -> None: ...


def _at_a_text() -> None:
    class Hasty(Device, id=63):
        @every("0.5 s")
        def tick(self) -> None: ...


def _every_nothing() -> None:
    class Hasty(Device, id=63):
        @every  # type: ignore[arg-type]
        def tick(self) -> None: ...  # type: ignore[misc]


def _at_no_file() -> None:
    class Deaf(Device, id=63):
        @poll(-1)
        def heard(self) -> None: ...


def _with_a_parameter() -> None:
    class Deaf(Device, id=63):
        @poll("socket")
        def heard(self, vq: VirtQueue) -> None: ...


def _with_padding() -> None:
    class Padded(LittleEndianStructure):
        _fields_ = (("small", c_uint16), ("large", c_uint32))

    class Thermometer(Device, id=63, config=Padded): ...


def _of_the_wrong_order() -> None:
    class Swapped(BigEndianStructure):
        _pack_ = 1
        _fields_ = (("large", c_uint32),)

    class Thermometer(Device, id=63, config=Swapped): ...  # type: ignore[arg-type]


def _too_large() -> None:
    class Huge(LittleEndianStructure):
        _pack_ = 1
        _fields_ = (("table", c_uint8 * 4097),)

    class Thermometer(Device, id=63, config=Huge): ...


@pytest.mark.parametrize(
    ("define", "message"),
    [
        (_bare, r"Bare.requestq: write @queue\(\) with parentheses"),
        (_without_a_queue, r"Forgetful.requestq\(self\).*: this handler is called as \(self, vq\)"),
        (_without_a_time, rf"Hasty.tick: @every\(0\): write {A_TIME}"),
        (_at_a_text, rf"Hasty.tick: @every\('0.5 s'\): write {A_TIME}"),
        (_every_nothing, r"Hasty.tick: write @every\(seconds\) with parentheses"),
        (_at_no_file, r"Deaf.heard: @poll\(-1\): write a file descriptor or what has a fileno\(\), or the name of"),
        (_with_a_parameter, r"Deaf.heard\(self, vq.*: this handler is called as \(self\)"),
        (_with_padding, "Thermometer: config=Padded: set _pack_ = 1, there is no padding in virtio"),
        (_of_the_wrong_order, "Thermometer: .* a subclass of ctypes.LittleEndianStructure"),
        (_too_large, "Thermometer: config=Huge has 4097 bytes, at most 4096 fit"),
    ],
)
def test_a_class_that_cannot_be_a_device(define: Callable[[], None], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        define()


def test_a_configuration_of_another_size_than_its_layout() -> None:
    class Short(Idle, config=Packed):
        """Leaves bytes out."""

        def config_bytes(self) -> bytes:
            return b"abc"

    assert refused(Short()) == "short0: Short.config_bytes() returns 3 bytes, its layout Packed has 5"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"speed": "fast"}, "Idle: speed='fast' is not allowed: an integer, 1 to 10"),
        ({"speed": 11}, "Idle: speed=11 is not allowed: an integer, 1 to 10"),
        ({"unit": "F"}, "Idle: unit='F' is not allowed: K or C"),
        ({"label": 7}, "Idle: label=7 is not allowed: text"),
        ({"exact": "on"}, "Idle: exact='on' is not allowed: on or off"),
        ({"scale": "1"}, "Idle: scale='1' is not allowed: a number"),
    ],
)
def test_a_property_of_the_wrong_type(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Idle(**arguments)
    assert str(caught.value) == message


def test_a_property_that_is_another_object() -> None:
    with pytest.raises(ConfigError, match=r"^Blk: drive='d0' is not allowed: a BlockBackend"):
        Blk("d0")  # type: ignore[arg-type]
    Blk(Memory(512), num_queues=2)


NOT_COMPLETED = r"chains that Careless.requestq took and did not complete: 1; each needs its complete\(\)"


class Careless(Device, id=63):
    """Does what `careless` does with the chains it takes."""

    def __init__(self, careless: Callable[[Chain], object]) -> None:
        self.careless = careless

    @queue(size=8)
    def requestq(self, vq: VirtQueue) -> None:
        for chain in vq:
            self.careless(chain)


def test_a_handler_that_raises(guest: Guest, caplog: pytest.LogCaptureFixture) -> None:
    def fail(chain: Chain) -> None:
        raise KeyError("no such thing")

    driver = guest.plug(Careless(fail))
    driver.requestq.add(b"x")
    driver.requestq.kick()
    assert driver.wait_needs_reset() == "requestq: Careless.requestq raised KeyError: 'no such thing'"
    assert "careless0: requestq: exception in Careless.requestq" in caplog.text


def test_a_handler_that_forgets_to_complete(guest: Guest) -> None:
    driver = guest.plug(Careless(lambda chain: None))
    buffer = driver.requestq.add(b"x")
    driver.requestq.kick()
    reason = driver.wait_needs_reset()
    assert reason == (
        f"requestq: Careless.requestq dropped chain {buffer.head} without complete(); each has to be completed"
    )


@pytest.mark.guest(transport=("modern", "vhost-user"))
def test_a_handler_that_never_completes(guest: Guest) -> None:
    kept: list[Chain] = []
    driver = guest.plug(Careless(kept.append))
    buffer = driver.requestq.add(b"x")
    driver.requestq.kick()
    with pytest.raises(TimeoutError, match=NOT_COMPLETED):
        buffer.wait(timeout=0.05)
    assert re.search(rf"careless0.requestq: {NOT_COMPLETED}", describe(guest))
    kept.clear()
    assert "Careless.requestq dropped chain" in driver.wait_needs_reset()


def test_a_chain_that_is_completed_twice(guest: Guest, caplog: pytest.LogCaptureFixture) -> None:
    def twice(chain: Chain) -> None:
        chain.complete()
        chain.complete()

    driver = guest.plug(Careless(twice))
    driver.requestq.add(b"x")
    driver.requestq.kick()
    assert driver.wait_needs_reset() == (
        "requestq: Careless.requestq raised RuntimeError: careless0: requestq: chain 0 of Careless.requestq: "
        "it is completed already; complete() gives a chain back once"
    )


def test_a_chain_that_is_touched_after_a_reset(guest: Guest) -> None:
    kept: Queue[Chain] = Queue()
    driver = guest.plug(Careless(kept.put))
    driver.requestq.add(b"x")
    driver.requestq.kick()
    chain = kept.get(timeout=HANG)
    driver.reset()
    with pytest.raises(StaleChain) as caught:
        chain.complete()
    assert str(caught.value) == (
        "careless0: requestq: chain 0 of Careless.requestq: it was taken before the last reset of its device; "
        "nobody waits for it, let it go"
    )


@pytest.mark.guest(transport=("modern", "vhost-user"))
def test_a_device_that_cannot_be_activated(guest: Guest) -> None:
    class Rusty(Idle):
        """Has a defect."""

        def activate(self, features: int) -> None:
            raise KeyError("features")

    driver = guest.plug(Rusty(), start=False)
    with suppress(Refused):
        driver.start()
    driver.may_break = True
    assert driver.why_broken is not None
    assert re.fullmatch(r"Rusty.activate raised KeyError: 'features' \(test_device_errors.py:\d+\)", driver.why_broken)
