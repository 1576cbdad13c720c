"""What tests remember of traces: those of equal models, and of no others."""

import copy

import pytest
import torch
from torch import nn

from descompiler.capture import ladder
from descompiler.capture.tracers import trace_export
from descompiler.errors import CaptureError
from descompiler.graph.nodes import is_tensor, shape_of, value
from descompiler.model.inputs import flatten, split_statics
from descompiler.model.probe import Flat, blueprint
from tests.harness.traces import key_of, remembering

IDS = torch.arange(6) % 4


class Scaled(nn.Module):
    def __init__(self, scale=2.0, *, tied=False):
        super().__init__()
        self.table, self.other, self.scale = nn.Embedding(4, 3), nn.Embedding(4, 3), scale
        nn.init.ones_(self.table.weight)
        nn.init.ones_(self.other.weight)
        if tied:
            self.other.weight = self.table.weight

    def forward(self, ids):
        return (self.table(ids) * self.other(ids)).sum(1) * self.scale


def flat(model, example=IDS):
    leaves, spec = flatten(((example,), {}))
    return Flat(model, spec, split_statics(leaves)[1])


def test_a_key_is_of_all_that_a_trace_depends_on(monkeypatch):
    def key(change=lambda model: None, ids=IDS, **options):
        model = Scaled(**options)
        change(model)
        return key_of(flat(model), [ids])

    keys = {
        "as it is": key(),
        "a number": key(scale=3.0),
        "one table": key(tied=True),
        "frozen": key(lambda m: m.table.requires_grad_(False)),
        "other weights": key(lambda m: nn.init.zeros_(m.table.weight)),
        "evaluation": key(lambda m: m.eval()),
        "float64": key(lambda m: m.double()),
        "more on a parameter": key(lambda m: setattr(m.table.weight, "kept", 1)),
        "other ids": key(ids=IDS.flip(0)),
        "ids of another dtype": key(ids=IDS.int()),
    }
    monkeypatch.setattr(Scaled, "forward", lambda self, ids: self.table(ids).sum(1))
    keys["another forward"] = key()
    assert None not in keys.values() and len(set(keys.values())) == len(keys)
    monkeypatch.undo()
    assert keys["as it is"] == key_of(copy.deepcopy(flat(Scaled())), [IDS.clone()])


def test_what_can_not_be_compared_is_traced_anew():
    streaming = Scaled()
    streaming.ids = (i for i in ())  # no pickle has one
    assert key_of(flat(streaming), [IDS]) is None
    assert key_of(flat(Scaled().to("meta")), [IDS]) is None


def test_local_classes_are_told_by_what_they_hold():
    def made(factor, other=1.0):
        class Local(Scaled):
            bias = other

            def forward(self, ids):
                return super().forward(ids) * factor

        return Local()

    assert key_of(flat(made(2.0)), [IDS]) == key_of(flat(made(2.0)), [IDS]) is not None
    keys = {key_of(flat(m), [IDS]) for m in (Scaled(), made(2.0), made(3.0), made(2.0, 0.5))}
    assert len(keys) == 4 and None not in keys


def test_equal_models_are_traced_once_and_get_a_graph_each(tmp_path):
    traced = []

    def trace(*of):
        traced.append(of)
        return trace_export(*of)

    again = remembering(trace, tmp_path)
    models = [Scaled(), Scaled(), Scaled(3.0)]
    programs = [again(flat(m), [IDS], blueprint(m)) for m in models]
    assert len(traced) == 2
    first, second, _ = programs
    assert str(first.graph) == str(second.graph) and first.sources == second.sources
    lines = [[n.stack_trace for n in p.graph.nodes if n.op == "call_function"] for p in (first, second)]
    assert lines[0] == lines[1] and all(lines[0])
    first.graph.erase_node(next(n for n in reversed(first.graph.nodes) if n.op == "output"))
    first.sources.clear()
    third = again(flat(Scaled()), [IDS], blueprint(Scaled()))
    assert str(third.graph) == str(second.graph) and third.sources == second.sources and len(traced) == 2
    assert all(p.is_meta for p in third.parameters.values())


def test_what_can_not_be_traced_raises_the_same_again(tmp_path):
    again = remembering(trace_export, tmp_path)
    said = []
    for _ in range(2):
        with pytest.raises(CaptureError) as error:
            again(flat(Branching()), [IDS], blueprint(Branching()))
        said.append(str(error.value))
    assert said[0] == said[1] and said[0]


class Branching(Scaled):
    def forward(self, ids):
        return super().forward(ids if ids.any() else ids + 1)


def test_what_one_process_traced_another_reads(tmp_path):
    """As `remembering` anew finds it: the same graph, lines, values and conditions, and the same text of a failure.

    A trace may leave torch's marks on the inputs, which are other ones then.
    """
    made = remembering(trace_export, tmp_path)(flat(Scaled()), [IDS.clone()], blueprint(Scaled()))
    with pytest.raises(CaptureError) as first:
        remembering(trace_export, tmp_path)(flat(Branching()), [IDS.clone()], blueprint(Branching()))

    other = remembering(never, tmp_path)
    read = other(flat(Scaled()), [IDS.clone()], blueprint(Scaled()))
    assert str(read.graph) == str(made.graph) and read.batch == made.batch and read.guards == made.guards
    assert read.sources == made.sources and read.parameters.keys() == made.parameters.keys()
    for a, b in zip(read.graph.nodes, made.graph.nodes, strict=True):
        assert a.stack_trace == b.stack_trace and is_tensor(a) == is_tensor(b)
        assert not is_tensor(a) or (shape_of(a) == shape_of(b) and value(a).dtype == value(b).dtype)
    with pytest.raises(CaptureError) as again:
        other(flat(Branching()), [IDS.clone()], blueprint(Branching()))
    assert str(again.value) == str(first.value)


def never(*of):
    raise AssertionError("it was traced before")


def test_a_trace_that_can_not_be_written_is_made_by_each(tmp_path):
    def trace(*of):
        traced.append(of)
        program = trace_export(*of)
        end = next(n for n in reversed(program.graph.nodes) if n.op == "output")
        with program.graph.inserting_before(end):
            end.args = ([program.graph.call_function(never, tuple(end.args[0]))],)
        return program

    traced: list[tuple] = []
    for _ in range(2):
        program = remembering(trace, tmp_path)(flat(Scaled()), [IDS], blueprint(Scaled()))
        assert never in {n.target for n in program.graph.nodes}
    assert len(traced) == 2


def test_what_is_remembered_has_to_reproduce_the_model(monkeypatch):
    """The ladder judges it as any other trace: another model's graph is not accepted."""
    wrong = trace_export(flat(Scaled(3.0)), [IDS], blueprint(Scaled(3.0)))
    monkeypatch.setattr(ladder, "RUNGS", (("export", lambda *of: wrong),))
    with pytest.raises(CaptureError, match="does not reproduce output 0"):
        ladder.capture(blueprint(Scaled()), (IDS,))
