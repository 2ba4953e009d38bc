"""The names of `--device`, and a user's own classes."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from pyvirtio.cli.devices import NAMES, device_class, device_properties, print_device, print_devices
from pyvirtio.devices.blk import Blk
from pyvirtio.errors import ConfigError
from pyvirtio.properties import properties_of

ROOT = Path(__file__).parent.parent.parent


def error_of(name: str) -> str:
    with pytest.raises(ConfigError) as caught:
        device_class(name)
    return str(caught.value)


def test_a_device_is_found_by_its_name() -> None:
    assert device_class("virtio-blk-pci") is Blk


def test_an_unknown_name_lists_the_known_ones() -> None:
    assert error_of("virtio-blk") == (
        "--device: unknown device 'virtio-blk', did you mean virtio-blk-pci? "
        f"(known: {', '.join(NAMES)}, FILE.py:CLASS)"
    )


def test_a_class_comes_from_a_module() -> None:
    assert device_class("pyvirtio.devices.blk:Blk") is Blk


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.py:Dice", "^none.py: No such file"),
        ("no_such_module:Dice", "no_such_module: No module named 'no_such_module'"),
        ("pyvirtio.devices.blk:BlkConfig", r"unknown device class 'BlkConfig'.* \(known: Blk\)"),
        ("pyvirtio.devices.blk:", r"unknown device class '' \(known: Blk\)"),
        (":Dice", "--device: unknown device ':Dice'"),
    ],
)
def test_what_cannot_be_loaded_is_one_line(name: str, message: str) -> None:
    assert re.search(message, error_of(name))


@pytest.mark.parametrize("source", ["1 / 0", "def (", "raise SystemExit(3)"])
def test_a_file_that_fails_is_one_line(source: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text(source)
    assert error_of(f"{path}:Dice").startswith(f"{path}: ")


def test_a_device_takes_its_own_properties_and_those_of_its_transport() -> None:
    names = [p.name for p in device_properties("virtio-blk-pci")]
    assert names[:2] == ["drive", "num-queues"]
    assert {"ioeventfd", "iothread", "vectors", "disable-legacy"} <= set(names)
    assert not {"name", "accel", "device"} & set(names)


def test_every_property_of_our_own_devices_has_a_meaning() -> None:
    assert [p.name for p in device_properties("virtio-blk-pci") if not p.meaning] == []


def test_help_shows_devices_and_their_properties(capsys: pytest.CaptureFixture[str]) -> None:
    print_devices()
    print_device("virtio-blk-pci")
    shown = capsys.readouterr().out
    assert "required" in shown
    assert "virtio-rng-pci" in shown
    assert all(p.name in shown for p in properties_of(Blk))


def test_the_page_of_options_is_fresh() -> None:
    subprocess.run([sys.executable, ROOT / "tools" / "options.py", "--check"], check=True, timeout=60)
