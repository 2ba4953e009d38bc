"""The tests in the documents that boot a Linux guest."""

import re
from pathlib import Path

import documents
import pytest

TESTS = [(page, name) for page in documents.PAGES for name in documents.tests(page, linux=True)]


@pytest.mark.parametrize(("page", "name"), TESTS, ids=[name for _, name in TESTS])
def test_a_test_of_the_documents_passes(page: Path, name: str, tmp_path: Path) -> None:
    assert re.search(r"\b1 passed", documents.run_tests(page, [name], tmp_path, timeout=300))
