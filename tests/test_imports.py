"""Imports go one way, so that every module can be read, and loaded, with only those below it; tests import no tests."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
PACKAGE = TESTS.parent / "descompiler"


def module_name(file: Path) -> str:
    return ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


def imports(source: str, modules: set[str]) -> set[str]:
    """Modules that are imported when a module is loaded: at its top level, and not for types alone."""
    found = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            # of a package it may be a module that is imported, or a name
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in modules else node.module for name in names}
    return found & modules


def ordered(sources: dict[str, str]) -> list[str]:
    return list(TopologicalSorter({n: imports(s, set(sources)) for n, s in sources.items()}).static_order())


def test_no_module_imports_itself_by_way_of_others() -> None:
    files = [f for folder in (PACKAGE, PACKAGE / "passes", PACKAGE / "cost_models") for f in folder.glob("*.py")]
    order = ordered({module_name(f): f.read_text() for f in files})
    assert order.index("descompiler.communicator") < order.index("descompiler.runtime")
    assert order.index("descompiler.planner") < order.index("descompiler.compiler") < order.index("descompiler")


def test_a_cycle_is_found() -> None:
    with pytest.raises(CycleError, match=r"p\.a"):
        ordered({"p": "", "p.a": "from p.b import x", "p.b": "from p import a"})


def imported_tests(source: str) -> set[str]:
    """Modules of tests that are imported anywhere, in functions too."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            of = "." * node.level + (node.module or "")
            found |= {of, *(f"{of}.{alias.name}" for alias in node.names)}
    return {name for name in found if any(part.startswith("test_") for part in name.split("."))}


def test_what_tests_share_is_in_the_harness() -> None:
    found = {f.name: imported_tests(f.read_text()) for f in TESTS.rglob("*.py")}
    assert len(found) > 50 and not {file: names for file, names in found.items() if names}


@pytest.mark.parametrize(
    "source",
    [
        "import tests.test_a",
        "from tests.test_a import x",
        "from tests import test_a",
        "def f():\n    from . import test_a",
    ],
)
def test_a_test_that_imports_a_test_is_found(source: str) -> None:
    assert imported_tests(source)
    assert not imported_tests(source.replace("test_a", "harness"))
