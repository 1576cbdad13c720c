"""Branches of the user's Python on values, and numbers of rows, that the example does not have."""

import re

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import descompiler as des
from descompiler.eager.survey import survey
from descompiler.model.probe import blueprint

EXAMPLE = torch.randint(1, 40, (6, 3), generator=torch.Generator().manual_seed(5))
BATCH = torch.randint(1, 40, (18, 3), generator=torch.Generator().manual_seed(6))
BATCH[16, 0], BATCH[17, 1] = 0, 49
"""Rows that the example has none of are on the last rank."""

BRANCHES = {
    "bool": lambda ids: (ids == 0).any(),
    "not all": lambda ids: not (ids > 0).all(),
    "item": lambda ids: (ids == 0).sum().item() > 0,
    "a number": lambda ids: ids.max().item() == 49,
    "int": lambda ids: int((ids == 0).sum()),
    "float": lambda ids: float(ids.min()) == 0,
    "maximum": lambda ids: ids.max() > 45,
    "a list": lambda ids: 0 in ids.flatten().tolist(),
    "a list's largest": lambda ids: max(ids.flatten().tolist()) > 45,
    "an array": lambda ids: (ids.numpy() == 0).any(),
    "contains": lambda ids: 0 in ids,
    "where": lambda ids: torch.where(ids == 0)[0].numel(),
    "nonzero": lambda ids: len((ids == 0).nonzero()),
    "chosen": lambda ids: ids[ids == 0].shape[0] > 0,
    "a flag": lambda ids: any(bool(row[0] == 0) for row in ids),
    "rows": lambda ids: ids.shape[0] > 14,
    "half of the rows": lambda ids: ids.size(0) // 2 >= 8,
    "length": lambda ids: len(ids) > 17,
}


class Branch(nn.Module):
    """Scores of all rows are doubled if a row has what rows of the example have not."""

    def __init__(self, kind: str):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head, self.kind = nn.Embedding(50, 4), nn.Linear(12, 1), kind

    def forward(self, ids: Tensor) -> Tensor:
        x = self.head(self.table(ids).flatten(1))
        return x * 2 if BRANCHES[self.kind](ids) else x


class InPart(Branch):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(torch.from_numpy(np.sort(ids.numpy(), axis=1)))


CASES = [(Branch, "bool"), (Branch, "an array"), (Branch, "a flag"), (InPart, "a number"), (InPart, "length")]


def _scores(rank, ranks):
    mine, found = slice(rank * 8, 8 + rank * 10), []
    for cls, kind in CASES:
        with torch.no_grad():
            found.append(des.compile(cls(kind).double(), (EXAMPLE,), plan={"*": "row_wise"})(BATCH[mine]))
    return found


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_branch_is_that_of_the_global_batch(on_ranks):
    for (cls, kind), *parts in zip(CASES, *on_ranks(_scores, 2), strict=True):
        torch.testing.assert_close(torch.cat(parts), cls(kind).double()(BATCH).detach(), msg=f"{cls.__name__}, {kind}")


class Padded(InPart):
    """A branch that changes the rows alone by whose values it is taken."""

    def forward(self, ids: Tensor) -> Tensor:
        ids = torch.from_numpy(np.sort(ids.numpy(), axis=1))
        if (ids < 0).any():
            raise ValueError("no such id")
        if not len(ids):
            return self.head.weight.new_zeros(0, 1)
        x, pad = self.table(ids), ids % 4 == 0
        if pad.any():
            x = x.masked_fill(pad.unsqueeze(-1), 0.0)
        if (ids == 0).any():
            x = x * (ids != 0).unsqueeze(-1)
        some = (ids[:, 0] > 30).nonzero()
        if len(some):
            x = x.index_fill(0, some[:, 0], 0.5)
        ends = torch.stack([x[i, int(row[0]) % 2] * (2 if row[1].item() > 30 else 1) for i, row in enumerate(ids)])
        return self.head(x.flatten(1)) + ends.sum(1, keepdim=True)


def test_a_branch_on_own_values_leaves_rows_apart():
    assert survey(blueprint(Padded("")), (EXAMPLE,)).coupled == ""


@pytest.mark.parametrize("kind", BRANCHES)
def test_what_decides_is_said(kind):
    by = (
        "the number of rows"
        if kind in ("rows", "half of the rows", "length")
        else r"values of some at .*branches\.py:\d+"
    )
    assert re.fullmatch(f"forward decides for all rows by {by}", survey(blueprint(InPart(kind)), (EXAMPLE,)).coupled)
