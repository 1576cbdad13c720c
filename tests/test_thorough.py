"""A thorough proof finds a wrong module of every kind that would not be noticed, and none that is right."""

import torch

import descompiler as des
from descompiler.builder import Builder
from descompiler.check import compare
from descompiler.model.probe import blueprint
from descompiler.plugins import Kit
from tests.harness.broken import BODIES, SPOILED, Net, inputs_of
from tests.harness.pool import here

EVERYTHING = {**BODIES, **SPOILED}
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


def test_every_wrong_module_is_found(on_ranks):
    assert len(EVERYTHING) >= 20
    for said in on_ranks(_found, 2, list(EVERYTHING)):
        assert not EVERYTHING.keys() - said.keys()


def test_a_right_module_is_none(on_ranks):
    torch.manual_seed(0)
    net = Net("a longer sequence is cut")
    report = des.verify(net, inputs_of(""), plans=[PLAN], launch=on_ranks, thorough=True)
    assert len(report.tried - report.left_out) > 20
    assert report.refused.keys() <= {"length 0 in place of 3"}  # told, never computed otherwise
    assert "trials" in str(report)


def test_the_default_is_short(on_ranks):
    assert not des.verify(Net("a longer sequence is cut"), inputs_of(""), steps=1, launch=on_ranks).tried
