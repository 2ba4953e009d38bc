"""The command lines at the head of the examples build what they say."""

import json
import re
import shlex
from pathlib import Path

import pytest
from bzimage import write_bzimage

from pyvirtio.cli.main import main

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
BUILT = {
    "lying_disk": ("LyingDisk", "disk.img (1M)"),
    "recorder": ("Blk", "Recorder (1M)"),
    "thermometer": ("Thermometer", None),
    "website": ("Net", "website"),
}
"""The type of the device, and what is behind it."""


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the commands name, in the current directory."""
    monkeypatch.chdir(tmp_path)
    Path("disk.img").write_bytes(bytes(1 << 20))
    Path("temp").write_text("21500\n")
    write_bzimage(Path("vmlinuz"))


def command(name: str) -> list[str]:
    """The words after `pyvirtio run`, with the example where it is, and a file for what not every host has."""
    text = (EXAMPLES / f"{name}.py").read_text()
    (line,) = re.findall(r"^    pyvirtio run \.\.\. (.*)$", text, re.MULTILINE)
    line = line.replace("examples/", f"{EXAMPLES}/").replace("/sys/class/thermal/thermal_zone0/temp", "temp")
    return ["run", "--kernel", "vmlinuz", "--dry-run", "--json", *shlex.split(line)]


@pytest.mark.parametrize("name", BUILT)
def test_the_command_builds_the_machine(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(name)) == 0
    (device,) = json.loads(capsys.readouterr().out)["devices"]
    assert (device["type"], device["backend"]) == BUILT[name]


def test_every_example_is_in_the_index_and_has_a_command() -> None:
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    assert names == {*BUILT, "http_disk"}
    assert names == set(re.findall(r"\]\((\w+)\.py\)", (EXAMPLES / "README.md").read_text()))
    assert all(command(name) for name in names)
