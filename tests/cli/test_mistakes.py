"""What somebody reads who makes a mistake in a device of their own: one line that names class, method and rule."""

import subprocess
import sys
from pathlib import Path

import pytest

from pyvirtio.cli.main import main

HEAD = """\
from ctypes import LittleEndianStructure, c_uint8
from typing import Annotated
from pyvirtio import Device, every, poll, queue
from pyvirtio.properties import Range

"""
QUEUE = """
    @queue()
    def requestq(self, vq): ...
"""
A_TIME = "a number of seconds above 0, or the name of the attribute that holds it"

MISTAKES = {
    "no queue": ("class Mine(Device, id=4): ...", "Mine has no queue; declare each with @queue() on the method that"),
    "no type": (f"class Mine(Device):{QUEUE}", "Mine has the device type 0; write class Mine(Device, id=1 to 63)"),
    "raises": (
        f"class Mine(Device, id=4):\n    def __init__(self):\n        self.table = {{}}['x']{QUEUE}",
        "mine0: Mine.__init__ raised KeyError: 'x' (mine.py:8)",
    ),
    "raises further down": (
        f"def look():\n    open('/none')\n\nclass Mine(Device, id=4):\n    def __init__(self): look(){QUEUE}",
        "mine0: Mine.__init__ raised FileNotFoundError: [Errno 2] No such file or directory: '/none' (mine.py:7)",
    ),
    "an argument that no option can give": (
        f"class Mine(Device, id=4):\n    def __init__(self, source): ...{QUEUE}",
        "mine0: TypeError: Mine.__init__() missing 1 required positional argument: 'source'",
    ),
    "fails while it is read": (
        "class Mine(Device, id=4):\n    table = {}['x']",
        "mine.py: KeyError: 'x' (mine.py:7)",
    ),
    "a name that is not there": (
        "class Mine(Device, id=4):\n    size = SIZE",
        "mine.py: NameError: name 'SIZE' is not defined (mine.py:7)",
    ),
    "@every(0)": (
        f"class Mine(Device, id=4):{QUEUE}\n    @every(0)\n    def tick(self): ...",
        f"Mine.tick: @every(0): write {A_TIME}",
    ),
    "@every('1s')": (
        f"class Mine(Device, id=4):{QUEUE}\n    @every('1s')\n    def tick(self): ...",
        f"Mine.tick: @every('1s'): write {A_TIME}",
    ),
    "@poll of an attribute that is not there": (
        f"class Mine(Device, id=4):{QUEUE}\n    @poll('sensor')\n    def heard(self): ...",
        "Mine.heard: @poll('sensor') names an attribute that is not there; set it in __init__",
    ),
    "@every of an attribute that is no time": (
        f"class Mine(Device, id=4):\n    pace = 'fast'{QUEUE}\n    @every('pace')\n    def tick(self): ...",
        "Mine.tick: @every('pace') is 'fast'; it has to be a number of seconds above 0",
    ),
    "a layout with padding": (
        "class Layout(LittleEndianStructure):\n    _fields_ = (('a', c_uint8), ('b', __import__('ctypes').c_uint32))\n"
        f"class Mine(Device, id=4, config=Layout):{QUEUE}",
        "Mine: config=Layout: set _pack_ = 1, there is no padding in virtio",
    ),
    "bytes that are not the layout": (
        "class Layout(LittleEndianStructure):\n    _pack_ = 1\n    _fields_ = (('a', c_uint8),)\n"
        f"class Mine(Device, id=4, config=Layout):{QUEUE}\n    def config_bytes(self): return b'abc'",
        "mine0: Mine.config_bytes() returns 3 bytes, its layout Layout has 1",
    ),
}
"""A file of a user, and what is said of it."""


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that the command ends with."""
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_before_anything_runs(mistake: str, capsys: pytest.CaptureFixture[str]) -> None:
    source, message = MISTAKES[mistake]
    Path("mine.py").write_text(HEAD + source + "\n")
    Path("firmware").write_bytes(bytes(64 << 10))
    assert message in said(capsys, "run", "--firmware", "firmware", "--dry-run", "--device", "mine.py:Mine")
    assert message in said(capsys, "serve", "mine.py:Mine", "--socket-path", "s", "--print-qemu-args")
    assert not Path("s").exists()


@pytest.mark.parametrize("mistake", ["@every(0)", "@every('1s')", "a layout with padding", "fails while it is read"])
def test_what_is_wrong_with_a_class_is_said_instead_of_its_help(
    mistake: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source, message = MISTAKES[mistake]
    Path("mine.py").write_text(HEAD + source + "\n")
    assert message in said(capsys, "serve", "mine.py:Mine,help")


SPEED = f"class Mine(Device, id=4):\n    def __init__(self, speed: Annotated[int, 'rpm', Range(1, 9)] = 1): ...{QUEUE}"


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("speed=fast", "mine0: speed=fast is not allowed: an integer, 1 to 9"),
        ("speed=10", "mine0: speed=10 is not allowed: an integer, 1 to 9"),
        ("sped=1", "mine0: unknown property 'sped', did you mean speed?"),
    ],
)
def test_a_property_of_the_wrong_type(option: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.py").write_text(HEAD + SPEED)
    assert message in said(capsys, "serve", f"mine.py:Mine,{option}", "--socket-path", "s", "--print-qemu-args")


def test_two_devices_of_one_id(capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.py").write_text(HEAD + SPEED)
    twice = ["--device", "mine.py:Mine,id=a,socket-path=s", "--device", "mine.py:Mine,id=a,socket-path=t"]
    assert "mine.py:Mine: id=a is already in use" in said(capsys, "serve", *twice, "--print-qemu-args")


def test_the_development_mode_shows_where_it_came_from() -> None:
    Path("mine.py").write_text(HEAD + MISTAKES["raises further down"][0])
    command = [sys.executable, "-X", "dev", "-m", "pyvirtio", "serve", "mine.py:Mine", "--socket-path", "s"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 2
    calls, _, line = ended.stderr.rpartition("pyvirtio: mine0: Mine.__init__ raised FileNotFoundError")
    assert line
    assert calls.index("in __init__") < calls.index("in look")
