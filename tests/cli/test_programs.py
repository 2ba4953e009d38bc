"""How others find and start the programs: QEMU's discovery files, systemd's units, entry points."""

import json
import subprocess
import sys
import tomllib
from configparser import ConfigParser
from pathlib import Path

import pytest

from pyvirtio.cli.devices import device_class
from pyvirtio.cli.front_ends import TYPES, capabilities
from pyvirtio.cli.main import make_parser
from pyvirtio.devices import DEVICES, load

ROOT = Path(__file__).parents[2]
DATA = ROOT / "packaging" / "data"
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
PREFIX = "vhost-user-pyvirtio-"
KNOWN = [name for name in DEVICES if load(name).id in TYPES]


@pytest.mark.parametrize("name", KNOWN)
def test_each_device_that_qemu_has_a_name_for_is_a_program_that_is_found(name: str) -> None:
    assert SCRIPTS[PREFIX + name] == f"pyvirtio.cli.programs:{name}"
    file = json.loads((DATA / f"share/qemu/vhost-user/50-pyvirtio-{name}.json").read_text())
    assert file["binary"] == f"/usr/bin/{PREFIX}{name}"
    assert file["type"] == capabilities(device_class(name, {name: name}))["type"]


def test_a_program_takes_the_options_of_the_command() -> None:
    script = Path(sys.executable).with_name(PREFIX + "blk")
    shown = subprocess.run([script, "--print-capabilities"], capture_output=True, check=True, timeout=60).stdout
    assert json.loads(shown)["type"] == "block"


def test_the_unit_starts_a_program_with_options_that_it_has() -> None:
    unit = ConfigParser(interpolation=None)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read(DATA / f"lib/systemd/system/{PREFIX}blk@.service")
    binary, *options = unit["Service"]["ExecStart"].split()
    name = binary.removeprefix(f"/usr/bin/{PREFIX}")
    assert name in DEVICES
    args = make_parser("serve").parse_args(["serve", name, *options])
    assert args.blk_file == "/var/lib/pyvirtio/%i.img"
    socket = DATA / "lib/systemd/system" / unit["Unit"]["Requires"].replace("%i", "")
    assert "ListenStream=/run/pyvirtio/%i.sock" in socket.read_text()
