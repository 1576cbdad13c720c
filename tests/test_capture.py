"""The ladder: which rung captures what, what is not accepted, and what is said."""

import copy
import functools
import inspect
import re
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensor

import descompiler as des
from descompiler.capture import ladder
from descompiler.capture.checks import relative_error
from descompiler.capture.ladder import capture
from descompiler.capture.leaves import trace_leaves
from descompiler.classify.scope import scope_of
from descompiler.graph.leaf import Leaf
from descompiler.graph.nodes import user_line
from descompiler.layout.global_values import GatherRows
from descompiler.layout.step import LeafStatus
from descompiler.model.probe import blueprint, materialise
from descompiler.passes import NORMALISE
from tests.harness.failures import Raises, raised
from tests.harness.models import Model, Recurrent

IDS = torch.randint(9, (6, 3), generator=torch.Generator().manual_seed(0))


class Plain(Model):
    def forward(self, ids):
        return self.top(self.table(ids).sum(1))


class Length(Model):
    """``len`` of a tensor would fix the batch size."""

    def forward(self, ids):
        assert len(ids) == ids.shape[0]
        return self.top(self.table(ids).sum(1))


class Numpy(Model):
    """Offsets in numpy, added to the ids; numpy operators on tensors."""

    offsets = np.array([0, 3, 6])

    def forward(self, ids):
        ids = ids % 3 + torch.from_numpy(np.asarray(self.offsets)).unsqueeze(0)
        return self.top(self.table(ids).sum(1) * int(ids.shape[0]) / ids.shape[0])


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


class Moved(Model):
    """Ids in a tensor that no operator made, moved to where it is."""

    def forward(self, ids):
        return self.top(self.table(torch.LongTensor(ids.tolist()).to(ids.device)).sum(1))


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
        (Plain, "export"), (Entries, "export"), (Length, "export"), (Numpy, "dynamo"), (Recurrent, "dynamo"),
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


@pytest.mark.parametrize("cls", [Hidden, Largest, Moved])
def test_every_reason_is_shown(cls):
    with pytest.raises(des.CaptureError) as error:
        captured(cls())
    assert cls is Hidden or "leaf: forward can't be an opaque leaf: the ids of its lookup" in str(error.value)
    for rung, _ in ladder.RUNGS:
        assert f"{rung}: " in str(error.value)


def test_where_the_batch_size_becomes_a_number_is_told():
    class Fixed(Model):
        def forward(self, ids):
            return self.top(self.table(ids).sum(1).view(int(ids.shape[0]), 4))

    line = Fixed.forward.__code__.co_firstlineno + 1
    assert f"the batch size becomes a number at {__file__}:{line}" in captured(Fixed()).failures[0].reason


def test_a_trace_ends_where_a_batch_becomes_a_list():
    """Torch unrolls the list, which takes minutes for a thousand rows, and fails at its end."""

    class Listed(Model):
        went_on = 0

        def forward(self, ids):
            values = ids.tolist()
            Listed.went_on += isinstance(ids, FakeTensor)
            return self.top(self.table(torch.tensor(values).reshape(ids.shape)).sum(1))

    with pytest.raises(des.CaptureError) as error:
        captured(Listed(), (torch.randint(9, (1000, 3)),))
    line = Listed.forward.__code__.co_firstlineno + 1
    reasons = {f.rung: f.reason for f in error.value.failures}
    assert reasons.keys() == {r for r, _ in ladder.RUNGS} and Listed.went_on == 0
    assert all(f"the batch size becomes a number at {__file__}:{line}" in r for r in reasons.values())


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


def test_a_graph_whose_gradients_differ_is_not_accepted(monkeypatch):
    """Its outputs are the model's: a layer without a gradient; a table without one that is too large for values."""

    class Large(Plain):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(1 << 21, 4)

    def detached(part):
        def trace(traced, tensors, template):
            module = getattr(traced.model, part)
            module.register_forward_hook(lambda module, inputs, out: out.detach() if part == "table" else out)
            if part == "top":
                module.forward = lambda x: nn.functional.linear(x, module.weight.detach(), module.bias)
            return export(traced, tensors, template)

        return trace

    export = ladder.RUNGS[0][1]
    for cls, part, said in (
        (Plain, "top", "the gradient of parameter 'top.weight'"),
        (Large, "table", "whether 'table.weight' gets a gradient"),
    ):
        monkeypatch.setattr(ladder, "RUNGS", (("detached", detached(part)), ("export", export)))
        with torch.device("meta"):
            model = cls()
        program = captured(model)
        assert program.rung == "export" and f"does not reproduce {said}" in program.failures[0].reason


def test_a_graph_that_reproduces_the_example_batch_alone_is_not_accepted(monkeypatch):
    def fixed(traced, tensors, template):
        top, forward = traced.model.top, traced.model.top.forward
        top.forward = lambda x: forward(x) + (x.shape[0] - len(IDS))
        return export(traced, tensors, template)

    export = ladder.RUNGS[0][1]
    monkeypatch.setattr(ladder, "RUNGS", (("fixed", fixed), ("export", export)))
    program = captured(Plain())
    assert program.rung == "export" and "output 0 of the model on" in program.failures[0].reason
    assert f"on {len(IDS)} rows" not in program.failures[0].reason


def test_a_graph_that_is_right_for_one_set_of_weights_is_not_accepted(monkeypatch):
    """A factor without a gradient, baked with the value that it has in the probe."""

    class Scaled(Plain):
        def forward(self, ids):
            return super().forward(ids) * self.top.weight.detach().abs().sum()

    def baked(traced, tensors, template):
        factor = float(materialise(template, IDS.device, double=True).top.weight.detach().abs().sum())
        traced.model.forward = lambda ids: Plain.forward(traced.model, ids) * factor
        return export(traced, tensors, template)

    export = ladder.RUNGS[0][1]
    monkeypatch.setattr(ladder, "RUNGS", (("baked", baked), ("export", export)))
    program = captured(Scaled())
    assert program.rung == "export" and "output 0 of the model on" in program.failures[0].reason
    assert f"on {len(IDS)} rows" not in program.failures[0].reason


def test_matrices_that_are_plain_attributes_are_compared_in_float64():
    class Mixed(Plain):
        def __init__(self):
            super().__init__()
            self.matrix = torch.rand(4, 4)

        def forward(self, ids):
            return self.top(self.table(ids).sum(1) @ self.matrix)

    assert captured(Mixed()).rung == "export"


def test_what_is_no_number_is_compared():
    numbers, infinite = torch.tensor([1.0, 0.0]), torch.tensor([1.0, torch.inf])
    assert relative_error(numbers, numbers) == relative_error(infinite, infinite) == 0
    for other in (infinite, torch.tensor([1.0, torch.nan])):
        assert relative_error(numbers, other) == relative_error(other, numbers) == torch.inf


def test_two_ranks_by_dynamo(on_ranks):
    des.verify(Recurrent(), (IDS,), plans=[{"*": "row_wise"}], launch=on_ranks)


SLOW = [pytest.param(cls, marks=pytest.mark.slow) for cls in (Whole, Longest, Late)]


@pytest.mark.parametrize("cls", [Sequence, Inside, *SLOW])
def test_leaves_on_two_ranks(on_ranks, cls):
    """Tables in front of a leaf take any form, with exactly predicted traffic, also where a rank has no rows."""
    des.verify(
        cls(), (IDS,), plans=[None, {"table.weight": "row_wise"}, {"table.weight": "unique_rows"}], launch=on_ranks
    )


def test_a_leaf_that_mixes_rows_is_computed_for_the_global_batch(on_ranks):
    program = captured(Branch())
    leaf = next(n for n in program.graph.nodes if isinstance(n.target, Leaf))
    assert scope_of(leaf).kind == "global"
    des.verify(Branch(), (IDS,), launch=on_ranks)


class Compact(Model):
    """Sequences that are not empty, packed; there has to be one (deepctr-torch's DIEN is so)."""

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.gru = nn.GRU(4, 4, batch_first=True)

        def forward(self, x, lengths):
            some = lengths > 0
            if not some.any():
                raise ValueError("no sequence")
            packed = nn.utils.rnn.pack_padded_sequence(x[some], lengths[some], batch_first=True, enforce_sorted=False)
            return x.new_zeros(len(x), 4).index_put((some,), self.gru(packed)[1][0])

    def __init__(self):
        super().__init__()
        self.encoder = self.Encoder()

    def forward(self, ids):
        return self.top(self.encoder(self.table(ids), (ids != 4).sum(1)))


EMPTY = torch.full((2, 3), 4)


def _without_what_forward_needs(rank, ranks):
    """Where rank 1 has empty sequences only: the largest difference from one process; what all of them empty say."""
    torch.manual_seed(2)
    model = Compact().double()
    module = des.compile(copy.deepcopy(model), (torch.cat([EMPTY, IDS]),), loss="sum")
    mine = IDS if rank == 0 else EMPTY
    out, every = module(mine), model(torch.cat([IDS, EMPTY]))
    out.square().sum().backward()
    every.square().sum().backward()
    worst = float((out - (every[:6] if rank == 0 else every[6:])).abs().max())
    for (n, p), q in zip(module.named_parameters(), model.parameters(), strict=True):
        worst = max(worst, float((p.grad - module.pieces(n).cut(q.grad, rank)).abs().max()))
    same = module.traffic() == module.plan.traffic(rank, [6, 2], unique=module.unique())
    return worst, same, GatherRows.GATHER in module.traffic().bytes_by_collective


def test_a_leaf_that_needs_a_row_of_a_kind_runs_on_own_rows_beside_a_spare_one(on_ranks):
    program = captured(Compact(), (torch.cat([EMPTY, IDS]),))
    assert next(scope_of(n).kind for n in program.graph.nodes if isinstance(n.target, Leaf)) == "local"
    for worst, predicted, gathers in on_ranks(_without_what_forward_needs, 2):
        assert worst < 1e-12 and predicted and not gathers
    with pytest.raises(des.InputError, match="no sequence"):
        des.compile(Compact(), (torch.cat([EMPTY, IDS]),))(EMPTY)


class Refuses(nn.Module):
    """A module that is picky about items: it raises, or returns one row less; and it needs rows."""

    mixes = False

    def __init__(self):
        super().__init__()
        self.top = nn.Linear(4, 4)

    def forward(self, x, items):
        if items.max() == 20:
            raise ValueError("no such item")
        e = self.top(x)
        if items.max() == 21:
            return e[1:]
        e = Raises.apply(e, bool(items.max() == 22))
        if items.max() == 23:  # autograd itself refuses
            y = e.exp()
            y.detach().zero_()
            e = e + y  # rows are as they were
        return e - e.mean(0) if self.mixes else e


class Picky(Model):
    """One leaf behind another."""

    def __init__(self):
        super().__init__()
        self.first, self.second = Refuses(), Refuses()

    def forward(self, ids):
        x = self.first(self.table(ids % 9).sum(1), ids[:, 0])
        return self.top(self.second(x, ids[:, 1]).sin())


class PickyMixing(Picky):
    """The second leaf is computed for the global batch."""

    def __init__(self):
        super().__init__()
        self.second.mixes = True


class PickyIds(Model):
    """A leaf whose results are ids, which are checked before the ranks have exchanged anything."""

    class Buckets(nn.Module):
        def forward(self, ids):
            if (ids == 20).any():
                raise ValueError("no such item")
            return ids % 9

    def __init__(self):
        super().__init__()
        self.buckets = self.Buckets()

    def forward(self, ids):
        return self.top(self.table(self.buckets(ids)).sum(1))


FAILURES = {  # the model, and the bad item of each rank: column, id
    "first": (Picky, None, (0, 20)),
    "second": (Picky, None, (1, 20)),
    "each in another": (Picky, (0, 20), (1, 20)),
    "shape": (Picky, None, (1, 21)),
    "no rows": (Picky, "no rows", (1, 20)),
    "global": (PickyMixing, None, (1, 20)),
    "before the header": (PickyIds, None, (1, 20)),
}


def _failing_leaves(rank, ranks):
    """What each failure says, without gradients in evaluation too, and how well the next step goes."""
    modules, found = {}, {}
    for name, (cls, *bad) in FAILURES.items():
        if cls not in modules:
            torch.manual_seed(2)
            model = cls().double()
            modules[cls] = (
                des.compile(copy.deepcopy(model), (IDS,), plan={"table.weight": "unique_rows"}, loss="sum"),
                model,
            )
        module, reference = modules[cls]
        mine = (IDS[:2] if rank == 0 else IDS[2:]).clone()
        if bad[rank] == "no rows":
            mine = mine[:0]
        elif bad[rank] is not None:
            column, item = bad[rank]
            mine[0, column] = item
        texts = [raised(lambda: module(mine))]  # noqa: B023
        module.eval()
        with torch.no_grad():
            texts.append(raised(lambda: module(mine)))  # noqa: B023
        module.train()
        found[name] = texts, _error_of_a_step(module, reference, rank)
    return found


def _error_of_a_step(module, reference, rank, in_place=False):
    for m in (module, reference):
        m.zero_grad()
    out, every = module(IDS[:2] if rank == 0 else IDS[2:]), reference(IDS)
    out.square().sum().backward()
    every.square().sum().backward()
    worst = float((out - (every[:2] if rank == 0 else every[2:])).abs().max())
    for (n, p), q in zip(module.named_parameters(), reference.parameters(), strict=True):
        worst = max(worst, float((p.grad - module.pieces(n).cut(q.grad, rank)).abs().max()))
    if in_place:  # gradients of replicas have an exchange of their own
        return worst
    predicted = module.plan.layout.predict(rank, [2, 4], 8, unique=module.unique())
    assert module.traffic() == predicted
    calls = module.traffic().calls_by_collective.get(LeafStatus.RUN, 0)
    assert calls == (0 if isinstance(reference, PickyIds) else 2)
    return worst


def test_a_leaf_that_fails_on_one_rank_raises_on_all(on_ranks):
    here = rf"{re.escape(__file__)}:\d+"
    says = {
        name: [rf"rank 1: opaque leaf '{leaf}' \({here}\): ValueError: no such item"]
        for name, leaf in [("first", "first"), ("second", "second"), ("no rows", "second"), ("global", "second")]
    }
    says["each in another"] = [rf"rank 0: opaque leaf 'first' \({here}\): ValueError: no such item"]
    says["shape"] = [rf"rank 1: opaque leaf 'second' \({here}\): .*returned shapes \[\(3, 4\)\] for 4 rows"]
    says["global"].append(says["global"][0].replace("rank 1", "rank 0"))
    says["before the header"] = [rf"rank 1: opaque leaf 'buckets' \({here}\): ValueError: no such item"]
    assert says.keys() == FAILURES.keys()
    for found in on_ranks(_failing_leaves, 2, timeout_s=120):
        for name, (texts, worst) in found.items():
            for text in texts:
                for expected in says[name]:
                    assert re.search(expected, text), (name, text)
                assert text.startswith("InputError") and text.count("opaque leaf") == len(says[name]), (name, text)
            assert worst < 1e-12, f"{name}: the next step has to work"


BACKWARD_FAILURES = {  # the model, what differs in how it is used, and the bad item of each rank: column, id
    "first": (Picky, "", None, (0, 22)),
    "second, and no rows": (Picky, "no rows", (1, 22), None),
    "each in another": (Picky, "", (0, 22), (1, 22)),
    "autograd": (Picky, "", None, (1, 23)),
    "global": (PickyMixing, "", None, (1, 22)),
    "two forwards": (Picky, "twice", None, (1, 22)),
    "graph kept": (Picky, "kept", None, (1, 22)),
    "in place": (Picky, "in place", None, (1, 22)),
}


def _failing_backwards(rank, ranks):
    """What each failure says, and how well the next step goes."""
    modules, found = {}, {}
    for name, (cls, usage, *bad) in BACKWARD_FAILURES.items():
        key = cls, usage == "in place"
        if key not in modules:
            torch.manual_seed(2)
            model = cls().double()
            options = {"plan": {"table.weight": "unique_rows"}, "loss": "sum", "in_place": usage == "in place"}
            modules[key] = des.compile(copy.deepcopy(model), (IDS,), **options), model
        module, reference = modules[key]
        mine = (IDS[:2] if rank == 0 else IDS[2:]).clone()
        if bad[rank] is not None:
            column, item = bad[rank]
            mine[0, column] = item
        elif usage == "no rows":
            mine = mine[:0]
        loss = module(mine).square().sum()
        if usage == "twice":
            loss = loss + module(IDS[:1]).square().sum()
        texts = [raised(lambda: loss.backward(retain_graph=usage == "kept"))]  # noqa: B023
        if usage == "kept":
            texts.append(raised(loss.backward))
        found[name] = texts, _error_of_a_step(des.module_of(module), reference, rank, usage == "in place")
    return found


def test_a_leaf_whose_backward_fails_on_one_rank_raises_on_all(on_ranks):
    ranks = {n: [r for r in range(2) if isinstance(case[2 + r], tuple)] for n, case in BACKWARD_FAILURES.items()}
    ranks["global"] = [0, 1]
    for found in on_ranks(_failing_backwards, 2, timeout_s=120):
        for name, (texts, worst) in found.items():
            said, file = "ValueError: no such gradient", inspect.getfile(Raises)
            if name == "autograd":
                said, file = "RuntimeError: one of the variables", __file__
            for text in texts:
                assert text.startswith("InputError") and text.count("opaque leaf") == len(ranks[name]), (name, text)
                for rank in ranks[name]:
                    column = 1 if name == "global" else BACKWARD_FAILURES[name][2 + rank][0]
                    leaf = rf"'{('first', 'second')[column]}' \({re.escape(file)}:\d+\)"
                    assert re.search(rf"rank {rank}: backward of opaque leaf {leaf}: {said}", text), (name, text)
            assert worst < 1e-12, f"{name}: the next step has to work"


def test_a_leaf_whose_backward_fails_on_one_rank_of_one():
    module = des.compile(Picky(), (IDS,))
    with pytest.raises(ValueError, match="no such gradient"):
        module(torch.full_like(IDS, 22)).sum().backward()


class Dropping(Model):
    """A leaf that mixes rows and draws."""

    class Centre(nn.Module):
        def forward(self, x, ids):
            assert ids.max() < 9
            x = nn.functional.dropout(x, 0.5, self.training)
            return x - x.mean(0)

    def __init__(self):
        super().__init__()
        self.centre = self.Centre()

    def forward(self, ids):
        return self.centre(self.table(ids).sum(1), ids)


def _drawn(rank, ranks):
    module = des.compile(Dropping().double(), (IDS,))
    torch.manual_seed(rank)
    return [module(IDS[:2] if rank == 0 else IDS[2:]).detach() for _ in range(2)]


def test_dropout_in_a_leaf_that_mixes_rows_is_drawn_once_for_all_ranks(on_ranks):
    first, second = (torch.cat(parts) for parts in zip(*on_ranks(_drawn, 2), strict=True))
    assert not torch.equal(first, second)
    for x in (first, second):
        assert torch.allclose(x.mean(0), torch.zeros(4, dtype=x.dtype), atol=1e-12)


def test_a_leaf_that_fails_on_one_rank_of_one():
    module = des.compile(Picky(), (IDS,))
    with pytest.raises(des.InputError, match=rf"opaque leaf 'first' \({re.escape(__file__)}:\d+\): .*no such item"):
        module(torch.full_like(IDS, 20))
    assert module(IDS).shape == (6, 1)


def test_a_program_without_leaves_agrees_on_none():
    assert LeafStatus.RUN not in des.plan(Plain(), (IDS,), ranks=2).traffic(0).calls_by_collective


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

    class Twice(Model):
        def forward(self, ids):
            x = self.table(ids)
            first = x[:, 0]
            first *= 2
            x *= 3
            return self.top(first + x.sum(1))

    for cls in (Overlapping, Twice):
        program = captured(cls())
        assert program.rung == "leaf"
        assert "writes to a value in place" in program.failures[0].reason


class Labels(Model):
    """A loss whose labels are written into a part of a value, and whose model accumulates in float32."""

    def forward(self, ids):
        both = torch.cat([self.top(self.table(ids[:, i])).squeeze(1) for i in (0, 1)])
        target = torch.zeros(len(ids) * 2, dtype=torch.float32)
        target[: len(ids)] = 1
        weights = torch.ones(len(ids), 3)
        weights[:, 1:] = self.table(ids[:, 2])[:, :2]
        weights[:, 0] *= 0.5
        penalty = torch.zeros(1)
        penalty += both.norm()
        return nn.functional.binary_cross_entropy_with_logits(both, target) + 1e-7 * penalty, weights * 2


def test_writes_to_parts_of_values_and_float32_beside_float64(on_ranks):
    program = captured(Labels())
    assert program.rung == "export" and not program.failures
    des.verify(Labels(), (IDS,), plans=[None, {"*": "row_wise"}], launch=on_ranks)


class WithLoss(Plain):
    def calculate_loss(self, ids, target):
        return nn.functional.mse_loss(self(ids).squeeze(1), target) + 0.01 * self.table.weight.square().sum()


def test_verify_of_a_method(on_ranks):
    target = torch.rand(len(IDS), generator=torch.Generator().manual_seed(1))
    report = des.verify(
        WithLoss(), {"ids": IDS, "target": target}, method="calculate_loss", plans=[{"*": "row_wise"}], launch=on_ranks
    )
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


def test_parameters_that_are_not_registered_are_constants_and_named(on_ranks):
    ids = torch.arange(8) % 9
    with pytest.warns(UserWarning, match="gates hold tensors that require gradients and are not among parameters"):
        module = des.compile(GatesInAList(), (ids,))
    assert [n for n, _ in module.named_parameters()] == ["table.weight"]
    des.verify(GatesInAList(), (ids,), launch=on_ranks)


class Idle(Sequence):
    """The encoder, a leaf, holds a layer that it never uses."""

    def __init__(self):
        super().__init__()
        self.encoder.spare = nn.Linear(4, 1)


def _without_gradient(rank, ranks):
    ids = torch.arange(24).reshape(8, 3) % 9
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module = des.compile(Idle(), (ids,))
    module(ids[rank * 4 : rank * 4 + 4]).sum().backward()
    return module.coverage().rung, {n for n, p in module.named_parameters() if p.grad is None}


@pytest.mark.parametrize("ranks", [1, 2])
def test_parameters_of_a_leaf_that_are_not_used_have_no_gradient(ranks, on_ranks):
    for found in on_ranks(_without_gradient, ranks):
        assert found == ("fx", {"encoder.spare.weight", "encoder.spare.bias"})


def test_hooks_that_are_not_carried_over_are_named():
    model, ids = Sequence(), torch.arange(24).reshape(8, 3) % 9
    model.top.weight.register_hook(lambda g: g)
    model.top.bias.register_post_accumulate_grad_hook(lambda p: None)
    with pytest.warns(UserWarning, match=r"gradient hooks on top\.weight, top\.bias are the original's"):
        des.compile(model, (ids,))


class Looks(Model):
    """Keeps what it computed, to look at; its top layer's weight is computed in front of each forward."""

    def __init__(self):
        super().__init__()
        self.seen, self.first = [], None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # the parametrization does without an attribute
            self.normed = torch.nn.utils.weight_norm(nn.Linear(4, 2))

    def forward(self, ids):
        e = self.table(ids)
        self.first = e.softmax(1)
        self.seen = [{"attention": self.first}]
        return self.normed((self.first * e).sum(1))


def test_a_model_that_keeps_what_it_computed_compiles_after_it_has_run(on_ranks):
    model = Looks()
    model(IDS).sum().backward()
    assert not model.first.is_leaf and not model.normed.weight.is_leaf
    assert des.verify(model, (IDS,), plans=[None, {"*": "row_wise"}], launch=on_ranks).cases == 2
    with pytest.warns(UserWarning, match=r"leaves values with gradients on the model, in (seen, first|first, seen);"):
        assert des.compile(model, (IDS,)).coverage().rung == "export"
