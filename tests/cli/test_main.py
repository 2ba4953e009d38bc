"""The command as a whole: it starts fast, and mistakes are one line and exit status 2."""

import subprocess
import sys

import pytest

from pyvirtio.cli import main as cli
from pyvirtio.errors import ConfigError


def pyvirtio(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pyvirtio", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_help_names_every_command() -> None:
    shown = pyvirtio("--help")
    assert shown.returncode == 0
    assert all(name in shown.stdout for name in cli.COMMANDS)


def test_version_is_shown() -> None:
    shown = pyvirtio("--version")
    assert (shown.returncode, shown.stdout.split()[0]) == (0, "pyvirtio")


@pytest.mark.parametrize("arguments", [[], ["no-such-command"], ["--no-such-option"]])
def test_a_wrong_command_line_is_one_line_and_status_2(arguments: list[str]) -> None:
    shown = pyvirtio(*arguments)
    assert shown.returncode == 2
    assert len(shown.stderr.splitlines()) == 1
    assert shown.stderr.startswith("pyvirtio: ")


def test_help_imports_no_command_and_no_rich() -> None:
    code = (
        "import sys; from pyvirtio.cli.main import make_parser; make_parser('').format_help();"
        "print([m for m in sys.modules if m in ('rich', 'pyvirtio.cli.run', 'pyvirtio.devices')])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert shown.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("raised", "status"),
    [(ConfigError("blk0: too\nsmall"), 2), (KeyboardInterrupt(), 130)],
    ids=["config", "ctrl-c"],
)
def test_the_exit_status_tells_who_ended_it(
    raised: BaseException, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(_: list[str]) -> int:
        raise raised

    monkeypatch.setattr(cli, "_run", run)
    assert cli.main(["run"]) == status
    assert capsys.readouterr().err == ("pyvirtio: blk0: too small\n" if status == 2 else "")
