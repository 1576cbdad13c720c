"""Models and calls of unusual kinds: they train as the original, or are refused by name."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import descompiler as des

IDS = torch.randint(0, 50, (6, 3), generator=torch.Generator().manual_seed(5))


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(50, 6), nn.Linear(18, 1)

    def features(self, ids: Tensor) -> Tensor:
        return self.table(ids).flatten(1)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.features(ids))


class SequenceFirst(nn.Module):
    """A GRU that is not ``batch_first``: ids, and what is looked up, have the batch in dim 1."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.gru = nn.Embedding(50, 6), nn.GRU(6, 6)

    def forward(self, ids: Tensor) -> Tensor:
        return self.gru(self.table(ids.T))[0].transpose(0, 1)


class TopOfBatch(Table):
    """The best of the batch, which no rank has rows enough for."""

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        scores = super().forward(ids).squeeze(1)
        best, which = scores.topk(4)
        return best, (self.features(ids)[which] * best.unsqueeze(1)).sum()


@pytest.mark.long(but=1)
@pytest.mark.parametrize("model", [SequenceFirst, TopOfBatch])
def test_it_trains_as_the_original(model, on_ranks):
    des.verify(model(), (IDS,), launch=on_ranks)


class Kept(Table):
    """Parameters that no gradient comes to: a flag, a mask, numbers, a sparse matrix; and what is set on some."""

    def __init__(self) -> None:
        super().__init__()
        self.ready = nn.Parameter(torch.tensor(1, dtype=torch.uint8), requires_grad=False)
        self.mask = nn.Parameter(torch.arange(18) % 3 > 0, requires_grad=False)
        self.order = nn.Parameter(torch.arange(17, -1, -1), requires_grad=False)
        self.near = nn.Parameter((torch.eye(18) + torch.eye(18).roll(1, 0)).to_sparse(), requires_grad=False)
        self.rows = nn.Parameter(torch.eye(18).to_sparse_csr(), requires_grad=False)
        self.head.weight.scale, self.table.weight.no_decay = 2.0, True

    def forward(self, ids: Tensor) -> Tensor:
        x = self.features(ids)[:, self.order] * self.mask * self.ready * self.head.weight.scale
        return self.head((self.rows @ torch.sparse.mm(self.near, x.T)).T)


class KeptInPart(Kept):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(torch.from_numpy(np.sort(ids.numpy(), axis=1)))


@pytest.mark.long(but=1)
@pytest.mark.parametrize("model", [Kept, KeptInPart])
def test_parameters_without_gradients_are_kept(model, on_ranks):
    des.verify(model(), (IDS,), plans=[None, {"*": "row_wise"}], launch=on_ranks)


def _kept(rank, ranks, model, in_place):
    model.table.weight.no_decay = True  # sent to ranks, parameters lose it
    module = des.compile(model, (IDS,), in_place=in_place)
    marked = [n for n, p in module.named_parameters() if getattr(p, "no_decay", False)]
    return marked, sorted(des.full_state_dict(module)), module(IDS[3 * rank : 3 * rank + 3]).detach()


@pytest.mark.long(but=1)
@pytest.mark.parametrize("in_place", [False, True])
def test_what_is_kept_has_its_name_and_its_marks(in_place, on_ranks):
    model = Kept()
    results = on_ranks(_kept, 2, model, in_place)
    torch.testing.assert_close(torch.cat([x for *_, x in results]), model(IDS))
    for marked, names, _ in results:
        assert marked == ["table.weight"]
        assert names == sorted(model.state_dict())


class Triples(Table):
    """Users, positives and negatives in dim 0 of one tensor."""

    def forward(self, ids: Tensor) -> Tensor:
        user, liked, other = (self.table(ids[i]) for i in range(3))
        return (user * (liked - other)).sum(1).mean()


class Unpacked(Triples):
    def forward(self, ids: Tensor) -> Tensor:
        user, liked, other = self.table(ids)
        return (user * (liked - other)).sum(1)


@pytest.mark.parametrize("model", [Triples, Unpacked])
def test_rows_in_another_dimension_are_refused(model):
    with pytest.raises(des.InputError, match=r"dim 0 .*test_unusual.py:\d+.*batch first"):
        des.plan(model(), (IDS.T,), ranks=2)


class WholeGraph(nn.Module):
    """Propagates over all users and items, of no inputs, as LightGCN does."""

    def __init__(self) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(10, 4), nn.Embedding(12, 4)
        near = torch.rand(22, 22, generator=torch.Generator().manual_seed(1)).round()
        self.register_buffer("near", near.to_sparse())

    def forward(self) -> tuple[Tensor, Tensor]:
        x = torch.sparse.mm(self.near, torch.cat([self.users.weight, self.items.weight])) / 10
        return x[:10], x[10:]


def _whole_graph(rank, ranks, model):
    module = des.compile(model, ())
    users, items = module()
    (users @ items.T)[rank::ranks].square().sum().backward()
    return {n: p.grad for n, p in module.named_parameters()}


def test_a_forward_without_inputs_trains_as_the_original(on_ranks):
    model = WholeGraph()
    users, items = model()
    ((users @ items.T).square().sum() / 2).backward()  # the mean of the ranks' losses
    for gradients in on_ranks(_whole_graph, 2, model):
        for name, p in model.named_parameters():
            torch.testing.assert_close(gradients[name], p.grad)


@pytest.mark.long
def test_a_forward_without_inputs_is_verified(on_ranks):
    report = des.verify(WholeGraph(), (), plans=[None, {}], launch=on_ranks, thorough=True)
    assert report.cases == 2 and "evaluation after step 3 of Adam with weight decay" in report.tried
    assert not report.refused and not report.left_out


def _without_rows(rank, ranks, loss):
    with pytest.raises(des.UnsupportedError, match=f"loss='{loss}'.*takes no tensor.*multiply each rank's sum by 2"):
        des.compile(WholeGraph(), (), loss=loss)


def test_a_loss_of_rows_is_refused_where_forward_takes_none(on_ranks):
    for loss in ("sum", "row_mean"):
        on_ranks(_without_rows, 2, loss)


class ByItsOwnSize(nn.Module):
    """Views by the batch's size, one of the inputs, and divides by it, as ReChorus' models do."""

    def __init__(self) -> None:
        super().__init__()
        self.user, self.item = nn.Embedding(50, 4), nn.Embedding(50, 4)

    def forward(self, batch: dict) -> tuple[Tensor, Tensor]:
        rows = batch["batch_size"]
        scores = (self.user(batch["user"])[:, None] * self.item(batch["items"])).sum(-1).view(rows, -1)
        return scores, scores.square().sum() / rows


class OnlyDivides(ByItsOwnSize):
    """Runs with any number in its place."""

    def forward(self, batch: dict) -> Tensor:
        return super().forward(batch | {"batch_size": len(batch["user"])})[0].square().sum() / batch["batch_size"]


class SizeInPart(ByItsOwnSize):
    """Which lookups it makes depends on values."""

    def forward(self, batch: dict) -> tuple[Tensor, Tensor]:
        scores, loss = super().forward(batch)
        if int(batch["user"].sum()) % 2:
            scores = scores + 0 * self.user(batch["user"]).sum(1, keepdim=True)
        return scores, loss


class SizeOfAllRows(SizeInPart):
    """And rows are mixed."""

    def forward(self, batch: dict) -> tuple[Tensor, Tensor]:
        scores, loss = super().forward(batch)
        return scores, loss + scores.sum().square() / batch["batch_size"]


def _batch(rows: int) -> dict:
    g = torch.Generator().manual_seed(rows)
    draw = lambda *sizes: torch.randint(0, 50, sizes, generator=g)  # noqa: E731
    return {"user": draw(rows), "items": draw(rows, 3), "batch_size": rows}


@pytest.mark.long(but=1)
@pytest.mark.parametrize("model", [ByItsOwnSize, OnlyDivides, SizeInPart, SizeOfAllRows])
def test_a_batchs_own_size_is_an_input(model, on_ranks):
    assert des.plan(model(), (_batch(5),), ranks=2).rows == 5
    des.verify(model(), (_batch(5),), launch=on_ranks)


def test_a_batchs_own_size_has_to_be_its_rows():
    model = ByItsOwnSize()
    module = des.compile(model, (_batch(5),))
    for rows in (5, 4, 9):
        torch.testing.assert_close(module(_batch(rows)), model(_batch(rows)))
    with pytest.raises(des.InputError, match=r"input \d was the number of rows .* is 3, and there are 4 rows"):
        module(_batch(4) | {"batch_size": 3})


class Best(Table):
    """Takes a number that may be any, the batch's size too."""

    def forward(self, ids: Tensor, k: int) -> Tensor:
        return super().forward(ids) / k


def test_a_number_that_may_be_the_batchs_size_is_asked_for(on_ranks):
    with pytest.raises(des.InputError, match=r"k of the inputs is 6, .* 6 rows.*pass des.BatchSize\(6\)"):
        des.plan(Best(), (IDS, 6), ranks=2)
    with pytest.raises(des.InputError, match=r"BatchSize\(5\), and their tensors have 6 rows"):
        des.plan(Best(), (IDS, des.BatchSize(5)), ranks=2)
    des.verify(Best(), (IDS, des.BatchSize(6)), launch=on_ranks)
    des.verify(Best(), (IDS, 4), launch=on_ranks)  # a number like any other


class Labelled(Table):
    """Gives a loss where there are labels, and weighs by the task's name and by a number."""

    def forward(self, ids: Tensor, label: Tensor | None = None, *, task: str = "click", by: float = 1.0) -> dict:
        scores = super().forward(ids).squeeze(1) * (2.0 if task == "click" else -3.0) * by
        if label is None:
            return {"scores": scores}
        return {"scores": scores, "loss": nn.functional.binary_cross_entropy_with_logits(scores, label)}


LABEL = torch.arange(6) % 2.0
CALLS = (
    ((IDS, LABEL), {}),
    ((), {"label": LABEL, "ids": IDS}),
    ((IDS,), {}),
    ((IDS, None), {}),
    ((), {"ids": IDS, "by": 0.5}),
    ((IDS, LABEL), {"task": "like", "by": 2.0}),
    ((IDS,), {"label": LABEL, "task": "like"}),
)


def _step(model, args, kwargs):
    out = model(*args, **kwargs)
    model.zero_grad()
    out.get("loss", out["scores"].mean()).backward()
    return out["scores"].detach(), model.head.weight.grad.clone()


def _calls(rank, ranks, model):
    module = des.compile(model, CALLS[0], plan={"table": "row_wise"}, loss="row_mean")
    cut = lambda x: x[[slice(4), slice(4, 6)][rank]] if isinstance(x, Tensor) else x  # noqa: E731
    found = [_step(module, map(cut, args), {n: cut(x) for n, x in kwargs.items()}) for args, kwargs in CALLS]
    programs = len(list(module._programs))
    try:
        module(IDS, task="like" if rank else "click")
    except des.RankError as error:
        return found, programs, str(error)
    return found, programs, ""


def test_another_call_than_the_examples_is_captured_anew(on_ranks):
    model = Labelled()
    results = on_ranks(_calls, 2, model)
    for i, (args, kwargs) in enumerate(CALLS):
        scores, gradient = _step(model, args, kwargs)
        torch.testing.assert_close(torch.cat([found[i][0] for found, *_ in results]), scores)
        for found, *_ in results:
            torch.testing.assert_close(found[i][1], gradient)
    for _, programs, different in results:
        assert programs == 6  # keyword and positional are one
        assert "different modes" in different and "['task'] is 'like'" in different


def test_a_number_that_becomes_the_batchs_size_is_refused():
    module = des.compile(Best(), (IDS, 4))
    torch.testing.assert_close(module(IDS, 3), module(IDS, k=4) * 4 / 3)
    with pytest.raises(des.InputError, match="number of rows, and was not so when the model was compiled"):
        module(IDS, 6)


class Hooked(Table):
    """A hook in front of it sees which arguments are positional."""

    def forward(self, ids: Tensor, by: float = 2.0) -> Tensor:
        return super().forward(ids) * by


def test_a_hook_sees_which_arguments_are_positional():
    model = Hooked()
    model.register_forward_pre_hook(lambda _, args: (args[0], *(x + 1 for x in args[1:])))
    module = des.compile(model, (IDS, 3.0))
    torch.testing.assert_close(module(IDS, 3.0), model(IDS, 3.0))
    torch.testing.assert_close(module(IDS, by=3.0), model(IDS, by=3.0))


class Box:
    """Of no known class."""

    def __init__(self, ids: Tensor) -> None:
        self.ids = ids


class Boxed(Table):
    def forward(self, ids: Tensor) -> dict:
        return {"scores": super().forward(ids), "aux": [Box(ids)]}


class InNumPy(Table):
    def forward(self, ids: Tensor) -> tuple[Tensor, np.ndarray]:
        return super().forward(ids), ids.numpy()


class Scripted(Table):
    def __init__(self) -> None:
        super().__init__()
        self.head = torch.jit.script(self.head)


class OnlyFloat32(Table):
    """Its operator has no kernel for float64."""

    def forward(self, ids: Tensor) -> Tensor:
        x = super().forward(ids)
        if x.dtype != torch.float32:
            raise NotImplementedError("'scale' not implemented for 'Double'")
        return 2 * x


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (Boxed, r"(?s)output\['aux'\]\[0\] is a .*Box, .*register_input"),
        (InNumPy, r"output\[1\] is a numpy.ndarray: return a tensor"),
        (Scripted, r"module 'head' is TorchScript's.* the Python module"),
        (OnlyFloat32, r"not in float64.*'scale' not implemented for 'Double' at .*test_unusual.py:\d+.*others"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(model, words):
    with pytest.raises(des.UnsupportedError, match=words):
        des.plan(model(), (IDS,), ranks=2)


def test_torchscript_is_refused_before_it_is_sent_to_ranks():
    with pytest.raises(des.UnsupportedError, match="TorchScript"):
        des.verify(Scripted(), (IDS,))
