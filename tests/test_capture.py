"""The ladder: which rung captures what, what is not accepted, and what is said."""

import functools

import numpy as np
import pytest
import torch
from torch import nn

import descompiler as des
from descompiler import capture as ladder
from descompiler.capture import capture
from descompiler.coupling import scope_of
from descompiler.leaf import Leaf
from descompiler.leaves import trace_leaves
from descompiler.passes import NORMALISE
from descompiler.probe import blueprint, materialise
from descompiler.program import user_line

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


class Entries(Model):
    """A write to one entry of a value, while another entry is used afterwards."""

    def forward(self, ids):
        x = self.table(ids)
        first, second = x[:, 0], x[:, 1]
        first *= 2
        return self.top(first + second)


class Branch(Model):
    """A branch on values of the whole batch: a leaf that mixes rows."""

    def forward(self, ids):
        e = self.table(ids).sum(1)
        return self.top(e * 2 if ids.sum() % 2 else e)


class Encoder(nn.Module):
    """Packed sequences, which no tracer goes through; they can't be packed without rows."""

    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(4, 4, batch_first=True)
        self.drop = nn.Dropout(0.1)

    def forward(self, x, lengths):
        packed = nn.utils.rnn.pack_padded_sequence(self.drop(x), lengths.cpu(), batch_first=True, enforce_sorted=False)
        return self.gru(packed)[1][0]


class Sequence(Model):
    """A sequence encoder between a table and a tower."""

    def __init__(self):
        super().__init__()
        self.encoder = Encoder()

    def forward(self, ids):
        lengths = (ids > 4).sum(1).clamp(min=1)
        return self.top(self.encoder(self.table(ids), lengths) + self.table(ids[:, 0]))


class Whole(Sequence):
    """The same in forward itself, with the length of a tensor."""

    def forward(self, ids):
        assert len(ids) == ids.shape[0]
        e, first = self.table(ids % 9), self.table(ids[:, 0])
        lengths = ((ids > 4).sum(1).clamp(min=1)).numpy()
        packed = nn.utils.rnn.pack_padded_sequence(e, lengths, batch_first=True, enforce_sorted=False)
        return self.top(self.encoder.gru(packed)[1][0] + first)


class Inside(Model):
    """A module that looks rows up itself, and branches on values; all of its lookups come first."""

    class Tower(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(9, 4)
            self.scale = nn.Parameter(torch.tensor(2.0))

        def forward(self, ids):
            e = self.table(ids + 0).sum(1)
            return e * self.scale if (ids == 3).any(1).sum().item() >= 0 else e

    def __init__(self):
        super().__init__()
        self.tower = self.Tower()

    def forward(self, ids):
        return self.top(self.tower(ids) + self.tower(ids[:, 1:]) + self.table(ids).sum(1))


class Late(Model):
    """Lookups behind code that can't be traced: what computes their ids is done again."""

    def __init__(self):
        super().__init__()
        self.encoder = Encoder()

    def forward(self, ids):
        if (ids > 8).any():
            raise ValueError("unknown id")
        lengths = (ids > 4).sum(1).clamp(min=1)
        packed = nn.utils.rnn.pack_padded_sequence(self.table(ids), lengths, batch_first=True, enforce_sorted=False)
        shifted = torch.where(ids[:, 0] > 4, ids[:, 0] - 4, ids[:, 1])
        return self.top(self.encoder.gru(packed)[1][0] + self.table(shifted))


class Largest(Model):
    """The ids depend on a number that depends on values: doing the same again would be wrong on other batches."""

    def forward(self, ids):
        largest = int(ids.max())
        assert ids.sum().item() >= 0
        return self.top(self.table((ids + 1) % (largest + 1)).sum(1))


class Hidden(Model):
    """Ids that no tracer follows."""

    def forward(self, ids):
        return self.top(self.table(torch.tensor(ids.tolist()).reshape(ids.shape)).sum(1))


class Varying(Encoder):
    """As long as the longest sequence of the batch."""

    def forward(self, x, lengths):
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        return nn.utils.rnn.pad_packed_sequence(self.gru(packed)[0], batch_first=True)[0]


class Longest(Sequence):
    """A mean over the longest sequence of the batch: rows depend on each other, which a leaf may."""

    def __init__(self):
        super().__init__()
        self.encoder = Varying()

    def forward(self, ids):
        return self.top(self.encoder(self.table(ids), (ids > 4).sum(1).clamp(min=1)).mean(1))


def captured(model, inputs=(IDS,)):
    return capture(blueprint(model), inputs, passes=NORMALISE)[0]


@pytest.mark.parametrize(
    ("cls", "rung"),
    [
        (Plain, "export"), (Entries, "export"), (Length, "dynamo"), (Numpy, "dynamo"), (Recurrent, "dynamo"),
        (Sequence, "fx"), (Whole, "leaf"), (Inside, "fx"), (Branch, "leaf"), (Longest, "leaf"),
    ],
)  # fmt: skip
def test_rung(cls, rung):
    program = captured(cls())
    assert program.rung == rung
    assert [f.rung for f in program.failures] == [r for r, _ in ladder.RUNGS][: len(program.failures)]
    assert all(f.reason for f in program.failures)
    assert program.parameters.keys() == dict(cls().named_parameters()).keys()


@pytest.mark.parametrize("cls", [Plain, Length, Sequence])
def test_every_rung_knows_the_users_lines(cls):
    table = captured(cls())
    line = user_line(next(n for n in table.graph.nodes if n.target is torch.ops.aten.embedding.default))
    assert line.startswith(f"{__file__}:")


@pytest.mark.parametrize("cls", [Hidden, Largest])
def test_every_reason_is_shown(cls):
    with pytest.raises(des.CaptureError) as error:
        captured(cls())
    assert cls is Hidden or "leaf: forward can't be an opaque leaf: the ids of its lookup" in str(error.value)
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


@pytest.mark.parametrize("cls", [Sequence, Whole, Inside, Longest, Late])
def test_leaves_on_two_ranks(cls):
    """Tables in front of a leaf take any form, with exactly predicted traffic, also where a rank has no rows."""
    des.verify(cls(), (IDS,), plans=[None, {"table.weight": "row"}, {"table.weight": "pull"}])


def test_a_leaf_that_mixes_rows_is_computed_for_the_global_batch():
    program = captured(Branch())
    leaf = next(n for n in program.graph.nodes if isinstance(n.target, Leaf))
    assert scope_of(leaf).kind == "global"
    des.verify(Branch(), (IDS,))


def test_a_leaf_with_baked_parameters_is_not_accepted(monkeypatch):
    def baked(traced, tensors, template):
        program = trace_leaves(traced, tensors, template)
        leaf = next(n for n in program.graph.nodes if isinstance(n.target, Leaf))
        probe = materialise(template, torch.device("cpu"), double=True)
        values = [probe.get_parameter(f"encoder.{n}").detach() for n in leaf.target.state]
        run = leaf.target
        leaf.target = lambda x, rows, state: run(x, rows, [v.to(s) for v, s in zip(values, state, strict=True)])
        return program

    monkeypatch.setattr(ladder, "RUNGS", (("baked", baked), ("fx", trace_leaves)))
    program = captured(Sequence())
    assert program.rung == "fx"
    assert "does not reproduce the gradient of parameter 'encoder.gru" in program.failures[0].reason


class Listed(Sequence):
    """The encoder's weights are also in a list, which a leaf's copy does not follow: the next rung has them right."""

    def __init__(self):
        super().__init__()
        self.encoder.kept = [self.encoder.gru.weight_ih_l0]
        self.encoder.forward = functools.partial(penalised, self.encoder)


def penalised(encoder, x, lengths):
    return Encoder.forward(encoder, x, lengths) + encoder.kept[0].square().sum()


def test_a_leaf_with_parameters_in_a_list():
    with pytest.raises(des.CaptureError, match="fx: the captured graph"):
        captured(Listed())
    assert des.compile(Listed(), (IDS,)).coverage().rung == "partial"


def test_a_write_that_another_view_sees_is_not_accepted():
    class Overlapping(Model):
        def forward(self, ids):
            x = self.table(ids)
            first, all_but_last = x[:, 0], x[:, :-1]
            first *= 2
            return self.top(first + all_but_last.sum(1))

    program = captured(Overlapping())
    assert program.rung == "leaf"
    assert "writes to a value in place" in program.failures[0].reason


class WithLoss(Plain):
    def calculate_loss(self, ids, target):
        return nn.functional.mse_loss(self(ids).squeeze(1), target) + 0.01 * self.table.weight.square().sum()


def test_verify_of_a_method():
    target = torch.rand(len(IDS), generator=torch.Generator().manual_seed(1))
    report = des.verify(WithLoss(), {"ids": IDS, "target": target}, method="calculate_loss", plans=[{"*": "row"}])
    assert report.worst["output"] < 1e-12
    with pytest.raises(des.InputError, match="no method 'loss'"):
        des.verify(WithLoss(), (IDS, target), method="loss")


class Needy(Plain):
    """A model that does not run on small batches."""

    def forward(self, ids):
        if ids.shape[0] < 6:
            raise ValueError("at least six rows")
        return super().forward(ids)


def test_verify_says_when_the_original_fails():
    with pytest.raises(des.EquivalenceError, match=r"the original itself can't run on [2-5] rows.*at least six rows"):
        des.verify(Needy(), (IDS,))


class GatesInAList(nn.Module):
    """A library's mistake: nobody who asks for parameters() trains the gates."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(9, 4)
        self.gates = [nn.Parameter(torch.rand(4, 2)) for _ in range(2)]

    def forward(self, ids):
        return sum(self.table(ids) @ g for g in self.gates)


def test_parameters_that_are_not_registered_are_constants_and_named():
    ids = torch.arange(8) % 9
    with pytest.warns(UserWarning, match="gates hold tensors that require gradients and are not among parameters"):
        module = des.compile(GatesInAList(), (ids,))
    assert [n for n, _ in module.named_parameters()] == ["table.weight"]
    des.verify(GatesInAList(), (ids,))
