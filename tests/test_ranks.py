"""What happens on several real ranks besides a good step: bad input, disagreement, initial weights, checkpoints."""

import copy
import gc
import itertools
import pickle
import re
import warnings

import pytest
import torch
from torch import nn

import descompiler as des
from descompiler.layout.fetches import Fetch
from descompiler.layout.step import StepHeader as HeaderTransfer
from descompiler.runtime.agreement import Call, Header, Kind, Message
from examples.models import MODELS, make_inputs
from tests.harness.cases import cases
from tests.harness.failures import raised
from tests.harness.models import IDS

INPUTS = make_inputs("deepfm", "fields", 8)


def make(seed: int = 0, **options) -> nn.Module:
    torch.manual_seed(seed)
    return MODELS["deepfm"]("fields", **options).double()


def inputs_of(rows: slice = slice(None)):
    return tuple(x[rows].double() if x.is_floating_point() else x[rows] for x in INPUTS)


def _bad_ids(rank, ranks):
    module = des.compile(make(), inputs_of(), plan={"*": "row_wise"})
    dense, ids = inputs_of()
    wrong = ids.clone()
    if rank == 1:
        wrong[3, 1] = 10_000
    text = raised(lambda: module(dense, wrong))
    nested = raised(lambda: module(dense, ids) if rank else module((dense, ids)))
    after = module(dense, ids)
    after.sum().backward()
    return text, nested, torch.isfinite(after).all().item()


def test_bad_input_on_one_rank_raises_on_every_rank(on_ranks):
    for text, nested, fine in on_ranks(_bad_ids, 2):
        assert re.search(r"InputError: rank 1: table .* id 10000 in row 3 of the batch", text)
        assert "rank 0" in nested and "compiled for inputs nested as" in nested
        assert fine, "the next step has to work"


def _floats_for_ids(rank, ranks):
    module = des.compile(make(), inputs_of())
    dense, ids = inputs_of()
    return raised(lambda: module(dense, ids.double() if rank == 0 else ids))


def test_ids_that_are_no_integers(on_ranks):
    for text in on_ranks(_floats_for_ids, 2):
        assert "ids must be integers" in text and "rank 0" in text


def test_what_ranks_tell_each_other_arrives_as_it_was():
    """In as many bytes as plans count."""
    for kind in Kind:
        for number in (0, 2 * 0xFFFFFFFF + 1):
            sent = Header(True, asked=-(1 << 63), gathered=3, rows=4, call=Call(kind, number, "for people"))
            assert Header.decode(sent.encode()) == sent and 8 * len(sent.encode()) == HeaderTransfer.BYTES
    counts = Message(False, asked=1, gathered=2)
    assert Message.decode(counts.encode()) == counts and 8 * len(counts.encode()) == Fetch.COUNTS_BYTES
    assert Call.named("batch norm", Kind.NORM) != Call.named("batch norm") != Call.named("the end")


def _different(rank, ranks, what):
    model = MODELS["deepfm"]("fields", **({"dim": 5} if what == "model" and rank else {})).double()
    plan = {"*": "row_wise" if rank else "table_wise"} if what == "plan" else None
    return raised(lambda: des.compile(model, inputs_of(), plan=plan))


@pytest.mark.parametrize("what", ["model", "plan"])
def test_ranks_that_compile_different_things(on_ranks, what):
    for text in on_ranks(_different, 2, what):
        assert text.startswith(f"RankError: ranks compile different {what}s") and "rank 1" in text


def _other_terms(rank, ranks):
    return raised(lambda: des.compile(make(), inputs_of(), optimizer="adam" if rank else "sgd"))


def test_ranks_that_plan_for_different_terms(on_ranks):
    for text in on_ranks(_other_terms, 2):
        assert text.startswith("RankError: ranks compile different options") and "adam" in text


def _without_a_plan(rank, ranks):
    return raised(lambda: des.compile(make(), inputs_of(), memory_bytes=1000))


@pytest.mark.long
def test_what_the_first_rank_can_not_plan_is_raised_by_every_rank(on_ranks):
    first, second = on_ranks(_without_a_plan, 2)
    assert first == second and first.startswith("PlanError: no plan fits 1,000 B a rank")


def _plan_of(rank, ranks):
    plan = des.compile(make(), inputs_of()).plan
    name = plan.tables[0].name
    edited = plan.edit({name: "replicate"})
    return plan.digest(), edited.digest(), plan.cut_graph().graph["cost"], plan.explain()


@pytest.mark.long
def test_every_rank_has_the_first_ranks_plan_whole(on_ranks):
    first, second = on_ranks(_plan_of, 2)
    assert first == second and first[0] != first[1]


def _other_world(rank, ranks):
    plan = des.plan(make(), inputs_of(), ranks=ranks + 1)
    return raised(lambda: des.compile(make(), inputs_of(), plan=plan))


def test_a_plan_for_another_world_size(on_ranks):
    for text in on_ranks(_other_world, 2):
        assert "PlanError" in text and "3 ranks" in text and "2 ranks" in text


def _modes(rank, ranks):
    module = des.compile(make(), inputs_of())
    module.train(rank == 0)
    return raised(lambda: module(*inputs_of()))


def test_ranks_in_different_modes(on_ranks):
    for text in on_ranks(_modes, 2):
        assert "RankError" in text and "rank 0: runs in mode training" in text and "rank 1: runs in mode eval" in text


def _checkpoint(rank, ranks, form):
    model = make(batch_norm=True)
    module = des.compile(make(rank, batch_norm=True), inputs_of(), plan={"*": form})  # rank 0 has the model's weights
    same = all(torch.equal(v, model.state_dict()[n]) for n, v in des.full_state_dict(module).items())
    other = {n: torch.randn_like(v) if v.is_floating_point() else v + 1 for n, v in model.state_dict().items()}
    des.load_full_state_dict(module, other)
    back = des.full_state_dict(module)
    return same, list(back) == list(model.state_dict()), all(torch.equal(back[n], v) for n, v in other.items())


@pytest.mark.parametrize("form", ["table_wise", "row_wise", "column_wise"])
def test_state_dict_round_trip(on_ranks, form):
    assert on_ranks(_checkpoint, 3, form) == [(True, True, True)] * 3


class Unsaved(nn.Module):
    """Offsets that are in no state_dict, and a scale that is."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(9, 4)
        self.register_buffer("offsets", torch.arange(3), persistent=False)
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, ids):
        return self.table((ids + self.offsets) % 9).sum(1) * self.scale


def test_buffers_that_are_not_saved():
    model = Unsaved()
    module = des.compile(copy.deepcopy(model), (IDS,))
    assert module.state_dict().keys() == model.state_dict().keys() == {"table.weight", "scale"}
    assert torch.equal(module(IDS), model(IDS))


def _from_meta(rank, ranks, form):
    with torch.device("meta"):
        model = MODELS["deepfm"]("fields")
    return des.full_state_dict(des.compile(model, INPUTS, plan={"*": form}, seed=5))


def test_weights_of_a_meta_model_do_not_depend_on_ranks(on_ranks):
    with torch.device("meta"):
        model = MODELS["deepfm"]("fields")
    expected = des.full_state_dict(des.compile(model, INPUTS, seed=5))
    for ranks, form in ((2, "row_wise"), (3, "column_wise")):
        for state in on_ranks(_from_meta, ranks, form):
            assert all(torch.equal(state[n], v) for n, v in expected.items())


class Attends(nn.Module):
    """Attention, which initialises its child; items that are the output layer too; batch norm."""

    def __init__(self):
        super().__init__()
        self.out = nn.Linear(4, 9)
        self.items = nn.Embedding(9, 4, padding_idx=0)
        self.out.weight = self.items.weight
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, ids):
        e = self.items(ids)
        return self.out(self.norm(self.attention(e, e, e)[0].sum(1)))


class InPart(Attends):
    def forward(self, ids):
        return super().forward(torch.tensor(ids.tolist()))


def _partly_from_meta(rank, ranks, cls, in_place):
    """Everything is on the meta device, but the bias of the output layer."""
    with torch.device("meta"):
        model = cls()
    model.out.bias = nn.Parameter(torch.arange(9.0) + 100 * rank)
    module = des.compile(model, (IDS,), plan={"*": "row_wise"}, seed=5, in_place=in_place)
    state = des.full_state_dict(module)
    module(IDS).sum().backward()
    return state, des.module_of(module).coverage().rung


@pytest.mark.parametrize(("cls", "rung", "in_place"), [(Attends, "export", False), (InPart, "partial", True)])
def test_what_is_not_on_meta_keeps_its_values(on_ranks, cls, rung, in_place):
    expected, _ = _partly_from_meta(0, 1, Attends, False)
    assert expected["out.bias"].tolist() == list(range(9))
    assert not expected["items.weight"][0].any() and expected["items.weight"][1:].std() > 0.5  # as a table, not a layer
    assert not expected["attention.out_proj.bias"].any() and expected["attention.in_proj_weight"].std() > 0.1
    for state, found in on_ranks(_partly_from_meta, 2, cls, in_place):
        assert found == rung and all(torch.equal(state[n], v) for n, v in expected.items())


class LosesValues(Attends):
    def __init__(self):
        super().__init__()
        self.register_buffer("positions", torch.arange(3))
        self.offsets = [torch.arange(3)]


class OwnParameter(Attends):
    def __init__(self):
        super().__init__()
        self.gate = nn.Parameter(torch.ones(4))


@pytest.mark.parametrize(
    ("cls", "expected"),
    [
        (LosesValues, "'positions', 'offsets' of the model are on the meta device.*device='cpu'"),
        (OwnParameter, r"'OwnParameter' \(OwnParameter\) is on meta and has no reset_parameters.* to initialise gate"),
    ],
)
def test_what_can_not_be_on_meta_is_named(cls, expected):
    with torch.device("meta"):
        model = cls()
    with pytest.raises(des.UnsupportedError, match=expected):
        des.compile(model, (IDS,))


class AsksForDtypes(nn.Module):
    """Casts that did nothing when it was traced, a dtype that was asked for, and float32 whatever the weights are."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(9, 4)
        self.norm = nn.BatchNorm1d(5)
        self.top = nn.Linear(5, 1)

    def forward(self, ids, x):
        x = torch.log1p(x.to(self.top.weight.dtype)) + x.float().exp()
        e = self.table(ids).sum(1)
        scale = torch.full((e.shape[0], 1), 0.1, dtype=e.dtype)
        return self.top(self.norm(torch.cat([e * scale, x.to(e.dtype)[:, None]], 1)))


def _cast(rank, ranks, when, in_place):
    """Cast to float64 and fed float32 and float64 inputs: the largest difference from one process."""
    torch.manual_seed(1)
    inputs = IDS, torch.rand(8, generator=torch.Generator().manual_seed(2))
    model, alone = AsksForDtypes(), AsksForDtypes()
    compiled = des.compile(model, inputs, plan={"*": "row_wise"}, loss="sum", in_place=in_place)
    module, rows = des.module_of(compiled), slice(0, 3) if rank == 0 else slice(3, 8)
    if when == "after a step":
        compiled(*(x[rows] for x in inputs)).sum().backward()
    compiled.double().zero_grad()
    alone.double().load_state_dict(des.full_state_dict(compiled))
    worst = []
    for step in range(4):
        given = inputs[0], inputs[1].double() if step % 2 else inputs[1]
        for m in (compiled, alone):
            m.train(step >= 2).zero_grad()
        got, expected = compiled(*(x[rows] for x in given)), alone(*given)
        got.square().sum().backward()
        expected.square().sum().backward()
        worst.append(float((got - expected[rows]).abs().max()))
        for name, p in module.named_parameters():
            want = module.pieces(name).cut(alone.get_parameter(name).grad, rank)
            worst.append(float((p.grad - want).abs().sum()))
    predicted = module.plan.traffic(rank, [3, 5], unique=module.unique())
    return module.coverage().rung, max(worst), predicted == module.traffic()


@pytest.mark.parametrize(("when", "in_place"), [("before a step", False), ("after a step", True)])
def test_cast_after_it_was_compiled(on_ranks, when, in_place):
    for rung, worst, as_predicted in on_ranks(_cast, 2, when, in_place):
        assert rung == "export" and worst < 1e-12 and (as_predicted or in_place)


def test_a_model_in_bfloat16_with_buffers():
    model = AsksForDtypes().bfloat16()
    inputs = IDS, torch.rand(8).bfloat16()
    module = des.compile(copy.deepcopy(model), inputs)
    assert torch.equal(module(*inputs), model(*inputs)), "on one rank, bit for bit"


def test_casts_that_do_nothing_are_captured_as_a_graph():
    assert des.compile(AsksForDtypes(), (IDS, torch.rand(8))).coverage().rung == "export"


def _losses(rank, ranks, loss):
    model, counts = make(), [2, 6]
    module = des.compile(model, inputs_of(), plan={"*": "row_wise"}, loss=loss)
    first = sum(counts[:rank])
    module(*inputs_of(slice(first, first + counts[rank]))).square().mean().backward()
    parts = torch.split(model(*inputs_of()).square(), counts)
    (sum(p.mean() for p in parts) / 2 if loss == "rank_mean" else torch.cat(parts).mean()).backward()
    worst = 0.0
    for n, p in module.named_parameters():
        expected = module.pieces(n).cut(dict(model.named_parameters())[n].grad, rank)
        if expected.numel():
            worst = max(worst, float((p.grad - expected).abs().max() / expected.abs().max().clamp(min=1e-9)))
    return worst


@pytest.mark.parametrize("loss", ["rank_mean", "row_mean"])
def test_gradients_by_the_convention_of_the_loss(on_ranks, loss):
    assert max(on_ranks(_losses, 2, loss)) < 1e-10


class Tied(nn.Module):
    """One table, registered twice and looked up twice."""

    def __init__(self):
        super().__init__()
        self.user = nn.Embedding(9, 4)
        self.item = nn.Embedding(9, 4)
        self.item.weight = self.user.weight
        self.linear = nn.Linear(4, 1)

    def forward(self, ids):
        return self.linear(self.user(ids[:, 0]) * self.item(ids[:, 1]))


def test_tied_tables(on_ranks):
    des.verify(
        Tied(),
        (torch.randint(9, (8, 2)),),
        plans=[{"*": f} for f in ("replicate", "table_wise", "row_wise", "column_wise")],
        launch=on_ranks,
    )


class TiedInPart(Tied):
    def forward(self, ids):
        return super().forward(torch.tensor(ids.tolist()))


def _averaged(rank, ranks, cls):
    """An average of weights, evaluated, and trained by itself; what a copy can't be."""
    torch.manual_seed(1)
    model = cls().double()
    alone = copy.deepcopy(model)
    module = des.compile(model, (IDS,), plan={"*": "row_wise"}, loss="sum")
    rows = slice(0, 3) if rank == 0 else slice(3, 8)
    averages = [torch.optim.swa_utils.AveragedModel(m) for m in (module, alone)]
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (module, alone)]
    for step in range(3):
        ids = IDS.roll(step, 0)
        module(ids[rows]).sin().sum().backward()
        alone(ids).sin().sum().backward()
        for o, average, m in zip(optimizers, averages, (module, alone), strict=True):
            o.step()
            o.zero_grad()
            average.update_parameters(m)
    copied, expected = (average.module for average in averages)
    out, want = copied(IDS[rows]), expected(IDS)
    out.sin().sum().backward()
    want.sin().sum().backward()
    worst = [float((out - want[rows]).abs().max())]
    for name, p in copied.named_parameters():
        gradient = copied.pieces(name).cut(expected.get_parameter(name).grad, rank)
        worst.append(float((p.grad - gradient).abs().sum()))
    assert all(p.grad is None for p in module.parameters())
    in_place = des.compile(cls().double(), (IDS,), in_place=True)
    texts = raised(lambda: pickle.dumps(module)), raised(lambda: copy.deepcopy(in_place))
    return max(worst), module.coverage().rung, *texts


@pytest.mark.parametrize(("cls", "rung"), [(Tied, "export"), (TiedInPart, "partial")])
def test_copies_of_a_compiled_module(on_ranks, cls, rung):
    for worst, found, pickled, in_place in on_ranks(_averaged, 2, cls):
        assert worst < 1e-12 and found == rung
        assert "can't be pickled: save des.full_state_dict" in pickled
        assert "compiled in place can't be copied" in in_place


def _no_tables(rank, ranks):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1)).double()
    reference = copy.deepcopy(model)
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        module = des.compile(model, (torch.randn(4, 3).double(),), loss="sum")
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).double()
    module(x.chunk(2)[rank]).sum().backward()
    reference(x).sum().backward()
    expected = [p.grad for p in reference.parameters()]
    same = all(torch.allclose(p.grad, e, rtol=1e-10) for p, e in zip(module.parameters(), expected, strict=True))
    return [str(n.message) for n in notes if "weights-rich" in str(n.message)], same, module.traffic().total


def test_a_model_without_tables_is_data_parallel_and_says_so(on_ranks):
    results = on_ranks(_no_tables, 2)
    assert [len(notes) for notes, _, _ in results] == [1, 0] and "data parallel" in results[0][0][0]
    assert all(same and sent > 0 for _, same, sent in results)


def _deferred(rank, ranks):
    model = make()
    module = des.compile(model, plan={"*": "row_wise"}).eval()
    before = [raised(lambda: list(module.parameters())), raised(lambda: module.plan), raised(module.state_dict)]
    rows = slice(0, 3) if rank else slice(3, 8)
    with torch.no_grad():
        got, expected = module(*inputs_of(rows)), model.eval()(*inputs_of(rows))
    return before, torch.allclose(got, expected, rtol=1e-10), type(module).__name__, len(list(module.parameters()))


def test_compile_at_the_first_forward(on_ranks):
    for before, same, kind, parameters in on_ranks(_deferred, 2):
        assert all("compiled by its first forward" in text for text in before)
        assert same and kind == "DistributedModule" and parameters > 0


def _fails_on_one_rank(rank, ranks):
    dense, ids = inputs_of()
    return raised(lambda: des.compile(make(), (dense[:, :1] if rank else dense, ids)))


def test_example_inputs_that_one_rank_can_not_run(on_ranks):
    first, second = on_ranks(_fails_on_one_rank, 2)
    assert first.startswith("RankError: rank 1 could not compile: InputError")
    assert second.startswith("InputError: the model can't run example_inputs")


def _backward_orders(rank, ranks, order):
    model = make(batch_norm=True)
    reference = copy.deepcopy(model)
    module = des.compile(model, inputs_of(), plan={"*": "row_wise", "first_order*": "replicate"}, loss="sum")
    mine = slice(0, 3) if rank == 0 else slice(3, 8)
    for step in range(3):
        for m, rows in ((module, mine), (reference, slice(None))):
            if order == "forwards first":
                a, b = m(*inputs_of(rows)), m(*inputs_of(rows))
                a.square().sum().backward()
                b.sin().sum().backward()
            elif order == "graph kept":
                a = m(*inputs_of(rows)).square().sum()
                a.backward(retain_graph=True)
                a.backward()
            elif order == "accumulated":
                m(*inputs_of(rows)).square().sum().backward()
                m(*inputs_of(rows)).sin().sum().backward()
            else:
                m(*inputs_of(rows))
                m(*inputs_of(rows)).square().sum().backward()
        for m in (module, reference):
            for p in m.parameters():
                if step == 2:
                    continue
                p.grad = None
    worst = 0.0
    for n, p in module.named_parameters():
        whole = dict(reference.named_parameters())[n].grad
        part = module.pieces(n).cut(whole, rank)
        if part.numel() and whole.abs().max() > 1e-12:
            worst = max(worst, float((p.grad - part).abs().max() / whole.abs().max()))
    return worst


@pytest.mark.parametrize("order", ["forwards first", "graph kept", "accumulated", "a forward without backward"])
def test_forwards_and_backwards_in_any_order(on_ranks, order):
    assert max(on_ranks(_backward_orders, 2, order)) < 1e-10


def _from_samples(rank, ranks):
    model = make()
    dense, ids = inputs_of()
    generator = torch.Generator().manual_seed(rank)  # ranks have other samples: rank 0's are everyone's
    samples = [(dense, ids[torch.randint(8, (8,), generator=generator)]) for _ in range(3)]
    module = des.compile(model, inputs_of(), plan={"*": "unique_rows"}, samples=samples, loss="sum")
    rows = slice(0, 3) if rank else slice(3, 8)
    module(*inputs_of(rows)).square().sum().backward()
    model(*inputs_of()).square().sum().backward()
    whole = {n: p.grad for n, p in model.named_parameters()}
    errors = [
        float((p.grad - module.pieces(n).cut(whole[n], rank)).abs().max())
        for n, p in module.named_parameters()
        if p.numel()
    ]
    return max(errors), "assumed: Zipf" in module.plan.explain()


def test_a_plan_from_samples(on_ranks):
    for error, assumed in on_ranks(_from_samples, 2):
        assert error < 1e-12 and not assumed


def _frozen_afterwards(rank, ranks):
    """Everything but the tables is frozen after compile, and thawed again."""
    model = make()
    reference, module = copy.deepcopy(model), des.compile(model, inputs_of(), plan={"*": "row_wise"}, loss="sum")
    worst = 0.0
    for trained in (False, True):
        for m in (reference, module):
            m.zero_grad()
            for name, p in m.named_parameters():
                p.requires_grad_(trained or not module.plan.pieces[name].is_replicated)
        reference(*inputs_of()).square().sum().backward()
        module(*inputs_of(slice(4 * rank, 4 * rank + 4))).square().sum().backward()
        for (name, p), q in zip(module.named_parameters(), reference.parameters(), strict=True):
            own = torch.zeros_like(p) if p.grad is None else p.grad
            whole = torch.zeros_like(q) if q.grad is None else q.grad
            worst = max([worst, *(own - module.pieces(name).cut(whole, rank)).abs().flatten().tolist()])
    return worst


def test_replicated_parameters_that_are_all_frozen_after_compile(on_ranks):
    for worst in on_ranks(_frozen_afterwards, 2):
        assert worst < 1e-12


class Contrast(nn.Module):
    """One value per row, which depends on all rows; a layer that only chooses."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(50, 6)
        self.layer, self.chooser, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(3, 1)

    def forward(self, ids):
        x = self.layer(self.table(ids)).tanh()
        chosen = self.chooser(x).topk(3).indices
        return self.last(self.compared(x).gather(1, chosen)).tanh()

    def compared(self, x):
        return (x - x.max(0).values) * (x @ x.t()).mean()


class Branching(Contrast):
    """Each row by itself; a part of it is a leaf."""

    def compared(self, x):
        return x if float(x.sum()) > 1e6 else 2 * x


class OwnForward(Branching):
    """The user's own forward runs."""

    def forward(self, ids):
        scale = self.table.weight[ids].mean(1, keepdim=True) if (ids == 3).any() else 1
        return super().forward(ids) * scale


def _thawed(rank, ranks, cls, names, in_place):
    """Parameters that are frozen when the model is compiled are trained, and frozen again."""
    torch.manual_seed(0)
    model, ids = cls().double(), torch.arange(8) % 5
    for name in names:
        model.get_submodule(name).requires_grad_(False)
    reference = copy.deepcopy(model)
    module = des.compile(model, (ids,), plan={"*": "row_wise"}, in_place=in_place, loss="sum")
    worst = 0.0
    for step in range(4):
        if step == 2 and not in_place:
            module = copy.deepcopy(module)
        for m in (reference, module):
            m.zero_grad()
            for name in names:
                m.get_submodule(name).requires_grad_(step in (1, 2))
        reference(ids).square().sum().backward()
        module(ids[:3] if rank else ids[3:]).square().sum().backward()
        for (name, p), q in zip(module.named_parameters(), reference.parameters(), strict=True):
            own = torch.zeros_like(p) if p.grad is None else p.grad
            whole = torch.zeros_like(q) if q.grad is None else q.grad
            error = own - des.module_of(module).pieces(name).cut(whole, rank)
            worst = max([worst, *error.abs().flatten().tolist()])
    return worst


TABLE, BOTH, CHOOSER, DENSE = ("table",), ("table", "layer"), ("chooser",), ("layer", "chooser", "last")
FROZEN = list(itertools.product([Contrast, Branching, OwnForward], [TABLE, BOTH, CHOOSER, DENSE], [False, True]))
FROZEN_ALWAYS = (
    *((Contrast, BOTH, False), (Contrast, CHOOSER, True), (Branching, TABLE, False), (Contrast, DENSE, False)),
    (OwnForward, BOTH, False),
)


@pytest.mark.parametrize(("cls", "names", "in_place"), cases(FROZEN, FROZEN_ALWAYS))
def test_parameters_that_are_frozen_at_compile_and_trained_later(on_ranks, cls, names, in_place):
    for worst in on_ranks(_thawed, 2, cls, names, in_place):
        assert worst < 1e-12


def _frozen_on_one_rank(rank, ranks, cls):
    model, ids = cls().double(), torch.arange(8) % 5
    module = des.compile(model, (ids,), plan={"*": "row_wise"}, seed=1)
    module.get_submodule("layer" if rank else "chooser").requires_grad_(False)
    return raised(lambda: module(ids).sum().backward())


@pytest.mark.parametrize("cls", [Contrast, Branching, OwnForward])
def test_parameters_that_are_frozen_on_one_rank(on_ranks, cls):
    for text in on_ranks(_frozen_on_one_rank, 2, cls):
        assert text.startswith("RankError: ") and "2 parameters frozen" in text


def _steps_in_backward(rank, ranks, kind):
    """Largest difference of weights from one process, where optimisers step as gradients are accumulated."""
    model, options = make(), {"in_place": True} if kind == "in place" else {}
    reference = copy.deepcopy(model)
    module = des.compile(model, inputs_of(), plan={"*": "row_wise"}, loss="sum", **options)
    calls = []
    for m in (module, reference):
        for p in m.parameters():
            optimizer = torch.optim.SGD([p], 0.01, momentum=0.9)

            def step(p, optimizer=optimizer):
                calls.append(p.grad is not None)
                optimizer.step()
                optimizer.zero_grad()

            p.register_post_accumulate_grad_hook(step)
    mine = slice(0, 3) if rank == 0 else slice(3, 8)
    for _ in range(3):
        module(*inputs_of(mine)).square().sum().backward()
        # the convention: gradients are averages over ranks of what a sum over rows is, times their number
        reference(*inputs_of()).square().sum().backward()
    whole = des.full_state_dict(module)
    worst = max(float((whole[n] - x).abs().max()) for n, x in reference.state_dict().items())
    return worst, all(calls), len(calls)


@pytest.mark.parametrize("kind", ["emitted", "in place"])
def test_an_optimiser_may_step_in_backward(on_ranks, kind):
    """Hooks that wait for an accumulated gradient see the average over ranks."""
    for worst, with_gradients, calls in on_ranks(_steps_in_backward, 2, kind):
        assert worst < 1e-12 and with_gradients and calls > 6


def _frozen_and_thawed(rank, ranks):
    """Largest difference of weights from one process, where parameters are frozen and thawed between steps."""
    model = make()
    reference, module = copy.deepcopy(model), des.compile(model, inputs_of(), plan={"*": "row_wise"}, loss="sum")
    mine, worst = slice(0, 3) if rank == 0 else slice(3, 8), 0.0
    gc.disable()  # what watched the parameters before has to let go at once
    optimizers = [torch.optim.SGD(m.parameters(), 0.01) for m in (module, reference)]
    for trained in (True, False, True):
        for m, inputs in ((module, inputs_of(mine)), (reference, inputs_of())):
            dict(m.named_parameters())["deep.0.bias"].requires_grad_(trained)
            m(*inputs).square().sum().backward()
        for o in optimizers:
            o.step()
            o.zero_grad()
        whole = des.full_state_dict(module)
        worst = max(worst, *(float((whole[n] - x).abs().max()) for n, x in reference.state_dict().items()))
    return worst


def test_parameters_may_be_frozen_and_thawed_between_steps(on_ranks):
    assert max(on_ranks(_frozen_and_thawed, 2)) < 1e-12
