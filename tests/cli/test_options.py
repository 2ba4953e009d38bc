"""One parser for QEMU's option strings."""

import pytest

from pyvirtio.cli.options import parse, print_properties, take, take_id, wants_help
from pyvirtio.errors import ConfigError
from pyvirtio.properties import properties_of


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("virtio-blk-pci", {"driver": "virtio-blk-pci"}),
        ("virtio-blk-pci,drive=d0,share_rw", {"driver": "virtio-blk-pci", "drive": "d0", "share-rw": "on"}),
        ("driver=x,drive=d0", {"driver": "x", "drive": "d0"}),
        ("file=a,,b.img", {"file": "a,b.img"}),
        ("file=,,,,,x=1", {"file": ",,", "x": "1"}),
        ("file=a=b", {"file": "a=b"}),
        ("file=", {"file": ""}),
    ],
)
def test_keys_values_and_the_implied_first_key(text: str, options: dict[str, str]) -> None:
    assert parse(text, implied="driver") == options


def test_without_an_implied_key_the_first_bare_key_is_on() -> None:
    assert parse("readonly,id=d0") == {"readonly": "on", "id": "d0"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "an empty option"),
        ("a=1,", "empty key"),
        ("=1", "empty key"),
        ("num-queues=1,num_queues=2", "num-queues is given twice"),
    ],
)
def test_what_cannot_be_understood_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(text)


def test_an_id_is_new_and_can_be_spoken_of() -> None:
    assert take_id({"id": "d0"}, {}, "--drive") == "d0"
    assert take_id({}, {}, "--device", otherwise="blk0") == "blk0"
    with pytest.raises(ConfigError, match="id=d0 is already in use"):
        take_id({"id": "d0"}, {"d0": 1}, "--drive")
    with pytest.raises(ConfigError, match="id=a b is not allowed"):
        take_id({"id": "a b"}, {}, "--drive")
    with pytest.raises(ConfigError, match="id= is required"):
        take_id({}, {}, "--drive")


def test_a_required_key_is_taken_or_missed_by_name() -> None:
    options = {"file": "x"}
    assert take(options, "file", "--drive") == "x"
    with pytest.raises(ConfigError, match="--drive: file= is required"):
        take(options, "file", "--drive")


@pytest.mark.parametrize(("text", "wanted"), [("help", True), ("?", True), ("x,help", True), ("x,drive=help", False)])
def test_help_is_recognised(text: str, wanted: bool) -> None:
    assert wants_help(parse(text, implied="driver")) is wanted


def test_the_table_shows_name_type_default_and_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    class Lamp:
        def __init__(self, bulbs: int = 2) -> None: ...

    print_properties("lamp", properties_of(Lamp))
    row = capsys.readouterr().out.splitlines()[-2].split()
    assert row[:3] == ["bulbs", "integer", "2"]
