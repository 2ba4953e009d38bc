"""What holds for the repository as a whole: imports go one way, and the documents name what is there."""

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "pyvirtio"
LAYERS = [
    ["_core", "spec", "errors", "properties"],
    ["device", "backends", "faults"],
    ["devices"],
    ["dataplane", "events", "notifiers"],
    ["transports", "vhost"],
    ["accel", "vmm", "serve"],
    ["lint"],
    ["cli", "lab", "demo", "bench", "testing"],
]
"""A module imports from its own layer and from those above it in this list."""
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
SOURCES = sorted(PACKAGE.rglob("*.py"))
MODULES = [path for path in SOURCES if path.parent != PACKAGE or path.stem in LEVEL]
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "ARCHITECTURE.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
]


def layer_name(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    """The names directly under `pyvirtio` that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("pyvirtio."))
        elif isinstance(node, ast.ImportFrom) and node.module == "pyvirtio":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pyvirtio."):
            yield str(node.module).split(".")[1]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path: Path) -> None:
    own = layer_name(path)
    assert own in LEVEL, f"{own} belongs to no layer of LAYERS"
    for name in imports(path):
        assert name in LEVEL, f"import {name} from the module that defines it"
        assert LEVEL[name] <= LEVEL[own], f"{own} may not import {name}"


def test_a_transport_knows_no_kvm() -> None:
    for path in (PACKAGE / "transports").glob("*.py"):
        assert not {"Vm", "Vcpu"} & {getattr(node, "id", None) for node in ast.walk(ast.parse(path.read_text()))}


def test_the_architecture_names_every_source_file() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text()
    python = [path.relative_to(PACKAGE) for path in SOURCES if path.name != "__init__.py"]
    rust = [path.relative_to(ROOT) for path in (ROOT / "rust").rglob("*.rs") if "/src/" in str(path)]
    assert [str(path) for path in [*python, *rust] if f"`{path}`" not in text] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_the_files_that_a_document_names_exist(document: Path) -> None:
    named = re.findall(r"`([\w./-]*(?:/|\.(?:py|pyi|rs|md|sh|toml)))`", document.read_text())
    missing = [name for name in named if not any((base / name).exists() for base in (ROOT, PACKAGE))]
    assert set(missing) <= {"mine.py", "dice.py", "thermometer.py", "tape.py", "ram.py"}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_the_links_of_a_document_lead_somewhere(document: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", document.read_text())
    assert [link for link in links if not (document.parent / link).exists()] == []


def test_guest_memory_has_one_implementation() -> None:
    packages = tomllib.loads((ROOT / "Cargo.lock").read_text())["package"]
    assert [package["name"] for package in packages].count("vm-memory") == 1


def test_the_core_knows_no_python() -> None:
    manifest = tomllib.loads((ROOT / "rust" / "core" / "Cargo.toml").read_text())
    assert "pyo3" not in manifest["dependencies"]
