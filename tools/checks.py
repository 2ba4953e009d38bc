"""All checks of the project, fast ones first: each prints its name and time, and one line at the end counts all.

`fast` leaves out what boots guests or explores schedules; every other argument goes to pytest, which then is all
that runs. With CI=true a skipped test is a failure, unless it needs a `/dev/kvm` and there is none to be had.
"""

import atexit
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pyvirtio.accel.host import linux_capable

ROOT = Path(__file__).resolve().parent.parent
HANG_GUARD = 3000  # seconds that no step takes
KVM = Path("/dev/kvm")
# The hundreds of programs that the tests start need not compile all of ours anew.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
CI = os.environ.get("CI", "") == "true"
COUNTS = re.compile(r"\b(\d+) (passed|failed|errors?|skipped|ignored)\b")
SUMMARY = re.compile(r"^=* ?\d+ \w+.* in [\d.]+s|^test result:|^ *Summary \[|^no tests ran", re.MULTILINE)
SKIP = re.compile(r"^SKIPPED \[(\d+)\] \S+: (.*)$", re.MULTILINE)


@dataclass
class Outcome:
    """What one step counted. A step that counts nothing counts as one check."""

    name: str
    seconds: float = 0.0
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    reasons: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        counts = {"passed": self.passed, "failed": self.failed, "skipped": self.skipped}
        shown = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
        return f"{self.name:<34} {self.seconds:6.1f} s  {shown or 'nothing to do'}"


@dataclass
class Step:
    """A command, or the reason why it cannot run here."""

    name: str
    command: Sequence[str] = ()
    missing: str | None = None

    def start(self) -> "Run | None":
        return Run(self) if self.missing is None else None

    def conclude(self, run: "Run | None") -> Outcome:
        """Show what the run prints until it ends."""
        print(f"== {self.name}", flush=True)
        outcome = Outcome(self.name)
        if run is None:
            outcome.skipped, outcome.reasons = 1, [self.missing or ""]
        else:
            status, text = run.show()
            outcome.seconds = run.seconds
            count(outcome, status, text)
        print(f"== {outcome}\n", flush=True)
        return outcome

    def run(self) -> Outcome:
        return self.conclude(self.start())


class Run:
    """A step under way. What it prints goes to a file in memory, so that it need not be shown at once."""

    def __init__(self, step: Step) -> None:
        self.seconds = 0.0
        self._output = os.memfd_create("output")
        self._process = subprocess.Popen(
            step.command, cwd=ROOT, env=ENVIRONMENT, stdin=subprocess.DEVNULL,
            stdout=self._output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        atexit.register(self._kill)
        self._end = threading.Thread(target=self._wait, daemon=True)
        self._end.start()

    def _wait(self) -> None:
        start = time.monotonic()
        try:
            self._process.wait(HANG_GUARD)
        except subprocess.TimeoutExpired:
            self._kill()
        self.seconds = time.monotonic() - start

    def _kill(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)

    def show(self) -> tuple[int, str]:
        """Copy to our output as it comes, until the step ends; its exit status and all of its output."""
        shown = 0
        while True:
            ended = not self._end.is_alive()
            while piece := os.pread(self._output, 65536, shown):
                sys.stdout.buffer.write(piece)
                sys.stdout.buffer.flush()
                shown += len(piece)
            if ended:
                return self._process.wait(), os.pread(self._output, shown, 0).decode(errors="replace")
            self._end.join(0.1)


def count(outcome: Outcome, status: int, text: str) -> None:
    """Read the counts from the summary lines of pytest, cargo test or nextest."""
    for summary in SUMMARY.finditer(text):
        line = text[summary.start() :].partition("\n")[0]
        for number, what in COUNTS.findall(line):
            if what == "passed":
                outcome.passed += int(number)
            elif what in ("skipped", "ignored"):
                outcome.skipped += int(number)
            else:
                outcome.failed += int(number)
    outcome.reasons = [reason for number, reason in SKIP.findall(text) for _ in range(int(number))]
    if status != 0:
        outcome.failed = max(outcome.failed, 1)
    elif not outcome.passed and not outcome.skipped:
        outcome.passed = 1


def python(*arguments: str) -> list[str]:
    return [sys.executable, "-m", *arguments]


def pytest(*arguments: str) -> list[str]:
    return python("pytest", "-rs", "--color=no", *arguments)


def cargo(name: str, *arguments: str, component: str = "") -> Step:
    """A step of cargo's, skipped if its component is not installed."""
    tool = f"cargo-{component}"
    missing = f"{tool} is not installed" if component and not shutil.which(tool) else None
    return Step(name, ["cargo", *arguments], missing)


def rust_tests() -> Step:
    if shutil.which("cargo-nextest"):
        return cargo("Rust tests", "nextest", "run", "--locked", "--no-fail-fast")
    return cargo("Rust tests", "test", "--locked", "--no-fail-fast")


def may_be_root() -> bool:
    if os.geteuid() == 0:
        return True
    sudo = shutil.which("sudo")
    return sudo is not None and subprocess.run([sudo, "-n", "true"], capture_output=True, check=False).returncode == 0


def as_root(command: list[str]) -> list[str]:
    """What needs the lab: it shares the host's files, which only root may do."""
    return command if os.geteuid() == 0 or not may_be_root() else ["sudo", "-n", *command]


def linux_tests() -> Step:
    """Tier D: on this host's KVM if Linux runs in it, else in the lab, all in one start."""
    tests = pytest("tests/vm/linux")
    if linux_capable() is None:
        return Step("tier D: Linux guests", tests)
    # Temporary files in memory: those of the host may go away behind the lab's back.
    lab = python("pyvirtio", "lab", "--timeout", str(HANG_GUARD - 30), "--", "env", "TMPDIR=/dev/shm", *tests)
    return Step("tier D: Linux guests", as_root(lab), None if may_be_root() else "the lab needs root or sudo -n")


def checks() -> list[Step]:
    return [
        Step("ruff check", python("ruff", "check")),
        Step("ruff format", python("ruff", "format", "--check")),
        cargo("cargo fmt", "fmt", "--check", component="fmt"),
        Step("mypy", python("mypy")),
        Step("stubtest", python("mypy.stubtest", "pyvirtio._core")),
        cargo("clippy", "clippy", "--locked", "--all-targets", "--", "-D", "warnings", component="clippy"),
        Step("documentation", python("sphinx", "-q", "-W", "--keep-going", "docs", "build/docs")),
        rust_tests(),
    ]


def fast_tiers() -> list[Step]:
    return [
        Step("tier A: in process", pytest("tests", "--ignore=tests/kvm", "--ignore=tests/vm")),
        Step("tier B: freestanding guests", pytest("tests/kvm")),
    ]


def slow_tiers() -> list[Step]:
    return [
        Step("loom: notification protocol", ["rust/core/loom.sh"]),
        Step("tiers C and E: firmware, QEMU", as_root(pytest("tests/vm", "--ignore=tests/vm/linux"))),
    ]


def run_all(only_fast: bool) -> list[Outcome]:
    """One step after another, but Linux guests, which take the longest, beside all others."""
    if only_fast:
        return [step.run() for step in (*checks(), *fast_tiers())]
    linux = linux_tests()
    print(f"== {linux.name}: begun, shown at the end\n", flush=True)
    beside = linux.start()
    outcomes = [step.run() for step in (*checks(), *fast_tiers(), *slow_tiers())]
    return [*outcomes, linux.conclude(beside)]


def excused(reason: str) -> bool:
    """A skip that CI accepts: nothing that can be installed would help."""
    return "/dev/kvm" in reason and not KVM.exists()


def conclude(outcomes: list[Outcome]) -> int:
    print("== summary")
    for outcome in outcomes:
        print(outcome)
        for reason in sorted(set(outcome.reasons)):
            print(f"    skipped {outcome.reasons.count(reason)}: {reason}")
    unexcused = sum(o.skipped - sum(map(excused, o.reasons)) for o in outcomes)
    failed = sum(outcome.failed for outcome in outcomes)
    if CI and unexcused:
        print(f"CI=true: {unexcused} skipped tests count as failed")
        failed += unexcused
    passed, skipped = sum(o.passed for o in outcomes), sum(o.skipped for o in outcomes)
    print(f"{passed} passed, {failed} failed, {skipped} skipped")
    return 1 if failed else 0


def main(arguments: list[str]) -> int:
    only_fast = arguments == ["fast"]
    if arguments and not only_fast:
        return subprocess.run(python("pytest", *arguments), cwd=ROOT, check=False).returncode
    return conclude(run_all(only_fast))


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
