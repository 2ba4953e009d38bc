"""Builds the documentation: `sphinx-build -W docs build/docs`."""

import __future__

import sys
import types
import typing
from pathlib import Path

import pyvirtio

project = "pyvirtio"
extensions = ["myst_parser", "sphinx.ext.autodoc"]
html_theme = "furo"
html_title = "pyvirtio"
myst_heading_anchors = 3
default_role = "code"
add_module_names = False
autodoc_member_order = "bysource"
autodoc_class_signature = "separated"
suppress_warnings = ["myst.xref_missing"]  # links to files of the repository, which tests/test_project.py follows


def load_stub() -> None:
    """The docstrings of the extension are in its stub, which is Python as well: a module `core_stub`."""
    typing.type_check_only = lambda cls: cls  # exists in the eyes of type checkers only
    stub = Path(pyvirtio.__file__).with_name("_core.pyi")
    module = sys.modules["core_stub"] = types.ModuleType("core_stub")
    code = compile(stub.read_text(), stub, "exec", flags=__future__.annotations.compiler_flag)
    exec(code, vars(module))


load_stub()
