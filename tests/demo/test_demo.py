"""The command around the measurement."""

import hashlib
from pathlib import Path

import pytest

from pyvirtio.cli.demo import EventLines, make_disk
from pyvirtio.cli.main import main


def test_the_disk_is_what_its_checksum_says(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    sha256 = make_disk(image, 3 << 20)
    data = image.read_bytes()
    assert len(data) == 3 << 20
    assert hashlib.sha256(data).hexdigest() == sha256
    assert make_disk(image, 3 << 20) != sha256


def test_events_come_out_of_the_lines_and_the_rest_goes_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    events: list[tuple[str, dict[str, object]]] = []
    lines = EventLines(lambda name, **figures: events.append((name, figures)))
    for piece in (b'{"event": "boot", "ker', b'nel": "6.1"}\nTraceb', b'ack\n{"event": "x"}\n'):
        lines.feed(piece)
    assert events == [("boot", {"kernel": "6.1"}), ("x", {})]
    assert capsys.readouterr().err == "Traceback\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "0"], "demo: --rounds 0 is not allowed: 1 to 100"),
        (["--seconds", "0"], "demo: --seconds 0 is not allowed: 0.1 to 60"),
        (["--size", "1M"], "demo: --size 1M is not allowed: whole MiB from 64M to 1G"),
        (["--size", "big"], "demo: --size big is not allowed: whole MiB from 64M to 1G"),
        (["--json", "/no/such/file"], "demo: /no/such/file cannot be written: no such directory, or one itself"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", *arguments]) == 2
    assert capsys.readouterr().err == f"pyvirtio: {message}\n"


def test_a_plot_needs_matplotlib(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["demo", "--plot", "plot.svg"]) == 2
    assert capsys.readouterr().err == "pyvirtio: demo: --plot needs matplotlib: pip install 'pyvirtio[plot]'\n"
