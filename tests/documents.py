"""The code in the documents: blocks of Python whose first line names the file they are."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
NEEDS_LINUX = "_in_linux.py"
"""How the names of tests end that boot a guest."""


def files(page: Path) -> dict[str, str]:
    """The files that a page shows, by name."""
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    named = [(re.match(r'"""([\w/]+\.py)(?:"""|: )', block), block) for block in blocks]
    return {name[1]: block for name, block in named if name}


def tests(page: Path, *, linux: bool) -> list[str]:
    """Those of its files that are tests."""
    return [name for name in files(page) if name.startswith("test_") and name.endswith(NEEDS_LINUX) is linux]


def run_tests(page: Path, names: list[str], directory: Path, timeout: float) -> str:
    """Run tests of a page with all its files in one directory; return what pytest says."""
    for name, text in files(page).items():
        (directory / name).write_text(text)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rs", *names]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
