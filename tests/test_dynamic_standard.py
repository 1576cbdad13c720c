"""What PyTorch's own calls do to a dynamic table: exact, or refused by name."""

import copy

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrizations, prune

import descompiler as des
from descompiler.dynamic import AfterSightings, Capacity, Constant, DynamicEmbedding
from tests.harness.dynamic import contents

IDS = torch.arange


def of(**options):
    table = DynamicEmbedding(2, name="user", dtype=torch.float64, **options)
    table(IDS(5))
    return table


def step(table, optimizer, ids):
    table(ids).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def adagrad(table):
    return torch.optim.Adagrad(table.parameters(), lr=0.1)


def with_other_weight(table):
    table.weight = nn.Parameter(table.weight.detach().clone())
    return table(IDS(2))


class Scaled(DynamicEmbedding):
    def forward(self, ids):
        return super().forward(ids) * 3


def hooked(table):
    table.register_forward_hook(lambda module, ids, rows: rows * 2)
    return table


@pytest.mark.parametrize(
    ("make", "text"),
    [(lambda: Scaled(2, name="user"), "Scaled 'user' has a forward"), (lambda: hooked(of()), "'user' has hooks")],
)
def test_calls_that_do_more_are_not_compiled(make, text):
    """What they add would be left out."""
    with pytest.raises(des.UnsupportedError, match=text):
        des.compile(nn.Sequential(make(), nn.Linear(2, 1)), (IDS(3),))


def with_weight_of(table):
    table.weight = of().weight
    return table.state_dict()


def pruned(table):
    prune.l1_unstructured(table, "weight", amount=0.5)
    return table.to_embedding()


@pytest.mark.parametrize(
    "use",
    [
        lambda t: torch.func.functional_call(t, {"weight": t.weight.detach() * 2}, (IDS(2),)),
        lambda t: parametrizations.weight_norm(t, "weight")(IDS(2)),
        with_other_weight,
        with_weight_of,
        pruned,
        lambda t: des.dynamic.stand_in.stand_ins(parametrizations.weight_norm(t, "weight"), torch.device("cpu")),
    ],
)
def test_a_weight_that_has_not_the_rows_is_refused(use):
    with pytest.raises(des.UnsupportedError, match=r"dynamic table 'user' are in the parameter.*another tensor"):
        use(of())


def test_rows_that_are_put_in_their_place_are_the_rows():
    """``weight.data = ...``, as averages of weights are swapped in: also before a step, and before rows come or go."""
    one, other = (of(evict=Capacity(64)) for _ in range(2))
    opts = adagrad(one), adagrad(other)
    for first in (0, 40, 90):
        one.weight.data = one.weight.data * 0.5
        with torch.no_grad():
            other.weight.mul_(0.5)
        for table in (one, other):
            table(IDS(first, first + 60)).square().sum().backward()
        one.weight.data = one.weight.data.clone()
        for opt in opts:
            opt.step()
            opt.zero_grad()
        assert contents(one) == contents(other)
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(one.parameters()) * 3, one.parameters())
    assert torch.equal(one(one.resident()), other(one.resident()) * 3)
    one.weight.data = torch.zeros(3, 2, dtype=torch.float64)
    for use in (lambda: one(IDS(2)), one.state_dict, one.end_step):
        with pytest.raises(des.UnsupportedError, match=r"has put \(3, 2\) in the place"):
            use()


@pytest.mark.parametrize("write", [nn.init.xavier_uniform_, lambda weight: weight.data.normal_()])
def test_the_default_row_stays_zeros(write):
    """A loop that initialises all parameters would give ids without rows its numbers, in one process alone."""
    table = of()
    write(table.weight)
    with pytest.raises(des.UnsupportedError, match=r"default row of dynamic table 'user'.*init="):
        table.state_dict()
    for use in (lambda: table(IDS(2)), lambda: des.compile(nn.Sequential(table), (IDS(2),))):
        with pytest.raises(des.UnsupportedError, match=r"default row of dynamic table 'user'"):
            use()


def traced(use):
    return lambda table: use(table.eval())


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
@pytest.mark.parametrize(
    "use",
    [
        lambda t: torch.vmap(t)(IDS(4).view(2, 2)),
        lambda t: torch.func.grad(lambda x: (t(IDS(2)) * x).sum())(torch.ones(2, dtype=torch.float64)),
        traced(lambda t: torch.jit.trace(t, (IDS(2),))),
        traced(lambda t: make_fx(t)(IDS(2))),
        traced(lambda t: torch.export.export(t, (IDS(2),))),
    ],
)
def test_what_records_a_lookup_is_refused(use):
    """Who has a row would be known of the example alone."""
    with pytest.raises(des.UnsupportedError, match=r"DynamicEmbedding 'user' is (traced|transformed)"):
        use(of())


def test_torch_compile_leaves_lookups_to_python():
    model = nn.Sequential(of(evict=Capacity(64)), nn.Linear(2, 1, dtype=torch.float64))
    other = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager")
    opts = adagrad(model), adagrad(other)
    for first in (0, 300, 310):
        step(compiled, opts[0], IDS(first, first + 50))
        step(other, opts[1], IDS(first, first + 50))
    assert torch.equal(compiled.eval()(IDS(400)), other.eval()(IDS(400)))
    assert contents(model[0]) == contents(other[0])


def test_what_inference_mode_makes_is_trained_later():
    options = {"admit": AfterSightings(2), "evict": Capacity(64, by="lfu")}
    known = of(**options)
    for _ in range(2):
        known.end_step()
        known(IDS(70))
    with torch.inference_mode():
        made, loaded, copied = of(**options), of(**options), copy.deepcopy(known)
        loaded.load_state_dict(known.state_dict())
        for table in (made, loaded, copied, known):
            table.end_step()
            table(IDS(3000))
            table.end_step()
    tables = [loaded, copied, known]
    for table in (*tables, made):
        step(table, adagrad(table), IDS(2900, 3000))
    assert all(contents(table) == contents(known) for table in tables) and len(made) > 50


def test_a_shallow_copy_is_the_table():
    """As of any module: its parameters are the original's, and so are its rows."""
    table = of(init=Constant(1.0))
    copied = copy.copy(table)
    copied(IDS(4000))
    step(table, torch.optim.SGD(table.parameters(), lr=1.0), IDS(3))
    assert copied(IDS(3)).tolist() == table(IDS(3)).tolist() == [[-1.0, -1.0]] * 3
    assert len(copied) == len(table) == 4000 and copied.weight is table.weight


def test_a_state_has_what_a_table_knows_and_no_more():
    model = nn.Sequential(of())
    state = model.state_dict()
    with pytest.raises(RuntimeError, match=r"Unexpected.*0\.rows"):
        model.load_state_dict(state | {"0.rows": torch.ones(1)})
    model.load_state_dict(state | {"0.rows": torch.ones(1)}, strict=False)
    with pytest.raises(des.InputError, match="is damaged: 6 rows, and ids, resident"):
        of().load_state_dict({k.removeprefix("0."): x[:2] if x.shape == (6,) else x for k, x in state.items()})


def test_a_table_that_is_made_on_meta_has_its_rows_elsewhere():
    """As models are that are too large to be made twice; what fills them afterwards leaves the default row."""
    with torch.device("meta"):
        model = nn.Sequential(DynamicEmbedding(2, init=Constant(1.0)), nn.Linear(2, 1))
    assert model[1].weight.is_meta and not model[0].weight.is_meta
    model._apply(lambda x: torch.full_like(x, 7.0, device="cpu"))
    assert model[0](IDS(2)).tolist() == [[1.0, 1.0]] * 2
    assert model[0].eval()(IDS(2, 3)).tolist() == [[0.0, 0.0]]
