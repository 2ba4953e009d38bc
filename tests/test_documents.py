"""What the documents show works: their sessions, and the tests among their files."""

import doctest
import re
from pathlib import Path

import documents
import pytest

SESSIONS = [page for page in documents.PAGES if "```pycon" in page.read_text()]
TESTED = [page for page in documents.PAGES if documents.tests(page, linux=False) and page.name != "testing.md"]
"""The tests of testing.md need the device of the README: tests/test_readme.py runs them."""


@pytest.mark.parametrize("page", SESSIONS, ids=lambda page: page.name)
def test_a_session_goes_as_shown(page: Path) -> None:
    text = "".join(re.findall(r"^```pycon\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE))
    session = doctest.DocTestParser().get_doctest(text, {}, page.name, str(page), 0)
    result = doctest.DocTestRunner().run(session)
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.parametrize("page", TESTED, ids=lambda page: page.name)
def test_the_tests_of_a_page_pass(page: Path, tmp_path: Path) -> None:
    names = documents.tests(page, linux=False)
    assert re.search(r"\d+ passed", documents.run_tests(page, names, tmp_path, timeout=60))


def test_user_code_of_the_tutorial_is_short_and_as_long_as_it_says() -> None:
    page = documents.ROOT / "docs" / "device-in-ten-minutes.md"
    shown = documents.files(page)
    lines = [len([line for line in shown[name].splitlines() if line.strip()]) for name in ("counter.py", "dedup.py")]
    assert max(lines) <= 25
    assert f"The classes have {lines[0]} and {lines[1]} lines" in page.read_text()
