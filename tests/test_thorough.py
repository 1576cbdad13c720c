"""A thorough proof finds a wrong module of every kind that would not be noticed, and none that is right."""

import pytest
import torch
from torch import nn

import descompiler as des
from descompiler.builder import Builder
from descompiler.check import compare
from descompiler.model.probe import blueprint
from descompiler.plugins import Kit
from tests.harness.broken import BODIES, EVERYTHING, LOSSES, SPOILED, VARIED, Net, inputs_of
from tests.harness.cases import cases
from tests.harness.pool import here

ALWAYS = tuple(kind for kind in EVERYTHING if kind not in VARIED)
PLAN = {"*": "row_wise"}


def _found(rank, ranks, kinds):
    """What the proof says of each module, nothing of one that it takes for right."""
    said, distribute = {}, compare.distribute
    for kind in kinds:
        net = Net(kind if kind in BODIES else "a longer sequence is cut")

        def wrong(model, builder, net=net, kind=kind, **options):
            if kind in BODIES:
                other = Net(kind, wrong=True).to(next(model.parameters()).dtype)
                other.load_state_dict(model.state_dict())
                example = builder().example_inputs
                model, builder = other, lambda: Builder(blueprint(other), example, "__call__", Kit.of((), ()))
            options["loss"] = LOSSES.get(kind, {}).get(options["loss"], options["loss"])
            module = distribute(model, builder, **options)
            if kind in SPOILED:
                SPOILED[kind](module)
            return module

        compare.distribute = wrong
        try:
            des.verify(net, inputs_of(kind), ranks=ranks, steps=1, plans=[PLAN], launch=here, thorough=True)
        except des.EquivalenceError as error:
            said[kind] = str(error).splitlines()[0]
        finally:
            compare.distribute = distribute
    return said


@pytest.mark.long
@pytest.mark.timeout(1200)  # most of a minute on idle cores
@pytest.mark.parametrize("kinds", cases([(ALWAYS,), (VARIED,)], [(ALWAYS,)]))
def test_every_wrong_module_is_found(kinds, on_ranks):
    assert len(EVERYTHING) >= 30
    for said in on_ranks(_found, 2, kinds, timeout_s=1000):
        assert not set(kinds) - said.keys()


@pytest.mark.long
def test_a_right_module_is_none(on_ranks):
    torch.manual_seed(0)
    net = Net("a longer sequence is cut")
    report = des.verify(net, inputs_of(""), plans=[PLAN], launch=on_ranks, thorough=True)
    assert len(report.tried - report.left_out) > 20
    assert {"0, 0 rows on the ranks", "length 0 in place of 3"} <= report.tried
    assert not report.refused and not report.left_out
    assert "trials" in str(report)


class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x):
        return self.norm(x).sum(1), self.norm.running_mean.clone(), self.norm.running_var.clone()


def _without_rows(rank, ranks):
    module = des.compile(Norm().double(), (torch.randn(6, 4, dtype=torch.float64),))
    for rows in (3, 0):
        _, *found = module(torch.randn(rows, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(rank)))
    return found


def test_statistics_of_no_rows_are_those_before(on_ranks):
    norm = Norm().double()
    drawn = [torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(r)) for r in range(2)]
    for batch in (torch.cat(drawn), torch.zeros(0, 4, dtype=torch.float64)):
        _, *expected = norm(batch)
    for found in on_ranks(_without_rows, 2):
        torch.testing.assert_close(found, expected)


def test_the_default_is_short(on_ranks):
    assert not des.verify(Net("a longer sequence is cut"), inputs_of(""), steps=1, launch=on_ranks).tried
