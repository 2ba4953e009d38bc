"""What docs/devices.md shows works, on every transport that a test has."""

import os
import re
from pathlib import Path

import pytest

from pyvirtio import Device
from pyvirtio.cli.devices import device_class
from pyvirtio.cli.main import main
from pyvirtio.testing import Guest

PAGE = (Path(__file__).parent.parent / "docs" / "devices.md").read_text()


@pytest.fixture
def thermometer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type[Device]:
    (source,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    Path("thermometer.py").write_text(source)
    return device_class("thermometer.py:Thermometer")


def test_it_measures_answers_and_alarms(guest: Guest, thermometer: type[Device]) -> None:
    device = thermometer(unit="C")
    driver = guest.plug(device)
    driver.requestq.wait_until(lambda: driver.config.millikelvin == 293_150, "it has measured")
    os.eventfd_write(device.alarm, 2)  # type: ignore[attr-defined]
    driver.requestq.wait_until(lambda: driver.config.alarms == 2, "the alarms are counted")
    buffer = driver.requestq.add(b"\x01\x00", 16)
    driver.requestq.kick()
    assert buffer.wait() == b"20000 "


def test_its_help_names_its_options(thermometer: type[Device], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--device", "thermometer.py:Thermometer,help"]) == 0
    assert re.search(r"unit +K/C +K +unit of the answers", capsys.readouterr().out)


def test_the_page_names_what_a_chain_has() -> None:
    from pyvirtio import Chain

    public = {name for name in vars(Chain) if not name.startswith("_")}
    assert {name for name in public if f"`{name}" in PAGE} == public
