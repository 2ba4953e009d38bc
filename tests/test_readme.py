"""What the README shows works: its device, its command line, and what `help` says of it."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from bzimage import write_bzimage

from pyvirtio.cli.devices import device_class
from pyvirtio.cli.main import main
from pyvirtio.errors import ConfigError
from pyvirtio.properties import bind
from pyvirtio.testing import Guest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files that the README speaks of, in the current directory."""
    (device,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    Path("dice.py").write_text(device)
    (test,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "testing.md").read_text(), re.DOTALL)
    Path("test_dice.py").write_text(test)
    Path("disk.img").write_bytes(bytes(1 << 20))
    Path("initrd.img").write_bytes(b"070701")
    write_bzimage(Path("vmlinuz"))


def test_the_device_throws_its_dice(guest: Guest) -> None:
    driver = guest.plug(device_class("dice.py:Dice")(sides=3))
    buffer = driver.requestq.add(writable=200)
    driver.requestq.kick()
    assert set(buffer.wait()) == {1, 2, 3}


def test_its_options_are_its_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--device", "dice.py:Dice,help"]) == 0
    assert re.search(r"sides +integer +6 +sides of the die", capsys.readouterr().out)
    with pytest.raises(ConfigError, match="dice0: sides=1 is not allowed: an integer, 2 to 255"):
        bind(device_class("dice.py:Dice"), {"sides": "1"}, "dice0")


def test_the_command_builds_the_machine(capsys: pytest.CaptureFixture[str]) -> None:
    (command,) = re.findall(r"^    pyvirtio (run (?:.*\\\n)*.*)$", README, re.MULTILINE)
    assert main([*shlex.split(command.replace("\\\n", " ")), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"blk0 .*Blk.*disk.img", shown)
    assert re.search(r"dice0 .*Dice", shown)


def test_its_tests_pass() -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "test_dice.py"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert "4 passed" in shown.stdout
