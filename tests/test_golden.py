"""What each rule does, as text: the graph with placements, then each rank's program.

Behind each node are its placement, the key of its row pattern if ranks hold disjoint rows, and the rule that placed it
(lookups are placed by the form of their table). Of the second rank only what differs from the first is printed.

``pytest --update-golden`` writes the files anew; read the difference before committing it.
"""

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from descompiler.capture.ladder import capture
from descompiler.emit.emit import Emitted, emit
from descompiler.graph.program import Program
from descompiler.graph.text import canonical, canonical_graph
from descompiler.layout.division import Run
from descompiler.layout.placement import Disjoint
from descompiler.model.probe import blueprint
from descompiler.passes import NORMALISE, RULES
from descompiler.planning.objective import assign
from descompiler.region.cut import Candidates, Weights, minimum_cut
from descompiler.region.partition import Partition
from descompiler.region.place import place
from descompiler.tables.form import find_tables

RANKS = 2


class Tables(nn.Module):
    """Two fields of 6 and 5 rows; ``f`` is what the rule is about."""

    def __init__(self, dim: int = 4) -> None:
        super().__init__()
        self.a, self.b = nn.Embedding(6, dim), nn.Embedding(5, dim)

    def forward(self, ids: Tensor, dense: Tensor) -> Tensor:
        return self.f(self.a(ids[:, 0]), self.b(ids[:, 1]), dense)

    def f(self, a: Tensor, b: Tensor, dense: Tensor) -> Tensor:
        raise NotImplementedError


class Elementwise(Tables):
    def f(self, a, b, dense):
        return (a + b).sum(1, keepdim=True) + torch.relu(a * a).sum(1, keepdim=True) + dense.sum(1, keepdim=True)


class Concatenate(Tables):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(11, 2)

    def f(self, a, b, dense):
        return self.linear(torch.cat([a, dense, b], 1))


class FactorizationMachine(Tables):
    def f(self, a, b, dense):
        v = torch.stack([a, b], 1)
        return 0.5 * (v.sum(1) ** 2 - (v**2).sum(1)).sum(1)


class View(Tables):
    def f(self, a, b, dense):
        v = torch.stack([a, b], 1)
        return v.transpose(1, 2).reshape(v.shape[0], 8)[:, 1:7].sum(1)


class Interaction(Tables):
    def f(self, a, b, dense):
        return torch.bmm(torch.stack([a, b], 1), torch.stack([a, b], 1).transpose(1, 2)).flatten(1).sum(1)


class OnOwner(Tables):
    def f(self, a, b, dense):
        return (torch.softmax(a, -1).sum(1) + b.sum(1)).unsqueeze(1)


class Contract(Tables):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 4, 3))

    def f(self, a, b, dense):
        return torch.einsum("bfd,fdk->bk", torch.stack([a, b], 1), self.weight)


class Independent(Tables):
    def f(self, a, b, dense):
        return torch.softmax(torch.stack([a, b], 1), 1).amax(2).sum(1, keepdim=True)


class Normalise(Tables):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(4)

    def f(self, a, b, dense):
        return self.norm(torch.stack([a, b], 1)).sum(1)


class Select(Tables):
    def f(self, a, b, dense):
        v = torch.stack([a, b, a], 1)
        return (v[:, [2, 1]] * v[:, [0, 1]]).sum((1, 2)).unsqueeze(1)


class Pairs(Tables):
    def f(self, a, b, dense):
        v = torch.stack([a, b, a], 1)
        z = torch.bmm(v, v.transpose(1, 2))[:, [1, 2, 2], [0, 0, 1]]
        return z.sum(1) + v[:, [1, 2], [0, 3]].tanh().sum(1)


class Chunks(Tables):
    def f(self, a, b, dense):
        first, second = torch.stack([a, b], 1).chunk(2, -1)
        return (first * second).sum((1, 2)).unsqueeze(1)


class Expand(Tables):
    def f(self, a, b, dense):
        return (a.unsqueeze(1).expand(-1, 3, -1).abs() + b.unsqueeze(1).repeat(1, 3, 1)).sum((1, 2)).unsqueeze(1)


class Weighted(Tables):
    def __init__(self):
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(2, 1))

    def f(self, a, b, dense):
        return torch.sigmoid(torch.stack([a * self.scale, b], 1) + self.shift).sum((1, 2)).unsqueeze(1)


class Centre(Tables):
    """A mean over the batch: ranks' terms are summed."""

    def f(self, a, b, dense):
        return (a * (b - b.mean(0))).sum(1)


class InBatch(Tables):
    """Other rows are the negatives: rows are gathered, the loss is the same on every rank."""

    def f(self, a, b, dense):
        return torch.nn.functional.cross_entropy(a @ b.T, torch.arange(a.shape[0]))


class MaskedSum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 4, padding_idx=0)

    def forward(self, ids: Tensor, dense: Tensor) -> Tensor:
        mask = (ids != 0).unsqueeze(-1).to(dense.dtype)
        return (self.table(ids) * mask).sum(1) / mask.sum(1).clamp(min=1)


class History(nn.Module):
    """Attention of a target to a masked history: on the items' owner, which makes the mask from the ids."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.linear = nn.Embedding(6, 4), nn.Linear(4, 4)

    def forward(self, ids: Tensor, target: Tensor) -> Tensor:
        h, mask = self.table(ids), ids != 0
        scores = (torch.sigmoid(self.linear(h)) * self.table(target).unsqueeze(1)).sum(-1)
        return (torch.softmax(scores.masked_fill(~mask, -1e9), 1).unsqueeze(-1) * h).sum(1)

    def inputs(self) -> tuple[Tensor, ...]:
        return torch.tensor([[0, 1], [2, 3], [4, 4]]), torch.tensor([1, 2, 0])


class Recurrent(Tables):
    """Two results of one operator, one with the batch in its second dimension."""

    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(2, 3, batch_first=True)

    def f(self, a, b, dense):
        states, last = self.gru(a.reshape(a.shape[0], 2, 2))
        return states.sum(1) + last.squeeze(0)


class BatchNorms(Tables):
    """Of channels that ranks divide, and of one owner's."""

    def __init__(self):
        super().__init__()
        self.both, self.first = nn.BatchNorm1d(8), nn.BatchNorm1d(4, affine=False)

    def f(self, a, b, dense):
        return self.both(torch.cat([a, b], 1)).sum(1, keepdim=True) + self.first(a).sum(1, keepdim=True)


class SharedWeight(Tables):
    """A weight that two nodes use is not cut: each rank takes its columns of the whole."""

    def __init__(self):
        super().__init__()
        self.linear, self.scale = nn.Linear(4, 2), nn.Parameter(torch.ones(4))

    def f(self, a, b, dense):
        return self.linear(torch.where(a > 0, a * self.scale, a)) + self.linear(b - self.scale)


class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(6, 4, mode="mean")
        self.linear = nn.Linear(4, 2)

    def forward(self, ids: Tensor, dense: Tensor) -> Tensor:
        return self.linear(self.bag(ids))


class Offsets(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 4)
        self.register_buffer("offsets", torch.tensor([0, 6]))
        self.linear = nn.Linear(8, 2)

    def forward(self, ids: Tensor, dense: Tensor) -> Tensor:
        return self.linear(self.table(ids + self.offsets).flatten(1))


class Chained(nn.Module):
    """The second table's ids are computed from the first one's rows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Embedding(6, 4, padding_idx=0), nn.Embedding(2, 4)

    def forward(self, ids: Tensor, dense: Tensor) -> Tensor:
        x = self.first(ids)
        return torch.softmax(x, 1).sum(1) * self.second((x[:, 0, 0] > 0).long())


class Propagation(Tables):
    """Rows of a table that is computed of whole tables, and of one of these."""

    def __init__(self):
        super().__init__()
        self.register_buffer("adjacency", (torch.arange(121.0).reshape(11, 11) % 3).to_sparse())
        self.bias = nn.Parameter(torch.ones(4))

    def forward(self, ids, dense):
        e = torch.cat([self.a.weight, self.b.weight])
        a, b = torch.tanh(torch.sparse.mm(self.adjacency, e) + self.bias).split([6, 5])
        return (a[ids[:, 0]] * b[ids[:, 1]]).sum(1) + self.a(ids[:, 0]).square().sum()


class Cosine(Tables):
    """Products with the normalised rows of a table, whose rows are looked up too."""

    def forward(self, ids, dense):
        rows = nn.functional.normalize(self.a.weight, dim=1)
        return torch.logsumexp((rows[ids[:, 0]] + self.b(ids[:, 1])) @ rows.T, 1)


CASES = [
    (Propagation, "column_wise"),
    (Propagation, "fsdp"),
    (Cosine, "row_wise"),
    (Elementwise, "table_wise"),
    (Elementwise, "row_wise"),
    (Elementwise, "column_wise"),
    (Concatenate, "table_wise"),
    (Concatenate, "row_wise"),
    (Concatenate, "column_wise"),
    (FactorizationMachine, "table_wise"),
    (FactorizationMachine, "row_wise"),
    (View, "table_wise"),
    (View, "row_wise"),
    (View, "column_wise"),
    (Interaction, "column_wise"),
    (OnOwner, "table_wise"),
    (Contract, "table_wise"),
    (Contract, "row_wise"),
    (Contract, "column_wise"),
    (Independent, "column_wise"),
    (Normalise, "table_wise"),
    (Select, "table_wise"),
    (Select, "column_wise"),
    (Pairs, "row_wise"),
    (Pairs, "column_wise"),
    (Chunks, "table_wise"),
    (Expand, "column_wise"),
    (Weighted, "table_wise"),
    (Weighted, "column_wise"),
    (Centre, "row_wise"),
    (InBatch, "table_wise"),
    (MaskedSum, "row_wise"),
    (History, "table_wise"),
    (History, "row_wise"),
    (Recurrent, "table_wise"),
    (BatchNorms, "table_wise"),
    (SharedWeight, "column_wise"),
    (Bag, "row_wise"),
    (Bag, "column_wise"),
    (Offsets, "table_wise"),
    (Offsets, "sparse_all_gather"),
    (Concatenate, "unique_rows"),
    (Bag, "hot_rows"),
    (Chained, "unique_rows"),
]


def text_of(model: nn.Module, form: str) -> str:
    """The program with placements, and the program of every rank, for one form of all tables."""
    inputs = getattr(model, "inputs", lambda: (torch.tensor([[0, 1], [2, 3], [4, 4]]), torch.ones(3, 3)))()
    program, _ = capture(blueprint(model), inputs, passes=NORMALISE)
    operators = find_tables(program)
    splits = assign(operators, {o.name: form for o in operators}, RANKS)
    candidates = place(program, operators, splits, RULES, RANKS)
    cut = minimum_cut(program, candidates, Weights(RANKS, 8))
    partition = Partition(program, operators, splits, candidates, cut, RANKS)
    marks = {n: _mark(program, candidates, n, n in cut.inside) for n in candidates.placed}
    marks |= {n: f"declined: {reason}" for n, reason in candidates.declined.items()}
    first, *others = (_emitted_text(emit(partition, rank)) for rank in range(RANKS))
    text = f"before\n{canonical(program, marks)}\nafter, rank 0\n{first}"
    for rank, other in enumerate(others, 1):
        text += f"\nafter, rank {rank}\n{_difference(first, other)}"
    return text


def _mark(program: Program, candidates: Candidates, node: fx.Node, inside: bool) -> str:
    """Where a node is, and who says so: the rule, or the form of the table that it looks up."""
    placement = candidates.placed[node].placement
    text = str(placement)
    if isinstance(placement, Disjoint):
        text += f" of {_key(placement.key, _names(program))}"
    if node in candidates.rules:
        text += f", by {candidates.rules[node].name}"
    return text if inside else f"{text}, not inside"


def _names(program: Program) -> dict[str, str]:
    """Names of nodes in canonical text, by those in the graph."""
    calls = (n for n in program.graph.nodes if n.op == "call_function")
    names = {n.name: f"%{i}" for i, n in enumerate(calls)}
    return names | {name: f"{s.kind}:{s.name}" for name, s in program.sources.items()}


def _key(key: Any, names: Mapping[str, str]) -> str:
    """The pattern of rows of a `Disjoint` value: what made it, and of what."""
    if isinstance(key, Disjoint):  # one of several values that are concatenated
        return _key(key.key, names)
    if isinstance(key, Run):
        return ",".join(f"{key.size}@{key.owner + i}" for i in range(key.count))
    if not isinstance(key, tuple):
        return str(key)
    parts = [_key(x, names) for x in key]
    if not key or not isinstance(key[0], str):
        return f"[{','.join(parts)}]"
    # a lookup's has the ids, and who owns which rows; others have what made them
    head = names[key[0]] if len(key) == 2 else key[0]
    return f"{head}({','.join(parts[1:])})"


def _emitted_text(emitted: Emitted) -> str:
    """A rank's program."""
    graph = emitted.module.graph
    names = [n.name for n in graph.nodes if n.op == "placeholder"][1:]
    return canonical_graph(graph, dict(zip(names, emitted.sources, strict=True)))


def _difference(first: str, other: str) -> str:
    """The lines that one program has and the other has not, in order: ``-`` the first one's, ``+`` the other's.

    Nodes of the other that the first has too have the first one's numbers, the rest a dash.
    """
    mine, theirs = first.splitlines(), other.splitlines()
    called = [[re.sub(r"^%\d+.* = |\(.*", "", line) for line in lines] for lines in (mine, theirs)]
    names = {
        theirs[block.b + i].split(" ")[0].split("[")[0]: mine[block.a + i].split(" ")[0].split("[")[0]
        for block in difflib.SequenceMatcher(None, *called, autojunk=False).get_matching_blocks()
        for i in range(block.size)
    }
    renamed = re.sub(r"%\d+", lambda name: names.get(name[0], f"{name[0]}'"), other)
    lines = difflib.ndiff(mine, renamed.splitlines())
    return "".join(f"{line}\n" for line in lines if line[0] in "+-") or "as rank 0\n"


@pytest.mark.parametrize(("model", "form"), CASES, ids=[f"{m.__name__}-{f}" for m, f in CASES])
def test_golden(model, form, request):
    path = Path(__file__).parent / "golden" / f"{model.__name__.lower()}_{form}.txt"
    text = text_of(model(), form)
    if request.config.getoption("--update-golden"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert path.exists(), "no golden text yet: run pytest --update-golden and read what it writes"
    assert text == path.read_text()
