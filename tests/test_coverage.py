"""Coverage: no weights-rich parameter is left out, and what is said of each is true."""

import warnings

import pytest
import torch
from torch import nn

import descompiler as des
from descompiler.planning.coverage import Coverage, Covered
from descompiler.tables.tables import WEIGHTS_RICH_ELEMENTS

ROWS = WEIGHTS_RICH_ELEMENTS // 4
IDS = torch.randint(ROWS, (8, 2), generator=torch.Generator().manual_seed(0))


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.large = nn.Embedding(ROWS, 4)
        self.small = nn.Embedding(ROWS, 1)  # below the threshold, but looked up
        self.forgotten = nn.Embedding(ROWS, 4)
        self.dense = nn.Linear(4, ROWS)
        self.penalised = [self.large.weight]

    def forward(self, ids):
        return self.dense(self.large(ids[:, 0])).sum(1, True) + self.small(ids[:, 1])


class Regularised(Base):
    """A table whose norm is part of every row's output: it is not only looked up."""

    def forward(self, ids):
        return super().forward(ids) + 0.01 * self.penalised[0].square().sum()


class Branching(Base):
    """Captured in part; one table is looked up, another multiplied."""

    def forward(self, ids):
        e = self.large(ids[:, 0])
        if (ids[:, 1] == 3).any():
            e = e + (ids[:, 1:] == 3) * e
        return (e @ self.forgotten.weight[:8].t()).sum(1, True) + self.small(torch.tensor(ids[:, 1].tolist()))


class Tied(Base):
    """Item embeddings that are the output layer too."""

    def forward(self, ids):
        return self.large(ids).sum(1) @ self.large.weight.t()


MODELS = [Base, Regularised, Branching, Tied]


def _covered(rank, ranks):
    """Parameters that should be covered and are not, and untrue statements, by model."""
    found = {}
    for cls in MODELS:
        model = cls()
        with warnings.catch_warnings(record=True) as notes:
            warnings.simplefilter("always")
            module = des.compile(model, (IDS,), cluster="bytes")
        coverage = module.coverage()
        entries = {c.name: c for c in coverage.parameters}
        wrong = []
        for name, p in model.named_parameters():
            looked_up = name == "small.weight" and cls is not Tied
            if (p.numel() >= WEIGHTS_RICH_ELEMENTS or looked_up) and name not in entries:
                wrong.append(f"{name} is not covered")
            if name not in entries:
                continue
            entry, pieces = entries[name], module.pieces(name)
            whole = entry.form in ("replicate", "sparse_all_gather", "unused")
            if whole != pieces.is_replicated or tuple(dict(module.named_parameters())[name].shape) != (
                tuple(p.shape) if whole else pieces.piece_shape(rank)
            ):
                wrong.append(f"{name} is said to be {entry.form}, and is {pieces}")
            if entry.size_bytes != p.numel() * 4 or (entry.form in ("replicate", "unused") and not entry.why):
                wrong.append(f"{name}: {entry}")
        text = " ".join(str(n.message) for n in notes)
        unsaid = [c.name for c in coverage.left_whole if rank == 0 and f"'{c.name}' ({c.size_bytes:,} B" not in text]
        found[cls.__name__] = (wrong, unsaid, coverage.rung, {n: c.form for n, c in entries.items()}, str(coverage))
    return found


def test_nothing_is_left_out(on_ranks):
    for found in on_ranks(_covered, 2, timeout_s=200):
        for wrong, unsaid, *_ in found.values():
            assert not wrong and not unsaid
        assert found["Base"][2] == "export" and found["Branching"][2] == "partial"
        forms = found["Base"][3]
        assert forms["forgotten.weight"] == "unused" and forms["dense.weight"] == "replicate"
        assert forms["large.weight"] not in ("replicate", "unused"), "it is cheaper to send rows than the table"
        forms = found["Branching"][3]
        assert forms["large.weight"] == "unique_rows" and forms["forgotten.weight"] == "replicate"
        assert "not by export:" in found["Branching"][4] and "Tensor.__getitem__" in found["Branching"][4]


def test_the_warning_names_what_is_left_whole():
    coverage = Coverage(
        "export",
        (),
        (
            Covered("a", 10, "replicate", "export", "used by a product"),
            Covered("b", 2000, "replicate", "export", "used by a norm"),
            Covered("c", 10, "replicate", "export", "cheaper", choice=True),
            Covered("d", 10, "row_wise", "export", ""),
        ),
    )
    text = coverage.warning()
    assert text.startswith("left whole on every rank, 2,010 B: 'b' (2,000 B: used by a norm); 'a'")
    assert "'c'" not in text and "'d'" not in text
    assert Coverage("export", (), ()).warning() is None


def test_before_the_first_forward_there_is_none():
    with pytest.raises(des.InputError, match="compiled by its first forward"):
        des.compile(Base()).coverage()
