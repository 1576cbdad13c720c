"""Imports go one way, so that every module can be read, and loaded, with only those below it; tests import no tests."""

import ast
import re
from collections.abc import Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from descompiler.passes import FORMS

TESTS = Path(__file__).resolve().parent
PACKAGE = TESTS.parent / "descompiler"

ORDER = (
    ("errors", "examples", "version"),
    ("registry", "tensor_file", "units"),
    ("sheet",),
    ("cost_models",),
    ("ops",),
    ("optim",),
    ("dynamic",),
    ("model",),
    ("layout",),
    ("graph",),
    ("classify",),
    ("tables",),
    ("region",),
    ("runtime",),
    ("passes",),
    ("capture",),
    ("planning",),
    ("emit",),
    ("eager",),
    ("module",),
    ("plugins", "builder", "captured", "in_part", "compiler"),
    ("check", "parquet"),
    ("__init__",),
    ("report",),
    ("cli",),
    ("__main__",),
)
"""Folders, and modules of the top, from the ground up: each imports from itself and from those before it."""

NAME_FORMS = ("descompiler.passes.forms", "descompiler.tables.aliases", "descompiler.examples")
"""What may name a form."""

RANKS = {"torch.distributed", "descompiler.runtime"}
"""What nobody below the run time meets."""


def module_name(file: Path) -> str:
    return ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


def package_sources() -> dict[str, str]:
    """Source by module name, of the package and the two linked folders."""
    roots = (PACKAGE, PACKAGE / "passes", PACKAGE / "cost_models")
    files = {f for root in roots for f in root.rglob("*.py")}
    return {module_name(f): f.read_text() for f in sorted(files)}


def imports(source: str, modules: set[str]) -> set[str]:
    """Modules that are imported anywhere: at the top, in functions, for types alone."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            # of a package it may be a module that is imported, or a name
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in modules else node.module for name in names}
    return found & modules


def ordered(sources: Mapping[str, str]) -> list[str]:
    return list(TopologicalSorter({n: imports(s, set(sources)) for n, s in sources.items()}).static_order())


def folder(module: str) -> str:
    """The folder of a module, or itself if it lies at the top."""
    return [*module.split("."), "__init__"][1]


def arrows_back(sources: Mapping[str, str]) -> list[str]:
    """Imports of a folder that comes later."""
    floor = {name: i for i, names in enumerate(ORDER) for name in names}
    return [
        f"{module} imports {other}"
        for module, source in sources.items()
        for other in sorted(imports(source, set(sources)))
        if floor[folder(other)] > floor[folder(module)]
    ]


def test_no_module_imports_itself_by_way_of_others() -> None:
    order = ordered(package_sources())
    assert len(order) > 150 and order[-1] in ("descompiler.__main__", "descompiler.cli.app")


def test_folders_have_an_order() -> None:
    assert not arrows_back(package_sources())


def test_every_folder_says_what_lives_in_it() -> None:
    sources = package_sources()
    folders = {module.rpartition(".")[0] for module in sources} - {"", "descompiler", "descompiler.cost_models"}
    for name in folders:
        assert len(ast.get_docstring(ast.parse(sources[name])) or "") > 80, name


@pytest.mark.parametrize(
    "ground",
    ["cost_models", "ops", "optim", "dynamic", "model", "layout", "graph", "classify", "tables", "region"],
)
def test_what_is_below_the_run_time_knows_no_process_group(ground: str) -> None:
    for module, source in package_sources().items():
        if folder(module) == ground:
            found = {n.module for n in ast.walk(ast.parse(source)) if isinstance(n, ast.ImportFrom) and n.module}
            found |= {a.name for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Import) for a in n.names}
            assert not {x for x in found if any(x == r or x.startswith(f"{r}.") for r in RANKS)}, module


@pytest.mark.parametrize(
    "source",
    [
        "from p.b import x",
        "def f():\n    from p.b import x",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import p.b",
    ],
)
def test_a_cycle_is_found(source: str) -> None:
    with pytest.raises(CycleError, match=r"p\.a"):
        ordered({"p": "", "p.a": source, "p.b": "from p import a"})


def test_an_arrow_back_is_found() -> None:
    sources = {"descompiler.graph.x": "def f():\n    from descompiler.runtime import y", "descompiler.runtime.y": ""}
    assert arrows_back(sources) == ["descompiler.graph.x imports descompiler.runtime.y"]
    assert not arrows_back({"descompiler.graph.x": "", "descompiler.runtime.y": "import descompiler.graph.x"})


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


def literals(source: str) -> set[str]:
    """Strings of a module that are no docstrings."""
    tree = ast.parse(source)
    texts = {id(x.value) for x in ast.walk(tree) if isinstance(x, ast.Expr)}
    strings = (x for x in ast.walk(tree) if isinstance(x, ast.Constant) and isinstance(x.value, str))
    return {x.value for x in strings if id(x) not in texts}


def named_in(texts: set[str]) -> set[str]:
    """Forms whose names are words of these texts."""
    return {name for name in FORMS.names for text in texts if re.search(rf"(?<![\w-]){name}(?![\w-])", text)}


def test_generic_code_names_no_form():
    """It asks a form what it has to know, so that one from outside is as good as those that are built in."""
    named = {
        module: found
        for module, source in package_sources().items()
        if not module.startswith(NAME_FORMS) and (found := named_in(literals(source)))
    }
    assert not named
    source = '"""row_wise"""\nx = "fsdp"\ny = f"pin {x}=unique_rows"\nz = "TorchRec row-wise"'
    assert named_in(literals(source)) == {"fsdp", "unique_rows"}
