"""Numbers that are not all of one kind: complex values, and tables and layers of several precisions."""

import copy

import pytest
import torch
from torch import Tensor, nn

import descompiler as des
from tests.harness.cases import cases

TRIPLES = torch.randint(0, 40, (7, 3), generator=torch.Generator().manual_seed(5))
EVERY_FORM = [None, *({"*": f} for f in ("replicate", "row_wise", "column_wise", "table_wise", "unique_rows"))]


class Graph(nn.Module):
    """Entities and relations, whose numbers are taken for pairs."""

    def __init__(self) -> None:
        super().__init__()
        self.entities, self.relations = nn.Embedding(40, 8), nn.Embedding(40, 4)


class RotatE(Graph):
    """Entities turned by relations: Sun et al. (2019)."""

    def forward(self, triples: Tensor) -> Tensor:
        head, tail = (torch.view_as_complex(self.entities(triples[:, i]).unflatten(1, (4, 2))) for i in (0, 2))
        phase = self.relations(triples[:, 1])
        return -(head * torch.polar(torch.ones_like(phase), phase) - tail).abs().sum(1)


class ComplEx(Graph):
    """Trouillon et al. (2016), with the parts put together from halves of rows."""

    def forward(self, triples: Tensor) -> Tensor:
        head, tail = (torch.complex(*self.entities(triples[:, i]).chunk(2, 1)) for i in (0, 2))
        relation = self.relations(triples[:, 1])
        return (head * torch.complex(relation.cos(), relation) * tail.conj()).real.sum(1)


class InBatch(Graph):
    """Every head with every tail of the batch, and a mean over it; a complex output."""

    def forward(self, triples: Tensor) -> tuple[Tensor, Tensor]:
        head, tail = (torch.view_as_complex(self.entities(triples[:, i]).unflatten(1, (4, 2))) for i in (0, 2))
        scores = head @ (tail - tail.mean(0)).conj().T
        return torch.view_as_real(scores).pow(2).sum((1, 2)), head * tail


class ComplexTable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(40, 3, dtype=torch.complex128))
        self.turn = nn.Parameter(torch.randn(3, dtype=torch.complex128))

    def forward(self, triples: Tensor) -> Tensor:
        return (self.table[triples] * self.turn).sum(1).abs()


class RealAndComplex(Graph):
    """Real tables beside a complex weight: what crosses for both is complex, and what arrives is not."""

    def __init__(self) -> None:
        super().__init__()
        self.turn = nn.Parameter(torch.randn(4, dtype=torch.complex128))

    def forward(self, triples: Tensor) -> Tensor:
        relation = self.relations(triples[:, 1])
        z = torch.complex(self.entities(triples[:, 0]).tanh()[:, :4], relation) * self.turn
        return (z * torch.complex(relation, relation.cos()).conj()).real.sum(1)


@pytest.mark.long(but=1)
@pytest.mark.parametrize("model", cases([RotatE, ComplEx, InBatch, ComplexTable], [ComplEx, ComplexTable]))
def test_complex_values_train_as_the_original(model, on_ranks):
    des.verify(model(), (TRIPLES,), plans=EVERY_FORM, launch=on_ranks)


@pytest.mark.parametrize("form", ["row_wise", "column_wise", "table_wise"])
def test_real_values_that_cross_beside_complex_ones_arrive_as_real(form, on_ranks):
    des.verify(RealAndComplex(), (TRIPLES,), plans=[{"*": form}], launch=on_ranks)


class Mixed(nn.Module):
    """A small 16-bit table comes first; the numbers of all others are float32."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Embedding(40, 4, dtype=torch.bfloat16)
        self.table, self.head = nn.Embedding(40, 6), nn.Linear(10, 1)

    def forward(self, triples: Tensor) -> Tensor:
        return self.head(torch.cat([self.first(triples[:, 0]).float(), self.table(triples[:, 1])], 1))


def _loses(rank, ranks, form):
    model = Mixed()
    expected = model(TRIPLES)[rank * 3 : rank * 3 + 3].detach()
    module = des.compile(model, (TRIPLES,), plan={"*": form})
    return float((module(TRIPLES[rank * 3 : rank * 3 + 3]).detach() - expected).abs().max())


@pytest.mark.parametrize("form", ["row_wise", "unique_rows", "fsdp"])
def test_a_16_bit_table_in_front_makes_nothing_else_16_bit(form, on_ranks):
    assert max(on_ranks(_loses, 2, form)) < 1e-6


ORDERS = [
    (torch.bfloat16, torch.float32, torch.float64, torch.float16),
    (torch.float64, torch.float16),
]
"""Of tables, each with layers of its own."""


class ComplexBesideReal(nn.Module):
    """The widest of all parameters is complex, and the tables are not."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.turn = nn.Parameter(torch.randn(2, dtype=torch.complex64))
        self.real, self.small = nn.Embedding(40, 4), nn.Embedding(40, 4, dtype=torch.bfloat16)

    def forward(self, triples: Tensor) -> Tensor:
        turned = torch.view_as_complex(self.real(triples[:, 0]).unflatten(1, (2, 2))) * self.turn
        return torch.cat([turned.abs(), self.small(triples[:, 1]).float()], 1)


class Several(nn.Module):
    """Tables of several dtypes; numbers of each stay by themselves up to the output, which loses none."""

    def __init__(self, dtypes, sparse=False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tables = nn.ModuleList(nn.Embedding(40, 4, dtype=d, sparse=sparse) for d in dtypes)
        self.layers = nn.ModuleList(nn.Linear(6, 3, dtype=d) for d in dtypes)

    def forward(self, triples: Tensor) -> Tensor:
        dense, parts = triples[:, :2] % 2, []
        for i, (table, layer) in enumerate(zip(self.tables, self.layers, strict=True)):
            x = table(triples[:, i % 3])
            x = layer(torch.cat([x, dense.to(x.dtype)], 1))
            parts.append(x.double())
        return torch.cat(parts, 1)


class Coupled(nn.Module):
    """What mixes rows, or takes all rows of a table, of a table with 16 bits beside one of 64."""

    def __init__(self, dtypes) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tables = nn.ModuleList(nn.Embedding(40, 4, dtype=d) for d in dtypes)
        self.norms = nn.ModuleList(nn.BatchNorm1d(4, dtype=d) for d in dtypes)
        self.wider = nn.BatchNorm1d(4) if dtypes[0].itemsize == 2 else None

    def forward(self, triples: Tensor) -> Tensor:
        parts = []
        for i, (table, norm) in enumerate(zip(self.tables, self.norms, strict=True)):
            x = table(triples[:, i])
            centred = x.sin() - x.sin().mean(0)
            parts += [norm(x), centred, (x @ table.weight.T).logsumexp(1, keepdim=True)]
            parts[-1] = parts[-1] + 0.01 * table.weight.pow(2).sum()
        if self.wider is not None:
            parts.append(self.wider(self.tables[0](triples[:, 2])))
        return torch.cat([x.double() for x in parts], 1)


def _trains(rank, ranks, model, form, cast=None):
    """What is wrong with a step: bytes that were not predicted, or numbers that are not those of their own dtype."""
    module = des.compile(model, (TRIPLES,), plan={"*": form}, loss="sum")
    if cast is not None:
        cast(model), cast(module)
    first, rows = 4 * rank, [4, 3]
    whole = model(TRIPLES)
    (whole * whole.detach().cos()).sum().backward()
    out = module(TRIPLES[first : first + rows[rank]])
    (out * whole[first : first + rows[rank]].detach().cos()).sum().backward()
    predicted, sent = module.plan.traffic(rank, rows, unique=module.unique()), module.traffic()
    wrong = [] if predicted == sent else [f"predicted {predicted}, sent {sent}"]
    found = {n: p.grad for n, p in module.named_parameters()}
    for name, p in model.named_parameters():
        expected, got = (g.to_dense() if g.is_sparse else g for g in (p.grad, found[name]))
        expected = module.pieces(name).cut(expected, rank)
        error = float((got - expected).abs().max() / p.grad.abs().to_dense().max()) if expected.numel() else 0.0
        if got.dtype != p.dtype or error > 16 * torch.finfo(p.dtype).eps:
            wrong.append(f"{name}, {p.dtype}: an error of {error:.1e} in a gradient of {got.dtype}")
    return wrong


COUPLED = [(torch.bfloat16, torch.float64), (torch.float64, torch.float32)]


def _all_train(rank, ranks, cases):
    found = {f"{type(m).__name__} {i} {form}": _trains(rank, ranks, m, form) for i, (m, form) in enumerate(cases)}
    return {case: wrong for case, wrong in found.items() if wrong}


FORMS = ["replicate", "row_wise", "column_wise", "table_wise", "unique_rows", "fsdp"]


@pytest.mark.parametrize("dtypes", cases([(x,) for x in ORDERS], [(min(ORDERS, key=len),)]), ids=str)
def test_each_value_crosses_in_its_own_dtype(dtypes, on_ranks):
    forms, sparse = (FORMS, ["replicate", "sparse_all_gather"]) if len(dtypes) > 2 else (FORMS[1:], [])
    cases = [(Several(dtypes), form) for form in forms]
    cases += [(Several(dtypes, sparse=True), form) for form in sparse]
    assert on_ranks(_all_train, 2, cases) == [{}, {}]


@pytest.mark.long
@pytest.mark.parametrize("dtypes", cases([(x,) for x in COUPLED], [(COUPLED[0],)]), ids=str)
def test_what_mixes_rows_crosses_in_its_own_dtype(dtypes, on_ranks):
    forms = ["row_wise", "unique_rows", "fsdp"] if dtypes[0].itemsize == 2 else ["column_wise", "fsdp"]
    assert on_ranks(_all_train, 2, [(Coupled(dtypes), form) for form in forms]) == [{}, {}]


def test_real_values_beside_complex_ones_cross_as_real_ones(on_ranks):
    assert on_ranks(_all_train, 2, [(ComplexBesideReal(), form) for form in ("row_wise", "unique_rows")]) == [{}, {}]


def _narrower(model):
    """Float32 where it was float64; its other half stays 16-bit."""
    for name in ("tables.0", "layers.0"):
        model.get_submodule(name).float()


def _train_when_cast(rank, ranks):
    casts = {"all": nn.Module.double, "half": _narrower}
    found = {
        (n, f): _trains(rank, ranks, Several(ORDERS[1]), f, c)
        for n, c in casts.items()
        for f in ("row_wise", "unique_rows")
    }
    return {case: wrong for case, wrong in found.items() if wrong}


@pytest.mark.long
def test_a_model_of_several_dtypes_may_be_cast(on_ranks):
    assert on_ranks(_train_when_cast, 2) == [{}, {}]


class Normed(nn.Module):
    def __init__(self, momentum: float | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.norm = nn.Embedding(40, 4), nn.BatchNorm1d(4, momentum=momentum)

    def forward(self, ids: Tensor, x: Tensor) -> Tensor:
        return self.norm(self.table(ids) + x)


ROWS = 601


def _normed(rank, ranks, dtype, momentum):
    """Compare statistics after each step with the original's, and with those of its inputs in float64, rounded."""
    model = Normed(momentum).to(dtype)
    original, precise = copy.deepcopy(model), copy.deepcopy(model).double()
    module = des.compile(model, (torch.zeros(8, dtype=torch.int64), torch.zeros(8, 4, dtype=dtype)))
    own, moved = slice(0, 200) if rank == 0 else slice(200, ROWS), ("running_mean", "running_var")
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(40, (ROWS,), generator=generator)
        x = (30 * torch.randn(ROWS, 4, generator=generator)).to(dtype)
        for net in (module, original, precise):
            net.train(step != 2)
        with torch.set_grad_enabled(step != 2):
            out, expected = module(ids[own], x[own]), original(ids, x)[own]
        torch.testing.assert_close(out, expected, rtol=0, atol=4 * torch.finfo(dtype).eps)
        if step != 2:
            out.sum().backward()
            assert not module.predicts_traffic or module.traffic() == module.predicted_traffic()
        precise.norm((original.table(ids) + x).double())
        for name in moved:
            held = getattr(precise.norm, name)
            held.copy_(held.to(dtype))
    state = des.full_state_dict(module)
    for name in moved:
        assert torch.equal(state[f"norm.{name}"], getattr(precise.norm, name).to(dtype))
        theirs = getattr(original.norm, name)
        size = 2 * torch.finfo(dtype).eps * float(theirs.abs().max())
        torch.testing.assert_close(state[f"norm.{name}"], theirs, rtol=0, atol=size)
    return int(state["norm.num_batches_tracked"]), int(original.norm.num_batches_tracked)


NORMED = [(dtype, momentum) for dtype in (torch.float16, torch.bfloat16) for momentum in (0.1, None)]


@pytest.mark.long(but=1)
@pytest.mark.parametrize(("dtype", "momentum"), cases(NORMED, NORMED[::3]), ids=str)
def test_statistics_of_few_bits_are_summed_in_more(dtype, momentum, on_ranks):
    for counted, expected in on_ranks(_normed, 2, dtype, momentum):
        assert counted == expected == 3
