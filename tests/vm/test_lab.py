"""The lab: a real start for each test, because what it must not do is leave a part of itself behind."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyvirtio.lab import Lab

HANG_GUARD = 120

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="the lab needs root")


def descendants(pid: int) -> set[int]:
    """The processes that a process started, and that theirs started."""
    children = {
        int(child) for task in Path(f"/proc/{pid}/task").glob("*/children") for child in task.read_text().split()
    }
    return children.union(*map(descendants, children))


@pytest.fixture
def no_remains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory for temporary files; checks that no file and no process is left when the test ends."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr("tempfile.tempdir", None)
    yield temporary
    assert list(temporary.iterdir()) == []
    assert descendants(os.getpid()) == set()


def start(*arguments: str) -> subprocess.Popen[bytes]:
    """`pyvirtio lab` with these arguments."""
    command = [sys.executable, "-m", "pyvirtio", "lab", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def test_a_command_runs_as_it_would_here(no_remains: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, lost = tmp_path / "kept and quoted", tmp_path / "lost"
    kept.mkdir()
    lost.mkdir()
    monkeypatch.setenv("PYVIRTIO_TEST", 'it\'s "quoted"\n')
    monkeypatch.chdir(tmp_path)
    script = """
        grep -qw svm /proc/cpuinfo && test -c /dev/kvm && test ! -e /sys/module/kvm_pvm && echo hardware KVM
        pwd; echo "$PYVIRTIO_TEST"; cat; echo to stderr >&2
        echo lost >lost/file && cat lost/file; echo kept >'kept and quoted/file'
        head -c 3000000 /dev/zero
        exit 7
    """
    output: list[bytes] = []
    status = Lab(timeout=HANG_GUARD, keep=[kept]).run(["sh", "-c", script], output.append)

    text, zeroes = b"".join(output)[:-3000000], b"".join(output)[-3000000:]
    assert text.decode() == f'hardware KVM\n{tmp_path}\nit\'s "quoted"\n\nto stderr\nlost\n'
    assert zeroes == bytes(3000000)
    assert status == 7
    assert (kept / "file").read_text() == "kept\n"
    assert list(lost.iterdir()) == []


def test_output_comes_while_the_command_runs_and_sigterm_ends_everything(no_remains: Path) -> None:
    with start("--timeout", str(HANG_GUARD), "--", "sh", "-c", "echo ready; sleep 1000") as lab:
        assert lab.stdout is not None
        assert lab.stdout.readline() == b"ready\n"
        started = descendants(lab.pid)
        assert len(started) == 2  # QEMU and virtiofsd
        lab.send_signal(signal.SIGTERM)
        assert lab.wait(HANG_GUARD) == 128 + signal.SIGTERM
        assert not any(Path(f"/proc/{pid}").exists() for pid in started)


def test_a_command_that_takes_too_long_is_ended(no_remains: Path) -> None:
    with start("--timeout", "1", "--", "true") as lab:  # the machine alone takes longer to start
        output, _ = lab.communicate(timeout=HANG_GUARD)
    assert lab.returncode == 124
    assert output == b"lab: timed out after 1 s\n"


def test_a_machine_that_dies_says_so(no_remains: Path) -> None:
    output: list[bytes] = []
    assert Lab(timeout=HANG_GUARD).run(["sh", "-c", "echo o >/proc/sysrq-trigger; sleep 100"], output.append) == 125
    assert b"the machine ended by itself" in b"".join(output)
