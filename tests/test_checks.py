"""The summary of `./test` counts what ran, and a skip cannot hide."""

import sys
from pathlib import Path

import checks
import pytest
from checks import Outcome, Step, conclude, count

PYTEST = """\
..s                                                                      [100%]
=========================== short test summary info ============================
SKIPPED [2] tests/kvm/test_x.py:3: no /dev/kvm
FAILED tests/kvm/test_y.py::test_y - assert 1 passed == 2
1 failed, 5 passed, 2 skipped in 0.01s
"""
NEXTEST = "     Summary [   0.041s] 5 tests run: 4 passed, 1 failed, 0 skipped\n"
CARGO = """\
test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s
test result: ok. 2 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s
"""


def counted(status: int, text: str) -> tuple[int, int, int]:
    outcome = Outcome("step")
    count(outcome, status, text)
    return outcome.passed, outcome.failed, outcome.skipped


@pytest.mark.parametrize(
    ("status", "text", "counts"),
    [
        (1, PYTEST, (5, 1, 2)),
        (100, NEXTEST, (4, 1, 0)),
        (0, CARGO, (5, 0, 1)),
        (0, "Success: no issues found in 63 source files\n", (1, 0, 0)),
        (1, "Found 1 error in 1 file\n", (0, 1, 0)),
        (5, "no tests ran in 0.01s\n", (0, 1, 0)),
        (-9, "12 passed in 0.1s\n", (12, 1, 0)),
    ],
    ids=["pytest", "nextest", "cargo", "a check", "a failed check", "no tests", "killed"],
)
def test_counts_come_from_the_summary_lines(status: int, text: str, counts: tuple[int, int, int]) -> None:
    assert counted(status, text) == counts


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Stands for `/dev/kvm`, which is there if a test makes it."""
    kvm = tmp_path / "kvm"
    monkeypatch.setattr(checks, "KVM", kvm)
    return kvm


def skips(reason: str) -> Outcome:
    return Outcome("tier B", passed=1, skipped=1, reasons=[reason])


@pytest.mark.parametrize(
    ("ci", "kvm", "reason", "status"),
    [
        (False, True, "mkfs.ext4 is not installed", 0),
        (True, True, "mkfs.ext4 is not installed", 1),
        (True, True, "no usable /dev/kvm", 1),
        (True, False, "no usable /dev/kvm", 0),
    ],
)
def test_a_skip_is_a_failure_in_ci_unless_there_is_no_kvm(
    ci: bool, kvm: bool, reason: str, status: int, host: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(checks, "CI", ci)
    if kvm:
        host.touch()
    assert conclude([skips(reason)]) == status
    shown = capsys.readouterr().out.splitlines()
    assert f"    skipped 1: {reason}" in shown
    assert shown[-1] == f"1 passed, {status} failed, 1 skipped"


def test_a_skip_without_a_reason_is_a_failure_in_ci(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "CI", True)
    assert conclude([Outcome("Rust tests", passed=1, skipped=1)]) == 1


def test_a_tool_that_is_missing_is_a_skip_with_its_reason() -> None:
    outcome = Step("clippy", missing="cargo-clippy is not installed").run()
    assert (outcome.skipped, outcome.reasons) == (1, ["cargo-clippy is not installed"])


def test_a_step_shows_its_output_and_keeps_it(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    outcome = Step("hello", [sys.executable, "-c", "print('7 passed in 0.1s')"]).run()
    assert outcome.passed == 7
    assert b"7 passed in 0.1s\n" in capfdbinary.readouterr().out


def test_a_step_that_runs_beside_others_is_shown_when_it_is_concluded(
    capfdbinary: pytest.CaptureFixture[bytes],
) -> None:
    step = Step("beside", [sys.executable, "-c", "print('3 passed, 1 failed in 0.1s'); raise SystemExit(1)"])
    run = step.start()
    Step("hello", [sys.executable, "-c", "print('hello')"]).run()
    assert b"failed" not in capfdbinary.readouterr().out
    assert (outcome := step.conclude(run)).passed == 3
    assert outcome.failed == 1
    assert b"3 passed, 1 failed" in capfdbinary.readouterr().out
