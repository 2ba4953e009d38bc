"""Classes of installed packages, by their entry points."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from pyvirtio.cli.classes import Catalogue
from pyvirtio.cli.devices import device_class, print_devices
from pyvirtio.cli.drives import CATALOGUE
from pyvirtio.errors import ConfigError

SENSOR = '''
from pyvirtio import BlockBackend, Device, VirtQueue, queue

class Sensor(Device, id=63):
    """Tells the temperature."""

    @queue(size=8)
    def requestq(self, vq: VirtQueue) -> None: ...

class Tape(BlockBackend):
    """A slow disk."""

    capacity = 512

    def pread(self, length: int, offset: int) -> bytes:
        return bytes(length)
'''

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Puts a package on the path that has entry points and, maybe, a module."""

    def package(name: str, points: str, source: str | None = SENSOR) -> None:
        info = tmp_path / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(points)
        if source is not None:
            (tmp_path / f"{name}_module.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)

    return package


def error_of(find: Callable[[str], type], name: str) -> str:
    with pytest.raises(ConfigError) as caught:
        find(name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_devices_and_backends_of_a_package_are_found_by_name(
    install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    points = "[pyvirtio.devices]\nsensor = one_module:Sensor\n[pyvirtio.backends]\ntape = one_module:Tape\n"
    install("one", points)
    assert device_class("sensor").__name__ == "Sensor"
    assert CATALOGUE.find("tape").__name__ == "Tape"
    assert "virtio-blk-pci" in error_of(device_class, "sensors")
    assert "did you mean sensor?" in error_of(device_class, "sensors")
    print_devices()
    assert re.search("sensor +Tells the temperature.", capsys.readouterr().out)


def test_a_name_that_two_packages_offer_is_refused(install: Install) -> None:
    for name in ("left", "right"):
        install(name, f"[pyvirtio.devices]\nsensor = {name}_module:Sensor\n")
    message = "--device: sensor is offered by left 1.0 and by right 1.0; uninstall one"
    assert error_of(device_class, "sensor") == message


def test_our_own_names_come_first(install: Install) -> None:
    install("rude", "[pyvirtio.devices]\nvirtio-blk-pci = rude_module:Sensor\n")
    assert device_class("virtio-blk-pci").__name__ == "Blk"


@pytest.mark.parametrize(
    ("value", "source", "message"),
    [
        ("gone_module:Sensor", None, "sensor of bad 1.0: ModuleNotFoundError: No module named 'gone_module'"),
        ("bad_module:Sensor", "1 / 0", "sensor of bad 1.0: ZeroDivisionError: division by zero"),
        ("bad_module:Nothing", SENSOR, "sensor of bad 1.0: AttributeError: module 'bad_module' has no"),
        ("bad_module:Tape", SENSOR, "sensor of bad 1.0: bad_module:Tape is no Device"),
    ],
)
def test_what_cannot_be_loaded_is_one_line(
    install: Install, monkeypatch: pytest.MonkeyPatch, value: str, source: str | None, message: str
) -> None:
    monkeypatch.delitem(__import__("sys").modules, "bad_module", raising=False)
    install("bad", f"[pyvirtio.devices]\nsensor = {value}\n", source)
    assert error_of(device_class, "sensor").startswith(message)
    assert (("sensor", error_of(device_class, "sensor"))) in list(_devices().rows())


def _devices() -> Catalogue:
    from pyvirtio.cli.devices import catalogue

    return catalogue()
