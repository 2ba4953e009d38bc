"""Mistakes on the command line of `pyvirtio lab`: one line each, before anything starts."""

from pathlib import Path

import pytest

from pyvirtio.cli.main import main


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "lab: no command; write pyvirtio lab [options] -- COMMAND..."),
        (["--smp", "0", "true"], "lab: --smp 0 is not allowed: 1 to 64"),
        (["--mem", "4M", "true"], "lab: --mem 4M is not allowed: 512M or more, in whole MiB"),
        (["--mem", "much", "true"], "lab: --mem much is not allowed: a size such as 2048M"),
        (["--timeout", "0", "true"], "lab: --timeout 0 is not allowed: more than 0 seconds"),
        (["--keep", "/no/such", "true"], "lab: --keep /no/such: no such directory"),
        (["--kernel", "1.2", "true"], "kernel 1.2: no /boot/vmlinuz-1.2 with its modules in /lib/modules"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lab", *arguments]) == 2
    assert capsys.readouterr().err == f"pyvirtio: {message}\n"


def test_the_lab_needs_root(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert main(["lab", "true"]) == 2
    assert (
        capsys.readouterr().err
        == "pyvirtio: the lab needs root, because it shares all of this host's files: try sudo\n"
    )


def test_a_missing_program_names_its_package(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["lab", "true"]) == 2
    assert "install the package" in capsys.readouterr().err
