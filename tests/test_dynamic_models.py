"""Models with dynamic tables of many shapes, each verified on ranks: lookups, bags, towers, norms, ids of lookups."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import descompiler as des
from descompiler.dynamic import Capacity
from tests.harness.cases import cases


def table(name="a", bags=None, **options):
    if bags is not None:
        return des.DynamicEmbeddingBag(3, name=name, mode=bags, evict=Capacity(64), **options)
    return des.DynamicEmbedding(3, name=name, evict=Capacity(64), **options)


class Twice(nn.Module):
    """One table, looked up twice; under a second name."""

    def __init__(self):
        super().__init__()
        self.one = self.other = table()
        self.top = nn.Linear(6, 1)

    def forward(self, a, b):
        return self.top(torch.cat([self.one(a), self.other(b)], -1)).squeeze(-1)


class Sequences(nn.Module):
    def __init__(self):
        super().__init__()
        self.tables, self.top = nn.ModuleDict({"seen": table()}), nn.Linear(3, 1)

    def forward(self, ids):
        return self.top(self.tables["seen"](ids).tanh().mean(1)).squeeze(-1)


class Towers(nn.Module):
    def __init__(self):
        super().__init__()
        self.user, self.item = table("user"), table("item")

    def forward(self, a, b):
        return (self.user(a) * self.item(b)).sum(-1)


class InBatch(Towers):
    def forward(self, a, b):
        scores = self.user(a) @ self.item(b).t()
        return F.cross_entropy(scores, torch.arange(len(a)), reduction="none")


class Bags(nn.Module):
    def __init__(self, mode, **options):
        super().__init__()
        self.bags, self.top = table(bags=mode, **options), nn.Linear(3, 1)

    def forward(self, ids):
        return self.top(self.bags(ids)).squeeze(-1)


class ByOffsets(Bags):
    """Bags of which a module that runs as it is makes offsets: the graph has the lookup."""

    def forward(self, ids):
        return self.top(self.bags(ids.flatten(), torch.arange(0, ids.numel(), ids.shape[1]))).squeeze(-1)


class Weighted(Bags):
    def forward(self, ids, weights):
        return self.top(self.bags(ids, per_sample_weights=weights)).squeeze(-1)


class Normalised(nn.Module):
    def __init__(self, *, trained=True):
        super().__init__()
        self.user, self.norm, self.top = table(), nn.BatchNorm1d(3), nn.Linear(3, 1)
        self.user.weight.requires_grad_(trained)

    def forward(self, ids):
        return self.top(self.norm(self.user(ids))).squeeze(-1)


class OfALookup(nn.Module):
    """Ids that are computed from another lookup."""

    def __init__(self):
        super().__init__()
        self.group, self.user, self.top = nn.Embedding(40, 2), table(), nn.Linear(3, 1)

    def forward(self, ids):
        side = (self.group(ids % 40).sum(-1) > 0).long()
        return self.top(self.user(ids ^ (side << 50))).squeeze(-1)


class Many(nn.Module):
    """Tables of several dtypes and widths, one frozen, one static, looked up for several columns, with padding."""

    def __init__(self, *, static=True):
        super().__init__()
        self.user, self.item = table("user", padding_idx=-5), table("item", bags="mean", dtype=torch.float32)
        self.tag = des.DynamicEmbedding(2, name="tag", evict=Capacity(64))
        self.shop = nn.Embedding(40, 3) if static else table("shop")
        self.tag.weight.requires_grad_(False)
        self.top = nn.Linear(11, 1)

    def forward(self, a, b):
        shop = self.shop(a.abs() % 40)
        values = [self.user(a) * self.user(b[:, 0]), self.item(b).to(shop.dtype), self.tag(a).tanh(), shop]
        return self.top(torch.cat(values, -1)).squeeze(-1)


def ids(*shape, seed=0):
    """Some ids of 64 bits, most of them several times; -5 is padding."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 23, shape, generator=generator) * -(1 << 58) - 5


PADDED = torch.where(torch.arange(9).unsqueeze(1) % 4 == 2, torch.tensor(-5), ids(9, 4))
"""Two bags of padding alone."""
ONE, TWO, MANY = (ids(9),), (ids(9), ids(9, seed=1)), (ids(9, 4),)
MODELS = {
    "twice": (Twice, TWO),
    "sequences": (Sequences, MANY),
    "towers": (Towers, TWO),
    "in-batch": (InBatch, TWO),
    "sums": (lambda: Bags("sum"), MANY),
    "means": (lambda: Bags("mean"), MANY),
    "maxima": (lambda: Bags("max"), MANY),
    "padded sums": (lambda: Bags("sum", padding_idx=-5), MANY),
    "padded means": (lambda: Bags("mean", padding_idx=-5), MANY),
    "padded maxima": (lambda: Bags("max", padding_idx=-5), (PADDED,)),
    "offsets": (lambda: ByOffsets("max", padding_idx=-5), (PADDED,)),
    "weighted": (lambda: Weighted("sum"), (*MANY, torch.rand(9, 4, generator=torch.Generator().manual_seed(2)))),
    "normalised": (Normalised, ONE),
    "frozen": (lambda: Normalised(trained=False), ONE),
    "int32": (Normalised, (torch.arange(9, dtype=torch.int32) % 4 - 2,)),
    "of a lookup": (OfALookup, ONE),
    "many": (Many, (*ONE, *MANY)),
}
FORMS = ["row_wise", "unique_rows", "table_wise", "hot_rows"]
PULLED = ["unique_rows", "hot_rows"]
EVERY = [(m, f) for m in MODELS for f in FORMS if m not in ("of a lookup", "many", "offsets") or f in PULLED]
EVERY.remove(("frozen", "hot_rows"))
SOME = [("twice", "unique_rows"), ("in-batch", "row_wise"), ("padded means", "row_wise"), ("maxima", "table_wise")]
SOME += [
    ("offsets", "unique_rows"),
    ("many", "unique_rows"),
    ("many", "hot_rows"),
    ("twice", "hot_rows"),
    ("of a lookup", "hot_rows"),
]
SOME += [("frozen", "unique_rows"), ("of a lookup", "unique_rows"), ("weighted", "unique_rows"), ("int32", "row_wise")]


@pytest.mark.long(but=1)
@pytest.mark.parametrize(("name", "form"), cases(EVERY, SOME))
def test_every_model_is_verified(on_ranks, name, form):
    torch.manual_seed(0)
    make, inputs = MODELS[name]
    model = make()
    plan = {}
    for n, m in model.named_modules():
        if isinstance(m, des.DynamicEmbedding | des.DynamicEmbeddingBag):
            plan[f"{n}.weight"] = form if m.weight.requires_grad else "unique_rows"
        elif isinstance(m, nn.Embedding):
            plan[f"{n}.weight"] = "unique_rows"
    report = des.verify(model, inputs, plans=(plan,), optimizers=("adagrad",), launch=on_ranks)
    assert report.cases == 1 and max(report.worst.values()) < 1e-10


@pytest.mark.long
def test_ids_that_ranks_are_given(on_ranks):
    torch.manual_seed(0)
    report = des.verify(Towers(), TWO, plans=({"*": "row_wise"}, {"*": "table_wise"}), launch=on_ranks, ids="global")
    assert report.cases == 2 and max(report.worst.values()) < 1e-10
