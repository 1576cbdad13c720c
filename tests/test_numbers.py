"""Numbers that are not all of one kind: complex values, and tables and layers of several precisions."""

import pytest
import torch
from torch import Tensor, nn

import descompiler as des

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


@pytest.mark.parametrize("model", [RotatE, ComplEx, InBatch, ComplexTable])
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
