"""Standard calls of PyTorch on a compiled module are exact, or refused by name: none is silently different."""

import copy
import functools
import itertools
import operator

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import descompiler as des
from tests.harness.cases import cases
from tests.harness.failures import raised

IDS = torch.randint(63, (12, 4), generator=torch.Generator().manual_seed(1))
LABELS = torch.randn(12, 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 10
FORMS = ("row_wise", "column_wise", "unique_rows", "table_wise", "hot_rows", "replicate")
COUNTS = (5, 7)


class Model(nn.Module):
    def __init__(self, sparse: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.item = nn.Embedding(63, 8, sparse=sparse)
        self.norm = nn.LayerNorm(8)
        self.top = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))

    def forward(self, ids):
        return self.top(self.norm(self.item(ids).mean(1)))


def rows_of(rank):
    first = sum(COUNTS[:rank])
    return slice(first, first + COUNTS[rank])


def step(net, optimizer, rows, before_step=lambda net: None):
    """Of the loss's sum, so that ranks of other sizes give the gradients of one process."""
    optimizer.zero_grad()
    F.mse_loss(net(IDS[rows]), LABELS[rows], reduction="sum").backward()
    before_step(net)
    optimizer.step()


def _trained(rank, ranks, form, make, before_step, in_place, steps=3):
    """Largest difference of weights from one process."""
    torch.set_default_dtype(torch.float64)
    reference = Model()
    module = des.compile(Model(), (IDS,), plan={"item": form}, loss="sum", in_place=in_place)
    optimizers = [make(list(net.parameters())) for net in (module, reference)]
    for _ in range(steps):
        for net, optimizer, rows in zip((module, reference), optimizers, (rows_of(rank), slice(12)), strict=True):
            step(net, optimizer, rows, before_step)
    whole = des.full_state_dict(module)
    return max(float((whole[n] - x).abs().max()) for n, x in reference.state_dict().items())


def sgd(parameters):
    return torch.optim.SGD(parameters, 0.01)


def clip(net, order=2.0, foreach=None):
    nn.utils.clip_grad_norm_(net.parameters(), 0.5, norm_type=order, foreach=foreach)


CLIPS = {
    "norm": clip,
    "largest": functools.partial(clip, order=float("inf")),
    "one by one": functools.partial(clip, order=1.0, foreach=False),
    "value": lambda net: nn.utils.clip_grad_value_(net.parameters(), 0.01),
}


def by_mean(net):
    """What users compute of gradients by hand: a scale by their mean and largest magnitude."""
    for p in net.parameters():
        p.grad.mul_(1 / (1 + p.grad.abs().max() + p.grad.abs().mean() + p.grad.pow(2).sum()))


CLIPPED = [("row_wise", False), ("column_wise", True), ("hot_rows", False), ("table_wise", False)]


@pytest.mark.long(but=1)
@pytest.mark.parametrize(("form", "in_place"), cases(itertools.product(FORMS, [False, True]), CLIPPED))
def test_gradients_are_clipped_as_those_of_one_process(form, in_place, on_ranks):
    for found in on_ranks(_clipped, 2, form, in_place):
        assert max(found.values()) < 1e-12, found


def _clipped(rank, ranks, form, in_place):
    return {n: _trained(rank, ranks, form, sgd, f, in_place, 2) for n, f in (CLIPS | {"by hand": by_mean}).items()}


class Trust(torch.optim.Optimizer):
    """As LAMB and LARS: a step as long as the weights' norm."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self):
        for p in (p for group in self.param_groups for p in group["params"]):
            p.sub_(1e-3 * p.norm() / (p.grad.norm() + 1e-8) * p.grad)


class RowWise(torch.optim.Optimizer):
    """Adagrad with one number for each row."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self):
        for p in (p for group in self.param_groups for p in group["params"]):
            state, square = self.state[p], p.grad**2
            state["sum"] = state.get("sum", 0) + (square.mean(1, keepdim=True) if p.dim() == 2 else square)
            p.sub_(0.01 * p.grad / (state["sum"].sqrt() + 1e-3))


OPTIMIZERS = {
    "Adam": lambda p: torch.optim.Adam(p, 0.01, eps=0.01),
    "AdamW, foreach": lambda p: torch.optim.AdamW(p, 0.01, eps=0.01, foreach=True),
    "Adam, fused": lambda p: torch.optim.Adam(p, 0.01, eps=0.01, fused=True),
    "NAdam": lambda p: torch.optim.NAdam(p, 0.01, eps=0.01),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 0.001, eps=0.1, momentum=0.9, centered=True),
    "Rprop": lambda p: torch.optim.Rprop(p, 0.001),
    "ASGD": lambda p: torch.optim.ASGD(p, 0.001),
    "trust ratio": Trust,
    "Adadelta": lambda p: torch.optim.Adadelta(p, eps=0.01),
    "Adamax": lambda p: torch.optim.Adamax(p, 0.01, eps=0.01),
    "RAdam": lambda p: torch.optim.RAdam(p, 0.01, eps=0.01),
}


def _optimized(rank, ranks, form):
    return {n: _trained(rank, ranks, form, make, lambda net: None, False) for n, make in OPTIMIZERS.items()}


@pytest.mark.long
@pytest.mark.parametrize("form", cases(FORMS[:-1], ["column_wise"]))
def test_optimizers_are_exact(form, on_ranks):
    for found in on_ranks(_optimized, 2, form):
        assert max(found.values()) < 1e-10, found


def _whole_tensor(rank, ranks, make, form):
    return raised(lambda: _trained(rank, ranks, form, make, lambda net: None, False, 2))


def test_an_optimiser_that_needs_whole_rows_is_refused_where_they_are_cut(on_ranks):
    assert on_ranks(_whole_tensor, 2, RowWise, "row_wise") == ["nothing"] * 2
    for text in on_ranks(_whole_tensor, 2, RowWise, "column_wise"):
        assert "UnsupportedError: torch.Tensor.mean of 'item.weight' along dimension 1, which is cut" in text
    for form in ("row_wise", "table_wise", "column_wise"):  # on a rank that holds nothing of the table, too
        for text in on_ranks(_whole_tensor, 2, torch.optim.Adafactor, form):
            assert "UnsupportedError: Adafactor of 'item.weight': it takes means along rows and along columns" in text
    for text in on_ranks(_at_once, 2):
        assert "of 'item.weight', reshaped: rank" in text
    for text in on_ranks(_orthogonal, 2):
        assert "of 'item.weight'" in text


class Scores(nn.Module):
    """A vector that is cut as the table that it is added to the products with."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.item, self.bias, self.scale = (
            nn.Embedding(63, 8),
            nn.Parameter(torch.randn(63)),
            nn.Parameter(torch.ones(8)),
        )

    def forward(self, ids):
        logits = (self.item(ids).mean(1) * self.scale) @ self.item.weight.t() + self.bias
        return F.cross_entropy(logits, ids[:, 0], reduction="none")


def _vectors(rank, ranks, foreach):
    """Whether the vector is cut, and the largest difference of weights from one process."""
    torch.set_default_dtype(torch.float64)
    module, reference = des.compile(Scores(), (IDS,), plan={"item": "row_wise"}, loss="sum"), Scores()
    for net, rows in ((module, rows_of(rank)), (reference, slice(12))):
        optimizer = torch.optim.Adafactor([net.bias, net.scale], lr=0.1, foreach=foreach)
        for _ in range(3):
            optimizer.zero_grad()
            net(IDS[rows]).sum().backward()
            optimizer.step()
    whole = des.full_state_dict(module)
    return module.bias.shape, max(float((whole[n] - x).abs().max()) for n, x in reference.state_dict().items())


@pytest.mark.parametrize("foreach", [False, True])
def test_adafactor_of_vectors_is_exact(foreach, on_ranks):
    for shape, worst in on_ranks(_vectors, 2, foreach):
        assert shape[0] < 63 and worst < 1e-12


def _at_once(rank, ranks):
    module = des.compile(Model(), (IDS,), plan={"item": "row_wise"})
    optimizer = torch.optim.LBFGS(module.parameters())

    def closure():
        optimizer.zero_grad()
        loss = module(IDS).sum()
        loss.backward()
        return loss

    return raised(lambda: optimizer.step(closure))


def _orthogonal(rank, ranks):
    module = des.compile(Model(), (IDS,), plan={"item": "row_wise"})
    optimizer = torch.optim.Muon([module.item.weight])
    module(IDS).sum().backward()
    return raised(optimizer.step)


def _averaged(rank, ranks):
    """Averages of weights, as `torch.optim.swa_utils` makes them, and those of users."""
    torch.set_default_dtype(torch.float64)
    module, reference = des.compile(Model(), (IDS,), plan={"item": "row_wise"}, loss="sum"), Model()
    found = []
    for net, rows in ((module, rows_of(rank)), (reference, slice(12))):
        optimizer = sgd(net.parameters())
        average = torch.optim.swa_utils.AveragedModel(net)
        ema = {n: x.detach().clone() for n, x in net.state_dict().items()}
        for _ in range(3):
            step(net, optimizer, rows)
            average.update_parameters(net)
            for n, x in net.state_dict().items():
                ema[n].mul_(0.9).add_(x, alpha=0.1)
        net.load_state_dict(ema)
        whole = des.full_state_dict if net is module else nn.Module.state_dict
        found.append({**{f"swa {n}": x for n, x in whole(average.module).items()}, **whole(net)})
    return max(float((found[0][n] - x).abs().max()) for n, x in found[1].items())


def test_averages_of_weights_are_exact(on_ranks):
    assert max(on_ranks(_averaged, 2)) < 1e-12


def _scaled(rank, ranks, form, sparse):
    """Scales and differences of weights, where one rank's rows of a table overflow in the second step."""
    module, reference = (Model(sparse) for _ in range(2))
    module = des.compile(module, (IDS,), plan={"item": form}, loss="sum")
    scalers = [torch.amp.GradScaler("cpu", init_scale=4.0) for _ in range(2)]
    optimizers = [sgd([net.item.weight] if sparse else net.parameters()) for net in (module, reference)]
    for i in range(3):
        for net, o, scaler, rows in zip(
            (module, reference), optimizers, scalers, (rows_of(rank), slice(12)), strict=True
        ):
            o.zero_grad()
            loss = F.mse_loss(net(IDS[rows]), LABELS[rows].float(), reduction="sum")
            scaler.scale(loss / 100).backward()
            gradient = net.item.weight.grad._values() if sparse else des.local_tensor(net.item.weight.grad)
            if i == 1 and len(gradient) and (net is reference or rank == 0 or form == "replicate"):
                gradient[0] = float("inf")
            scaler.step(o)
            scaler.update()
    whole = des.full_state_dict(module)
    worst = max(float((whole[n] - x).abs().max()) for n, x in reference.state_dict().items())
    return scalers[0].get_scale() == scalers[1].get_scale() == 2, worst


@pytest.mark.parametrize("form", ["row_wise", "table_wise", "replicate"])
def test_an_overflow_on_one_rank_is_one_on_all(form, on_ranks):
    for same, worst in on_ranks(_scaled, 2, form, False):
        assert same and worst < 1e-5


@pytest.mark.parametrize("form", ["row_wise", "column_wise", "table_wise"])
def test_an_overflow_in_one_ranks_sparse_rows_is_one_on_all(form, on_ranks):
    for same, worst in on_ranks(_scaled, 2, form, True):
        assert same and worst < 1e-5


def groups(net):
    plain = {
        id(p) for m in net.modules() if isinstance(m, nn.Embedding | nn.LayerNorm) for p in m.parameters(recurse=False)
    }
    decayed = [p for p in net.parameters() if id(p) not in plain]
    return [{"params": [p for p in net.parameters() if id(p) in plain], "weight_decay": 0.0}, {"params": decayed}]


def _grouped(rank, ranks, in_place):
    torch.set_default_dtype(torch.float64)
    module = des.compile(Model(), (IDS,), plan={"item": "row_wise"}, loss="sum", in_place=in_place)
    reference = Model()
    optimizers = [torch.optim.AdamW(groups(net), 0.01, weight_decay=0.5, eps=0.01) for net in (module, reference)]
    for _ in range(3):
        for net, optimizer, rows in zip((module, reference), optimizers, (rows_of(rank), slice(12)), strict=True):
            step(net, optimizer, rows)
    whole = des.full_state_dict(module)
    worst = max(float((whole[n] - x).abs().max()) for n, x in reference.state_dict().items())
    kinds = [type(m).__name__ for m in des.module_of(module).modules()][1:]
    outside = raised(lambda: module.top(torch.zeros(2, 8))) if not in_place else ""
    with torch.no_grad():
        same = torch.allclose(module.top(torch.ones(2, 8)), reference.top(torch.ones(2, 8)))
    return worst, kinds, module.top[0].weight.shape, outside, same


@pytest.mark.parametrize("in_place", [False, True])
def test_modules_have_their_classes_and_containers(in_place, on_ranks):
    for worst, kinds, shape, outside, same in on_ranks(_grouped, 2, in_place):
        assert worst < 1e-10 and same and shape == (8, 8)
        assert kinds == ["Embedding", "LayerNorm", "Sequential", "Linear", "ReLU", "Linear"]
        assert in_place or "a Sequential of the compiled module is called outside of its forward" in outside


no_grad = torch.no_grad()


def _refused(rank, ranks, form, in_place):
    module = des.compile(Model(), (IDS,), plan={"item": form}, in_place=in_place)
    compiled, weight = des.module_of(module), module.item.weight
    with compiled.no_sync():
        module(IDS).sum().backward()
    said = {
        "DDP": raised(lambda: nn.parallel.DistributedDataParallel(module)),
        "join": raised(compiled.join),
        "init": raised(lambda: nn.init.xavier_uniform_(weight)),
        "kaiming": raised(lambda: nn.init.kaiming_uniform_(weight)),
        "numpy": raised(lambda: weight.detach().numpy()),
        "assign": raised(lambda: module.load_state_dict(module.state_dict(), assign=True)),
        "std": raised(lambda: weight.detach().std()),
        "vector": raised(lambda: no_grad(nn.utils.parameters_to_vector)(module.parameters())),
        "joined": raised(lambda: torch.cat([weight.grad, weight.grad]).norm()),
        "nonzero": raised(lambda: weight.grad.count_nonzero()),
        "product": raised(lambda: weight.grad @ weight.grad.t()),
    }
    with torch.no_grad():
        nn.init.zeros_(weight)
    said["zeros"] = str(float(des.full_state_dict(module)["item.weight"].abs().max()))
    return said


def put(x, key, value):
    x[key] = value


WRITES = {
    "a row": lambda p: put(p, 3, 0.0),
    "the last row": lambda p: put(p, -1, 2),
    "a slice": lambda p: put(p, slice(40, 10), 7.0),
    "every fifth row": lambda p: put(p, slice(2, 61, 5), 3.0),
    "a slice of data": lambda p: put(p.data, slice(20, None, 3), 7.0),
    "all": lambda p: put(p, ..., 1.0),
    "what a mask says": lambda p: put(p, p > 0, 0.0),
}
LOSES = {
    "a row": lambda p: p[3].fill_(0),
    "rows": lambda p: p[:2].mul_(2),
    "a row's data": lambda p: p[3].data.fill_(0),
    "a view of a row": lambda p: p[3:5].detach().view(-1).zero_(),
    "an element": lambda p: put(p[3], 1, 0.0),
    "in place by an operator": lambda p: operator.imul(p[3:5], 2),
    "rows of a gradient": lambda p: p.grad[3],
    "rows of data": lambda p: p.data[3].zero_(),
    "rows by ids": lambda p: put(p, torch.tensor([3]), 0.0),
    "rows with values": lambda p: put(p, 3, torch.ones(8)),
    "selected": lambda p: p.select(0, 0).zero_(),
    "one by one": lambda p: list(p.grad),
    "in another order": lambda p: p.grad.flip(0),
    "no value of each element": lambda p: F.normalize(p.grad, dim=0),
    "indices": lambda p: p.grad.index_add_(0, torch.tensor([1]), torch.ones(1, p.shape[1])),
    "elements": lambda p: p.grad[p.grad > 0],
    "elements of the parameter": lambda p: p[p > 0],
    "an answer": lambda p: torch.equal(p.grad, torch.ones(1)),
    "the largest of lists": lambda p: torch._foreach_max([p.grad]),
    "noise in data": lambda p: p.data.normal_(),
    "noise": torch.randn_like,
    "a distance": lambda p: torch.dist(p.grad, p.grad),
    "a loss": lambda p: F.mse_loss(p.grad, p.detach()),
}


@pytest.mark.parametrize("form", ["row_wise", "column_wise"])
def test_what_is_not_known_to_go_element_by_element_is_refused(form, on_ranks):
    """And numbers are put into the original's rows, not into those of each piece."""
    for written, lost, answers in on_ranks(_rows_of_pieces, 2, form):
        assert written == dict.fromkeys(WRITES, 0.0)
        assert answers == [True, False, False, True], "of all ranks, though only one has another row"
        assert all("p[3] = 0" in e or "des.local_tensor" in e for e in lost.values()), lost


def _rows_of_pieces(rank, ranks, form):
    torch.set_default_dtype(torch.float64)
    module, reference = des.compile(Model(), (IDS,), plan={"item": form}), Model()
    written = {}
    for name, write in WRITES.items():
        with torch.no_grad():
            for net in (module, reference):
                write(net.item.weight)
        written[name] = float((des.full_state_dict(module)["item.weight"] - reference.item.weight).abs().max())
    module(IDS[rows_of(rank)]).sum().backward()
    p = module.item.weight
    before = p.detach().clone()
    answers = [torch.equal(p, before)]
    with torch.no_grad():
        p[3] = 9.0
        answers += [torch.equal(before, p), torch.allclose(p, before), torch.allclose(p, before, atol=99.0)]
        return written, {n: raised(functools.partial(f, p)) for n, f in LOSES.items()}, answers


@pytest.mark.parametrize(("form", "in_place"), [("row_wise", False), ("column_wise", True)])
def test_what_would_be_silently_different_is_refused(form, in_place, on_ranks):
    for said in on_ranks(_refused, 2, form, in_place):
        assert said.pop("zeros") == "0.0"
        assert "synchronises itself" in said.pop("DDP") and "x[:0]" in said.pop("join")
        assert "leave assign out" in said.pop("assign")
        assert all("of 'item.weight'" in x and "des.full_state_dict(module)" in x for x in said.values()), said


def _of_the_original(rank, ranks):
    model = Model()
    optimizer = sgd(model.parameters())
    module = des.compile(model, (IDS,))
    module(IDS).sum().backward()
    text = raised(optimizer.step)
    model(IDS).sum().backward()  # who trains the original means to
    optimizer.step()
    return text


def test_an_optimiser_of_the_originals_parameters_is_refused(on_ranks):
    for text in on_ranks(_of_the_original, 2):
        assert "holds the parameters of the model that was compiled, and none has a gradient" in text


def _not_finite(rank, ranks, form):
    """Whether each rank sees what is not finite on the first one alone."""
    module = des.compile(Model(), (IDS,), plan={"item": form})
    module(IDS).sum().backward()
    gradient = module.item.weight.grad
    before = bool(torch.isfinite(gradient).all()), bool((gradient > 1e9).any())
    if rank == 0:
        des.local_tensor(gradient)[0, 0] = float("inf")
    return before, (bool(torch.isfinite(gradient).all()), bool(gradient.isnan().any()), bool((gradient > 1e9).any()))


@pytest.mark.parametrize("form", ["row_wise", "column_wise"])
def test_what_is_not_finite_on_one_rank_is_seen_by_all(form, on_ranks):
    assert on_ranks(_not_finite, 2, form) == [((True, False), (False, False, True))] * 2


def _states(rank, ranks, form, in_place):
    """What loading says, of each kind of state."""
    module = des.compile(Model(), (IDS,), plan={"item": form}, in_place=in_place)
    own = {n: x.clone() for n, x in module.state_dict().items()}
    own = {n: x * 1.0 for n, x in copy.deepcopy(own).items()}  # as averages of weights make theirs
    box = [module.state_dict() if rank == 0 else None]
    torch.distributed.broadcast_object_list(box)
    original = Model().state_dict()
    said = {
        "own": raised(lambda: module.load_state_dict(own)),
        "the first rank's": raised(lambda: module.load_state_dict(box[0])),
        "unnamed": raised(lambda: module.load_state_dict({n: des.local_tensor(x) for n, x in own.items()})),
        "original": raised(lambda: module.load_state_dict({n: x + 1 for n, x in original.items()})),
    }
    whole = des.full_state_dict(module)
    same = all(torch.equal(whole[n], x + 1) for n, x in original.items())
    return said, same


@pytest.mark.parametrize(("form", "in_place"), [("row_wise", False), ("column_wise", True)])
def test_a_state_is_loaded_by_the_rank_that_has_saved_it(form, in_place, on_ranks):
    for rank, (said, same) in enumerate(on_ranks(_states, 2, form, in_place)):
        assert same and said["own"] == said["original"] == "nothing"
        assert "does not say which piece it is" in said["unnamed"]
        if rank:
            assert "holds the piece of 'item.weight' that rank 0 of 2 had, and rank 1 of 2" in said["the first rank's"]


def _optimizer_states(rank, ranks):
    module = des.compile(Model(), (IDS,), plan={"item": "row_wise"})
    optimizer = torch.optim.Adam(module.parameters())
    module(IDS).sum().backward()
    optimizer.step()
    box = [optimizer.state_dict() if rank == 0 else None]
    torch.distributed.broadcast_object_list(box)
    fresh = torch.optim.Adam(module.parameters())
    fresh.load_state_dict(box[0])
    return raised(fresh.step)


def test_an_optimisers_state_of_another_rank_is_refused_where_it_is_used(on_ranks):
    texts = on_ranks(_optimizer_states, 2)
    assert texts[0] == "nothing"
    assert "UnsupportedError" in texts[1] and "this rank has loaded what another one saved" in texts[1]


def _through_a_file(rank, ranks, folder):
    module = des.compile(Model(), (IDS,), plan={"item": "row_wise"})
    torch.save(module.state_dict(), f"{folder}/{rank}.pt")
    found = torch.load(f"{folder}/{rank}.pt", weights_only=True)
    return raised(lambda: module.load_state_dict(found)), type(found["item.weight"]).__name__


def test_pieces_are_read_from_files_without_running_code(tmp_path, on_ranks):
    assert on_ranks(_through_a_file, 2, str(tmp_path)) == [("nothing", "Held")] * 2


class Counts(nn.Module):
    """What it keeps beside tensors is in its ``state_dict``."""

    def __init__(self, seen):
        super().__init__()
        self.seen, self.linear = {"rows": seen}, nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x)

    def get_extra_state(self):
        return self.seen

    def set_extra_state(self, state):
        self.seen = state


class WithCounts(Counts):
    def __init__(self, seen):
        super().__init__(seen)
        self.item, self.inner = nn.Embedding(20, 4), Counts(seen + 1)

    def forward(self, ids):
        return self.inner(super().forward(self.item(ids).sum(1)))


KEPT = {"_extra_state": {"rows": 5}, "inner._extra_state": {"rows": 6}}


def _kept_beside_tensors(rank, ranks, folder):
    ids = torch.arange(12).reshape(4, 3)
    torch.manual_seed(0)
    original = WithCounts(5)
    for rank0_only in (False, True):
        module = des.compile(WithCounts(0), (ids,), plan={"item": "row_wise"} if ranks > 1 else None)
        assert module.state_dict().keys() == original.state_dict().keys()
        des.load_full_state_dict(
            module, original.state_dict() if not rank0_only or rank == 0 else {}, rank0_only=rank0_only
        )
        state = module.state_dict()
        assert {n: state[n] for n in KEPT} == KEPT and module.seen == {"rows": 5}
        whole = des.full_state_dict(module)
        assert {n: whole[n] for n in KEPT} == KEPT and torch.equal(whole["item.weight"], original.item.weight)
    module.seen["rows"] = 7
    single = des.to_single(module)
    assert rank or (single.seen["rows"], single.inner.seen["rows"]) == (7, 6)
    des.save(module, None, folder)
    other = des.compile(WithCounts(0), (ids,), plan={"item": "row_wise"} if ranks > 1 else None)
    des.load(other, None, folder)
    assert (other.seen["rows"], other.inner.seen["rows"]) == (7, 6)
    assert copy.deepcopy(other).state_dict()["_extra_state"] == {"rows": 7}
    error = raised(lambda: des.save_safetensors(module, f"{folder}.safetensors"))
    assert "holds tensors alone" in error and "inner._extra_state" in error
    error = raised(lambda: des.load_full_state_dict(module, {n: x for n, x in whole.items() if n != "_extra_state"}))
    assert "missing ['_extra_state']" in error, error


def test_a_model_that_keeps_more_than_tensors_is_verified(on_ranks):
    report = des.verify(WithCounts(5), (torch.arange(12).reshape(4, 3),), ranks=2, plans=({},), launch=on_ranks)
    assert max(report.worst.values()) < 1e-10


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_a_model_keeps_beside_tensors_is_in_its_state(on_ranks, tmp_path, ranks):
    on_ranks(_kept_beside_tensors, ranks, str(tmp_path / "saved"))


class Renames(nn.Module):
    def __init__(self):
        super().__init__()
        self.item, self.inner = nn.Embedding(20, 4), nn.Linear(4, 1)
        self.inner.register_state_dict_post_hook(lambda m, state, prefix, _: state.update({f"{prefix}old": m.bias}))

    def state_dict(self, *args, **kwargs):
        return {f"net.{n}": x for n, x in super().state_dict(*args, **kwargs).items()}

    def forward(self, ids):
        return self.inner(self.item(ids).sum(1))


def test_a_model_that_changes_its_states_is_told_that_they_are_not_changed():
    original, ids = Renames(), torch.arange(12).reshape(4, 3)
    with pytest.warns(UserWarning, match="state_dict, inner change states by hooks or methods of their own"):
        module = des.compile(original, (ids,))
    assert set(module.state_dict()) == set(des.full_state_dict(module)) == {"item.weight", "inner.weight", "inner.bias"}
    single = des.to_single(module).state_dict()
    assert single.keys() == original.state_dict().keys() and "net.inner.old" in single
