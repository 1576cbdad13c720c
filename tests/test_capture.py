"""The ladder: which rung captures what, what is not accepted, and what is said."""

import numpy as np
import pytest
import torch
from torch import nn

import descompiler as des
from descompiler import capture as ladder
from descompiler.capture import capture
from descompiler.passes import NORMALISE
from descompiler.probe import blueprint

IDS = torch.randint(9, (6, 3), generator=torch.Generator().manual_seed(0))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(9, 4)
        self.top = nn.Linear(4, 1)


class Plain(Model):
    def forward(self, ids):
        return self.top(self.table(ids).sum(1))


class Length(Model):
    """``len`` of a tensor fixes the batch size under export; Dynamo keeps it symbolic."""

    def forward(self, ids):
        assert len(ids) == ids.shape[0]
        return self.top(self.table(ids).sum(1))


class Numpy(Model):
    """Offsets in numpy, added to the ids; numpy operators on tensors."""

    offsets = np.array([0, 3, 6])

    def forward(self, ids):
        ids = ids % 3 + torch.from_numpy(np.asarray(self.offsets)).unsqueeze(0)
        return self.top(self.table(ids).sum(1) * len(ids) / ids.shape[0])


class Recurrent(Model):
    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(4, 4, batch_first=True)

    def forward(self, ids):
        assert len(ids) > 0
        return self.top(self.gru(self.table(ids))[0].sum(1))


class Branch(Model):
    """A branch on values of tensors: no graph is right for both sides."""

    def forward(self, ids):
        e = self.table(ids).sum(1)
        return self.top(e * 2 if ids.sum() % 2 else e)


def captured(model, inputs=(IDS,)):
    return capture(blueprint(model), inputs, passes=NORMALISE)[0]


@pytest.mark.parametrize(
    ("cls", "rung"), [(Plain, "export"), (Length, "dynamo"), (Numpy, "dynamo"), (Recurrent, "dynamo")]
)
def test_rung(cls, rung):
    program = captured(cls())
    assert program.rung == rung
    assert [f.rung for f in program.failures] == [r for r, _ in ladder.RUNGS][: len(program.failures)]
    assert all(f.reason for f in program.failures)
    assert program.parameters.keys() == dict(cls().named_parameters()).keys()


def test_every_reason_is_shown():
    with pytest.raises(des.CaptureError) as error:
        captured(Branch())
    for rung, _ in ladder.RUNGS:
        assert f"{rung}: " in str(error.value)


def test_a_graph_that_does_not_reproduce_the_model_is_not_accepted(monkeypatch):
    """A tracer that returns another model's graph, and one that bakes a parameter-only expression as a constant."""

    def wrong(traced, tensors, template):
        traced.model.top.forward = lambda x: nn.functional.linear(x, traced.model.top.weight)  # the bias is lost
        return export(traced, tensors, template)

    def baked(traced, tensors, template):
        bias = traced.model.top.bias.detach().clone()
        traced.model.top.forward = lambda x: nn.functional.linear(x, traced.model.top.weight) + bias
        return export(traced, tensors, template)

    export = ladder.RUNGS[0][1]
    monkeypatch.setattr(ladder, "RUNGS", (("wrong", wrong), ("baked", baked), ("export", export)))
    program = captured(Plain())
    assert program.rung == "export"
    assert "output 0" in program.failures[0].reason and "output 0" in program.failures[1].reason


def test_two_ranks_by_dynamo():
    des.verify(Recurrent(), (IDS,), plans=[{"*": "row"}])
