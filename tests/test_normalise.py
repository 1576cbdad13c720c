"""What each normalise pass does, as text: a graph before and after, and that both compute the same numbers.

tests/normalise/<pass>.txt has the examples of a pass, each a title (``# ...``), a graph in the notation of
`tests.harness.graph_text`, ``-->`` and what the pass makes of it: the calls of the new graph, ``unchanged`` where it
has to leave the graph alone, or ``refused: <why>``. ``pytest --update-golden`` writes what comes after the arrow anew;
read the difference before committing it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from descompiler.errors import DescompilerError
from descompiler.graph.rewrite import run_passes
from descompiler.passes import NORMALISE
from tests.harness.graph_text import GraphText, run

FOLDER = Path(__file__).parent / "normalise"
PASSES = {p.name: p for p in NORMALISE}
UNCHANGED = "unchanged\n"


@dataclass(frozen=True)
class Example:
    """A graph before a pass, and after it."""

    title: str
    before: str
    after: str

    def __str__(self) -> str:
        return f"# {self.title}\n{self.before}-->\n{self.after}"


def read(name: str) -> list[Example]:
    """The examples of a pass."""
    found = []
    for text in (FOLDER / f"{name}.txt").read_text().removeprefix("# ").split("\n# "):
        title, _, graph = text.partition("\n")
        before, _, after = graph.partition("-->\n")
        found.append(Example(title, before, after.rstrip("\n") + "\n"))
    return found


def made_of(name: str, before: str) -> Example:
    """What a pass makes of a graph that it may not change the numbers of."""
    graph = GraphText(before)
    numbers = {rows: graph.numbers(rows) for rows in (2, 5)}
    expected = {rows: run(graph.program, x) for rows, x in numbers.items()}
    text = graph.print(graph.program)
    try:
        after = run_passes(graph.program, (PASSES[name],))
    except DescompilerError as error:
        return Example("", text, f"refused: {error}\n")
    for rows, x in numbers.items():
        torch.testing.assert_close(run(after, x), expected[rows], rtol=1e-12, atol=1e-12, equal_nan=True)
    if graph.print(after) == text:
        return Example("", text, UNCHANGED)
    placeholders = tuple(line for line in text.splitlines() if not line.startswith(("%", "return")))
    return Example("", text, graph.print(after, without=placeholders))


def test_every_pass_has_examples_of_what_it_does_and_of_what_it_leaves():
    assert {f.stem for f in FOLDER.iterdir()} == set(PASSES)
    for name in PASSES:
        left = [e.after == UNCHANGED or e.after.startswith("refused: ") for e in read(name)]
        assert any(left) and not all(left), name


@pytest.mark.parametrize("name", PASSES)
def test_pass(name, request):
    examples = read(name)
    made = [made_of(name, e.before) for e in examples]
    if request.config.getoption("--update-golden"):
        examples = [Example(e.title, m.before, m.after) for e, m in zip(examples, made, strict=True)]
        (FOLDER / f"{name}.txt").write_text("\n".join(map(str, examples)))
    for e, m in zip(examples, made, strict=True):
        assert (e.before.strip(), e.after.strip()) == (m.before.strip(), m.after.strip()), e.title
