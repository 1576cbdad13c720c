"""`torch.compile` of a compiled module: a graph for each stage between two exchanges, and nothing else is different."""

import copy

import pytest
import torch
from torch import fx, nn

import descompiler as des
from descompiler.check import compare
from descompiler.emit.stages import Stage, staged
from descompiler.examples import MODELS, DeepFM, make_inputs
from tests.harness.cases import cases
from tests.harness.plans import LOOKED_UP

SIZES = [50, 31, 7]
COUNTS = ([3, 3], [5, 2], [7, 3], [4, 0], [2, 8])
"""Rows of each rank, by step: the second one is the last that dynamo compiles for, but for no row (and for one)."""


class Counting:
    """A backend that counts the graphs that it is given."""

    def __init__(self, backend: str):
        self.backend, self.graphs = torch._dynamo.lookup_backend(backend), 0

    def __call__(self, module, inputs):
        self.graphs += 1
        return self.backend(module, inputs)


def _batch(rows, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randint(n, (rows,), generator=generator) for n in SIZES], 1)
    return torch.randn(rows, 3, generator=generator, dtype=torch.float64), ids


def _optimizers(module, fused):
    tables = [p for n, p in module.named_parameters() if "tables" in n]
    if not fused:
        return [torch.optim.Adagrad(module.parameters(), lr=0.05, eps=0.05)]
    chosen = {id(p) for p in tables}
    rest = [p for p in module.parameters() if id(p) not in chosen]
    des.fuse_optimizer(module, torch.optim.Adagrad, params=tables, lr=0.05, eps=0.05)
    return [torch.optim.Adagrad(rest, lr=0.05, eps=0.05)]


def _sent(module):
    """Calls of the runtime, and layers: in stages, in the place of these."""
    found = []
    for n in module.graph.nodes:
        if n.op == "call_module":
            found += _sent(module.get_submodule(n.target).program)
        elif n.target is torch.ops.aten.linear.default:
            found.append("linear")
        elif n.op == "call_method" or "fetch" in getattr(n.target, "__name__", ""):
            found.append(str(n.target))
    return found


def _trained(rank, ranks, form, how, fused, name):
    """By step the graphs so far, and the stages of the program."""
    torch.manual_seed(0)
    model = DeepFM(SIZES, n_dense=3, dim=4, hidden=(8,), sparse=True).double()
    module = des.compile(copy.deepcopy(model), _batch(6, 0), plan={"*": form}, loss="sum")
    backend, call = Counting(name), module
    if how == "module.compile":
        module.compile(backend=backend)
    else:
        call = torch.compile(module if how == "torch.compile" else lambda *x: module(*x) * 1.0, backend=backend)
    optimizers = [torch.optim.Adagrad(model.parameters(), lr=0.05, eps=0.05), *_optimizers(module, fused)]
    graphs = []
    for step, of_ranks in enumerate(COUNTS):
        counts = of_ranks[:ranks]
        own, (dense, ids) = slice(sum(counts[:rank]), sum(counts[: rank + 1])), _batch(sum(counts), step)
        expected, got = model(dense, ids), call(dense[own].clone(), ids[own].clone())
        torch.testing.assert_close(got, expected[own], rtol=1e-10, atol=1e-12)
        expected.square().sum().backward()
        got.square().sum().backward()
        assert module.traffic() == module.predicted_traffic()
        for o in optimizers:
            o.step()
            o.zero_grad()
        graphs.append(backend.graphs)
    weights = des.full_state_dict(module)
    for name, x in model.state_dict().items():
        torch.testing.assert_close(weights[name], x, rtol=1e-10, atol=1e-12)
    emitted = module._sized().emitted.module
    program = staged(emitted)
    assert _sent(program) == _sent(emitted)
    return graphs, sum(isinstance(m, Stage) for m in program.modules())


@pytest.mark.long(but=1)
@pytest.mark.parametrize(
    ("ranks", "form", "how", "fused", "backend"),
    [
        (2, "row_wise", "torch.compile", True, "eager"),
        (1, "unique_rows", "module.compile", False, "aot_eager"),
        *(pytest.param(2, form, "torch.compile", False, "aot_eager", marks=pytest.mark.slow) for form in LOOKED_UP),
        pytest.param(1, "row_wise", "torch.compile", True, "aot_eager", marks=pytest.mark.slow),
        pytest.param(2, "table_wise", "module.compile", True, "aot_eager", marks=pytest.mark.slow),
        pytest.param(2, "unique_rows", "torch.compile", True, "aot_eager", marks=pytest.mark.slow),
        pytest.param(2, "row_wise", "a step", False, "aot_eager", marks=pytest.mark.slow),
    ],
)
def test_each_stage_is_one_graph_and_training_is_the_originals(ranks, form, how, fused, backend, on_ranks):
    around = how == "a step"  # what the user computes behind the module is a graph, too
    for rank, (graphs, stages) in enumerate(on_ranks(_trained, ranks, form, how, fused, backend)):
        assert stages == (1 if ranks == 1 else 2)
        stages += around
        # as any function: for the first number of rows, and for every other; 0 and 1 are sizes of their own
        empty = 2 * stages if rank == 0 else 3 * stages
        assert graphs == [stages, 2 * stages, 2 * stages, empty, empty], rank


class Tasks(nn.Module):
    """Two outputs, of which each has a layer of its own."""

    def __init__(self):
        super().__init__()
        self.table, self.a, self.b = nn.Embedding(50, 6), nn.Linear(6, 1), nn.Linear(6, 1)

    def forward(self, ids):
        x = self.table(ids)
        return self.a(x), self.b(x)


IDS = torch.arange(8)


def _of_one_output(rank, ranks):
    """The parameters without a gradient where a loss uses one output."""
    module = des.compile(Tasks(), (IDS,), plan={"*": "row_wise"})
    backend = Counting("aot_eager")
    module.compile(backend=backend)
    own = IDS[rank * len(IDS) // ranks : (rank + 1) * len(IDS) // ranks]
    module(own)[0].sum().backward()
    return [n for n, p in module.named_parameters() if p.grad is None], backend.graphs


@pytest.mark.long(but=1)
@pytest.mark.parametrize("ranks", [1, 2])
def test_what_no_loss_uses_has_no_gradient(ranks, on_ranks):
    """A compiled graph gives it zeros: on several ranks these are dropped, on one the model is not compiled."""
    for without, graphs in on_ranks(_of_one_output, ranks):
        assert without == ["b.weight", "b.bias"] and (graphs > 0) == (ranks > 1)


class Layer(nn.Module):
    """A layer of which each rank computes its part, from vectors that it has columns of."""

    def __init__(self):
        super().__init__()
        self.table, self.top = nn.Embedding(50, 6), nn.Linear(18, 1)

    def forward(self, ids):
        return self.top((self.table(ids) * 2.0).flatten(1)).squeeze(1)


def _layer(rank, ranks, deferred):
    """The graphs of a model whose layer is divided; its gradients are compared."""
    ids = torch.arange(24).reshape(8, 3)
    model = Layer().double()
    arguments = () if deferred else ((ids,),)
    module = des.compile(copy.deepcopy(model), *arguments, plan={"*": "column_wise"}, loss="sum", cluster="bytes")
    backend = Counting("aot_eager")
    module.compile(backend=backend)
    module(ids[4 * rank : 4 * rank + 4]).square().sum().backward()
    model(ids).square().sum().backward()
    pieces = module.plan.pieces
    assert not all(pieces[n].is_replicated for n in ("top.weight", "table.weight"))
    for name, p in module.named_parameters():
        expected = pieces[name].cut(dict(model.named_parameters())[name].grad, rank)
        torch.testing.assert_close(des.local_tensor(p.grad), expected, rtol=1e-10, atol=1e-12)
    return backend.graphs


@pytest.mark.long
def test_pieces_of_a_layer_are_compiled(on_ranks):
    assert on_ranks(_layer, 2, False) == [2, 2]


def test_a_module_that_its_first_call_makes_is_compiled(on_ranks):
    assert on_ranks(_layer, 2, True) == [2, 2]


def test_calls_that_send_nothing_part_no_stage():
    """Rows that have come are taken between two layers, in front of both."""
    graph = fx.Graph()
    runtime, x = graph.placeholder("runtime"), graph.placeholder("x")
    rows = graph.call_method("fetched", (runtime,))
    first = graph.call_function(torch.ops.aten.relu.default, (graph.call_function(_take, (rows, 0)),))
    second = graph.call_function(torch.ops.aten.add.Tensor, (first, graph.call_function(_take, (rows, 1))))
    last = graph.call_method("output", (runtime, second))
    graph.output([graph.call_function(torch.ops.aten.mul.Tensor, (last, x))])
    module = fx.GraphModule(nn.Module(), graph)
    result = staged(module)
    assert sum(isinstance(m, Stage) for m in result.modules()) == 2
    values = Fetched(), torch.tensor([3.0])
    assert torch.equal(result(*values)[0], module(*values)[0])


class Fetched:
    """A runtime that has two rows."""

    def fetched(self):
        return [torch.tensor([1.0]), torch.tensor([2.0])]

    def output(self, x):
        return x


def _take(rows, index):
    return rows[index]


def _failing(rank, ranks, what):
    """What each rank says where one fails, and that all go on."""

    def fails(module, inputs):
        if rank == 1:
            raise ValueError("no compiler here")
        return module

    module = des.compile(Tasks(), (IDS,), plan={"*": "row_wise"})
    call = torch.compile(module, backend=fails if what == "backend" else "eager")
    with pytest.raises(Exception, match=r"id 99|no compiler here") as error:
        call(IDS + (99 - IDS) * (rank if what == "ids" else 0))
    return type(error.value).__name__


@pytest.mark.parametrize("what", ["ids", "backend"])
def test_an_error_on_one_rank_comes_to_all(what, on_ranks):
    assert (
        on_ranks(_failing, 2, what)
        == {
            "ids": ["InputError", "InputError"],
            "backend": ["RankError", "BackendCompilerFailed"],
        }[what]
    )


def _in_part(rank, ranks):
    class Sorted(Tasks):
        def forward(self, ids):
            return super().forward(torch.tensor(sorted(ids.tolist()), dtype=torch.int64))

    module = des.compile(Sorted(), (IDS,), plan={"*": "row_wise"})
    backend = Counting("eager")
    with pytest.warns(UserWarning, match="captured in part, so its own forward runs, uncompiled"):
        torch.compile(module, backend=backend)(IDS)[0].sum().backward()
    return backend.graphs


def test_the_users_own_forward_is_not_compiled(on_ranks):
    assert on_ranks(_in_part, 1) == [0]


def _compiled(rank, ranks, function, *arguments):
    """What `verify` runs on a rank, with every module compiled."""
    torch._dynamo.config.recompile_limit = 64  # of as many sizes as no training has
    plain, backend = compare.distribute, Counting("aot_eager")

    def distribute(*args, **kwargs):
        module = plain(*args, **kwargs)
        module.compile(backend=backend)
        return module

    compare.distribute = distribute
    try:
        report = function(rank, ranks, *arguments)
    finally:
        compare.distribute = plain
    assert backend.graphs
    return report


@pytest.mark.parametrize("name", cases(["deepfm", "dlrm", "two_tower", "neumf"], []))
def test_the_proof_holds_for_compiled_modules(name, on_ranks):
    def launch(function, ranks, *arguments, timeout_s):
        return on_ranks(_compiled, ranks, function, *arguments, timeout_s=timeout_s)

    plans = [{"*": form} for form in ("table_wise", "row_wise", "column_wise", "unique_rows")]
    report = des.verify(MODELS[name](), make_inputs(name), plans=plans, optimizers=["adam"], launch=launch)
    assert report.cases == len(plans)
