"""Properties come from the signature of a class, and a wrong value is one line that says what is allowed."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import pytest

from pyvirtio.errors import ConfigError
from pyvirtio.properties import Range, Size, bind, bind_each, parse_size, properties_of, show_size


class Shelf:
    """Something that an option refers to by its id."""

    named_by = "a --shelf"


class Lamp:
    """A class with a property of every type."""

    def __init__(
        self,
        shelf: Annotated[Shelf, "where it stands"],
        bulbs: Annotated[int, "how many bulbs", Range(1, 8)] = 2,
        memory: Annotated[Size, "what it remembers", Range(512, 1 << 20)] = 64 << 10,
        watts: Annotated[float | None, "power"] = None,
        dimmed: Annotated[bool, "half as bright"] = False,
        colour: Literal["red", "blue"] = "red",
        manual: Path | None = None,
        room_name: str = "hall",
        flicker: Callable[[], float] = float,
    ) -> None: ...


SHELF = Shelf()
SHELVES: dict[type, dict[str, object]] = {Shelf: {"s0": SHELF}}


def lamp(**values: str) -> dict[str, object]:
    return bind(Lamp, {"shelf": "s0", **values}, who="lamp0", references=SHELVES)


def error_of(**values: str) -> str:
    with pytest.raises(ConfigError) as caught:
        lamp(**values)
    return str(caught.value)


def test_every_settable_parameter_is_a_property_in_order() -> None:
    names = [p.name for p in properties_of(Lamp)]
    assert names == ["shelf", "bulbs", "memory", "watts", "dimmed", "colour", "manual", "room-name"]


def test_parameters_that_the_caller_gives_are_no_properties() -> None:
    assert "shelf" not in [p.name for p in properties_of(Lamp, given=["shelf"])]


def test_a_property_knows_its_type_default_and_meaning() -> None:
    shown = {p.name: (p.type, p.default_text, p.meaning) for p in properties_of(Lamp)}
    assert shown["shelf"] == ("id", "required", "where it stands")
    assert shown["memory"] == ("size", "64k", "what it remembers")
    assert shown["watts"] == ("number", "-", "power")
    assert shown["dimmed"] == ("on/off", "off", "half as bright")
    assert shown["manual"] == ("path", "-", "")
    assert shown["colour"] == ("red/blue", "red", "")


def test_values_become_python_objects() -> None:
    assert lamp(bulbs="0x4", memory="1k", watts="7.5", dimmed="on", colour="blue", manual="a/b", room_name="") == {
        "shelf": SHELF,
        "bulbs": 4,
        "memory": 1024,
        "watts": 7.5,
        "dimmed": True,
        "colour": "blue",
        "manual": Path("a/b"),
        "room_name": "",
    }


def test_what_is_not_given_is_left_to_the_signature() -> None:
    assert lamp() == {"shelf": SHELF}


@pytest.mark.parametrize("key", ["room-name", "room_name"])
def test_dash_and_underscore_are_alike(key: str) -> None:
    assert lamp(**{key: "x"})["room_name"] == "x"


@pytest.mark.parametrize(
    ("text", "value"), [("yes", True), ("true", True), ("off", False), ("no", False), ("false", False)]
)
def test_bool_takes_qemus_words(text: str, value: bool) -> None:
    assert lamp(dimmed=text)["dimmed"] is value


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bulbs": "9"}, "lamp0: bulbs=9 is not allowed: an integer, 1 to 8"),
        ({"bulbs": "1_0"}, "lamp0: bulbs=1_0 is not allowed: an integer, 1 to 8"),
        ({"bulbs": ""}, "lamp0: bulbs= is not allowed: an integer, 1 to 8"),
        ({"memory": "2G"}, "lamp0: memory=2G is not allowed: a size such as 512 or 64k, 512 to 1M"),
        ({"memory": "-1"}, "lamp0: memory=-1 is not allowed: a size such as 512 or 64k, 512 to 1M"),
        ({"watts": "nan"}, "lamp0: watts=nan is not allowed: a number"),
        ({"dimmed": "On"}, "lamp0: dimmed=On is not allowed: on or off"),
        ({"colour": "green"}, "lamp0: colour=green is not allowed: red or blue"),
        ({"manual": ""}, "lamp0: manual= is not allowed: the path of a file"),
        ({"shelf": "s9"}, "lamp0: shelf=s9 is not the id of a --shelf (there are: s0)"),
    ],
)
def test_a_bad_value_is_named_with_what_is_allowed(values: dict[str, str], message: str) -> None:
    assert error_of(**values) == message


def test_an_unknown_key_lists_the_known_ones_and_the_likely_one() -> None:
    message = error_of(bulb="1")
    assert message.startswith("lamp0: unknown property 'bulb', did you mean bulbs? (known: shelf, bulbs, memory,")


def test_a_parameter_that_is_no_property_is_unknown() -> None:
    assert "unknown property 'flicker'" in error_of(flicker="1")


def test_a_missing_value_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^lamp0: shelf is required: the id of a --shelf$"):
        bind(Lamp, {}, who="lamp0")


def test_two_classes_share_one_set_of_options() -> None:
    class Socket:
        def __init__(self, volts: int = 230) -> None: ...

    options = {"shelf": "s0", "volts": "110"}
    assert bind_each([Lamp, Socket], options, "lamp0", SHELVES) == [{"shelf": SHELF}, {"volts": 110}]


def test_a_class_without_init_has_no_properties() -> None:
    assert properties_of(Shelf) == []


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("512", 512), ("64k", 65536), ("64K", 65536), ("1.5G", 3 << 29), ("2T", 2 << 40)],
)
def test_sizes_have_binary_suffixes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "k", "1kk", "-1", "1.5", "0.3k", "1e3", "1 k", "٣", "9" * 5000])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - the caller words the message
        parse_size(text)


def test_a_number_without_suffix_takes_the_given_unit() -> None:
    assert parse_size("512", unit="M") == 512 << 20


@pytest.mark.parametrize(("size", "text"), [(0, "0"), (512, "512"), (1024, "1k"), (3 << 29, "1536M"), (1 << 40, "1T")])
def test_sizes_are_shown_as_they_are_written(size: int, text: str) -> None:
    assert show_size(size) == text
    assert parse_size(text) == size
