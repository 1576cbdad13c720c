"""What users do to a module after it was compiled is followed, or refused by name at its next forward: on every rank.

Hooks on parts, parts and forwards that are others, parameters and plain attributes: in one process, and on ranks.
"""

import copy
import enum

import pytest
import torch
import torch.nn.utils.prune
from torch import nn

import descompiler as des
from descompiler.errors import UnsupportedError
from descompiler.module.structure import Structure
from tests.harness.failures import raised

IDS = torch.randint(23, (10, 3), generator=torch.Generator().manual_seed(1))
ROWS = (slice(0, 4), slice(4, 10))
pytestmark = pytest.mark.filterwarnings("ignore:.*captured anew")


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.item = nn.Embedding(23, 4)
        self.tower = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.LayerNorm(8))
        self.top = nn.Linear(8, 1)
        self.alpha, self.deep, self.config = 2.0, False, {"beta": [0.5, 3.0]}
        self.shift, self.counts = torch.ones(8), torch.zeros(2)  # the second is not read by forward
        self.act, self.weights, self._signed = torch.tanh, [0.5, 0.25], 1.0
        self.coverage, self._coupled, self._structure = 2.0, 1.0, 1.0  # compiled modules have some of these names too

    scale = unread = 1.0

    def scaled(self, x):
        return x * self.scale

    @property
    def sign(self):
        return self._signed

    @sign.setter
    def sign(self, value):
        self._signed = value

    def forward(self, ids):
        x = self.tower(self.item(ids).flatten(1) * self.alpha + self.config["beta"][1]) + self.shift
        self.calls = True
        x = (
            x
            * sum(self.weights)
            * self.scale
            * self.sign
            * self._coupled
            * self._structure
            * self.config.get("more", 1.0)
            * getattr(self, "boost", 1.0)
        )
        x = self.scaled(x) * getattr(self.tower[1], "boost", 1.0)
        return self.top(torch.sin(x) if self.deep else self.act(x))


class InPart(Model):
    """Its ids go through Python lists: no tracer follows them."""

    def forward(self, ids):
        return super().forward(torch.tensor(ids.tolist()).reshape(ids.shape))


class Doubled(nn.ReLU):
    def forward(self, x):
        return super().forward(x) * 2


class Scaled(nn.Module):
    def forward(self, x):
        return x * 2


def _hook(kind, part, hook):
    return lambda m: getattr(m.get_submodule(part), f"register_{kind}_hook")(hook).remove


def _assign(part, name, make):
    def change(m):
        owner, before = m.get_submodule(part), getattr(m.get_submodule(part), name)
        setattr(owner, name, make(before))
        return lambda: setattr(owner, name, before)

    return change


def _put(name, make):
    def change(m):
        before = m.tower[int(name)]
        m.tower[int(name)] = make()
        return lambda: m.tower.__setitem__(int(name), before)

    return change


def _append(m):
    m.tower.append(nn.Tanh())
    return lambda: m.tower.__delitem__(-1)


def _leave_out(m):
    before = m.tower[2]
    del m.tower[2]
    return lambda: m.tower.append(before)


def _forward(m):
    m.tower.forward = lambda x: nn.Sequential.forward(m.tower, x) * 2
    return lambda: m.tower.__delattr__("forward")


def _prune(m):
    torch.nn.utils.prune.l1_unstructured(m.tower[0], "bias", 0.5)
    return None


def _parametrize(m):
    torch.nn.utils.parametrize.register_parametrization(m.tower[2], "bias", Scaled())
    return None


def _no_bias(m):
    before, m.top.bias = m.top.bias, None
    return lambda: setattr(m.top, "bias", before)


def _every_module(m):
    return nn.modules.module.register_module_forward_hook(lambda m, x, out: None).remove


def _add_to_shift(m):
    m.shift.add_(1)
    return None


def _put_in(m):
    m.config["more"] = 2.0
    return lambda: m.config.pop("more")


def _append_number(m):
    m.weights.append(1.0)
    return m.weights.pop


def _put_attribute(part, name, x):
    def change(m):
        m = m.get_submodule(part)
        setattr(m, name, x)
        return lambda: delattr(m, name)

    return change


def _of_class(name, x):
    def change(m):
        before = vars(Model).get(name)
        setattr(Model, name, x)
        return lambda: delattr(Model, name) if before is None else setattr(Model, name, before)

    return change


REFUSED = {
    "function": (_assign("", "act", lambda _: torch.cos), ["act, which forward reads"]),
    "key more": (_put_in, ["config, which forward reads", "holds others now"]),
    "number more": (_append_number, ["weights, which forward reads"]),
    "in front of the class's": (_put_attribute("", "scale", 2.0), ["scale has been set", "that of its class Model"]),
    "that was not there": (_put_attribute("", "boost", 2.0), ["boost has been set", "found none"]),
    "that a part did not have": (_put_attribute("tower.1", "boost", 2.0), ["tower.1.boost has been set"]),
    "of the class": (_of_class("scale", 2.0), ["Model.scale, which forward reads, was 1.0", "is 2.0 now"]),
    "that the class did not have": (_of_class("boost", 2.0), ["Model.boost, which forward reads, was not there"]),
    "method of the class": (_of_class("scaled", lambda self, x: x), ["Model.scaled, which forward reads, was a func"]),
    "tensor": (_assign("", "shift", lambda x: x + 1), ["shift, which forward reads", "register_buffer"]),
    "tensor in place": (_add_to_shift, ["shift, which forward reads"]),
    "forward hook": (_hook("forward", "item", lambda m, x, out: out * 2), ["forward hook", "'item'", "test_structure"]),
    "that looks on": (_hook("forward", "tower.1", lambda m, x, out: None), ["forward hook", "'tower.1'"]),
    "pre-hook": (_hook("forward_pre", "top", lambda m, x: (x[0] * 2,)), ["forward pre-hook", "'top'"]),
    "backward hook": (_hook("full_backward", "tower.0", lambda m, x, out: None), ["backward hook", "'tower.0'"]),
    "backward pre-hook": (_hook("full_backward_pre", "top", lambda m, out: None), ["backward pre-hook", "'top'"]),
    "hook of all modules": (_every_module, ["hook of all modules"]),
    "other class": (_assign("tower.1", "__class__", lambda _: Doubled), ["'tower.1'", "Doubled", "ReLU"]),
    "other part": (_put("1", nn.Tanh), ["'tower.1'", "Tanh", "ReLU"]),
    "part of the same class": (_put("0", lambda: nn.Linear(12, 8)), ["'tower.0'", "another object"]),
    "part more": (_append, ["'tower.3'", "was not there"]),
    "part less": (_leave_out, ["'tower.2'", "is not there now"]),
    "forward of its own": (_forward, ["'tower'", "another forward"]),
    "no bias": (_no_bias, ["'top.bias'", "not there now"]),
    "pruned": (_prune, ["forward pre-hook", "'tower.0'"]),
    "parametrized": (_parametrize, ["'tower.2'", "LayerNorm"]),
}


@pytest.mark.parametrize("change", REFUSED)
def test_a_change_that_no_graph_follows_is_refused_until_it_is_undone(change):
    make, texts = REFUSED[change]
    module = des.compile(Model(), (IDS,))
    before = module(IDS)
    undo = make(module)
    error = raised(lambda: module(IDS))
    if undo is not None:
        undo()
        assert torch.equal(module(IDS), before)
    assert not [text for text in texts if text not in error], error


def _refused_on_ranks(rank, ranks, in_place):
    module, told = des.compile(Model(), (IDS,), plan={"item": "row_wise"}, loss="sum", in_place=in_place), {}
    before = module(IDS[ROWS[rank]])
    for name, (make, _) in REFUSED.items():
        if name in ("pruned", "parametrized", "tensor in place"):
            continue  # they can't be undone
        undo = make(module) if rank == 1 else lambda: None  # what one rank does, all hear of
        told[name] = raised(lambda: module(IDS[ROWS[rank]]))
        undo()
        assert torch.equal(module(IDS[ROWS[rank]]), before)
    weight, kept = (module.top.weight, "top.weight") if in_place else (module.item.weight, "item.weight")
    module.get_submodule(kept.partition(".")[0]).weight = nn.Parameter(torch.zeros(tuple(weight.shape)))
    told["piece"] = raised(lambda: module(IDS[ROWS[rank]]))
    return told


@pytest.mark.parametrize("in_place", [False, True])
def test_what_one_rank_does_all_hear_of(on_ranks, in_place):
    for told in on_ranks(_refused_on_ranks, 2, in_place):
        for name, (_, texts) in REFUSED.items():
            assert not [text for text in texts if text not in told.get(name, text)], told[name]
        assert f"in the place of '{'top' if in_place else 'item'}.weight'" in told["piece"]


def _trained(net, rows, change):
    """Outputs before and after a step, with the change in front of it."""
    undo = change(net)
    try:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        first = net(IDS[rows])
        (first**2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        return first.detach(), net(IDS[rows]).detach()
    finally:
        undo()


FOLLOWED = {
    "number": _assign("", "alpha", lambda _: -1.5),
    "flag": _assign("", "deep", lambda _: True),
    "property": _assign("", "sign", lambda _: -1.0),
    "inside": _assign("", "config", lambda _: {"beta": [0.5, -2.0]}),
    "of a layer": _assign("tower.2", "eps", lambda _: 0.5),
    "padding": _assign("item", "padding_idx", lambda _: int(IDS[0, 0])),
    "parameter": _assign("top", "weight", lambda p: nn.Parameter(p.detach() * 2)),
}


def _followed(rank, ranks, cls, names, in_place):
    """Whether outputs are the original's, and how often a warning says that the model is captured anew."""
    torch.set_default_dtype(torch.float64)  # of a rank it is again what it was after the call
    rows, found = (ROWS[rank], {}) if ranks > 1 else (slice(10), {})
    for name in names:
        original = cls()
        module = des.compile(copy.deepcopy(original), (IDS,), loss="sum", in_place=in_place)
        _trained(original, slice(10), lambda net: lambda: None)
        _trained(module, rows, lambda net: lambda: None)
        expected = _trained(original, slice(10), FOLLOWED[name])
        outputs = _trained(module, rows, FOLLOWED[name])
        after = module(IDS[rows]), original(IDS)
        pairs = [*zip(outputs, expected, strict=True), after]
        found[name] = max(float((x - y[rows]).abs().max() / y.abs().max()) for x, y in pairs)
    return found


@pytest.fixture
def in_double():
    before = torch.get_default_dtype()
    yield
    torch.set_default_dtype(before)


@pytest.mark.long(but=1)
@pytest.mark.parametrize("cls", [Model, InPart])
def test_attributes_and_parameters_are_followed(cls, in_double):
    assert max(_followed(0, 1, cls, FOLLOWED, False).values()) < 1e-12


@pytest.mark.long(but=1)
@pytest.mark.parametrize("cls, in_place", [(Model, False), (Model, True), (InPart, False)])
def test_attributes_are_followed_on_ranks(on_ranks, cls, in_place):
    names = [n for n in FOLLOWED if n != "parameter"]
    for found in on_ranks(_followed, 2, cls, names, in_place):
        assert max(found.values()) < 1e-10, found


def test_attributes_are_read_and_set_as_the_originals():
    module = des.compile(Model(), (IDS,))
    assert (module.alpha, module.config, module.deep) == (2.0, {"beta": [0.5, 3.0]}, False)
    module.counts += 1
    module.counts = module.counts + 1
    module(IDS)
    assert module.calls
    assert not hasattr(module, "gamma")
    with pytest.raises(UnsupportedError, match="'coverage' is an attribute of the model, and DistributedModule"):
        module.coverage = 3.0
    module.criterion = nn.MSELoss()
    module.register_buffer("steps", torch.zeros(()))
    module(IDS)
    module.alpha = 3.0
    module.unread = 3.0  # by forward, in front of its class's
    assert module.alpha == module.unread == 3.0
    assert des.to_single(module).alpha == 3.0
    assert torch.allclose(des.to_single(module)(IDS), module(IDS))


def test_the_users_own_forward_reads_what_is_set_later():
    original, module = InPart(), des.compile(InPart(), (IDS,), loss="sum")
    assert not module.predicts_traffic
    for net in (original, module):
        net.boost = 2.0  # nobody had one
        net.scale = 3.0  # its class has one
    assert torch.allclose(module(IDS), original(IDS))
    del original.boost, module.boost
    assert torch.allclose(module(IDS), original(IDS))


def test_attributes_of_a_module_that_is_compiled_by_its_first_forward():
    original, module = Model(), des.compile(Model())
    original.alpha = module.alpha = 3.0
    original.boost = module.boost = 2.0
    original.tower = module.tower = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.LayerNorm(8))
    module.criterion = nn.MSELoss()
    assert module.criterion(torch.ones(1), torch.zeros(1)) == 1.0
    assert torch.allclose(module(IDS), original(IDS))
    assert module.boost == 2.0
    assert isinstance(module.criterion, nn.MSELoss) and isinstance(module.tower[1], nn.Tanh)
    original.alpha = module.alpha = 4.0
    with pytest.warns(UserWarning, match="alpha is 4.0 now, and was 3.0: the model is captured anew"):
        assert torch.allclose(module(IDS), original(IDS))


class Branch(nn.Module):
    """Which number it reads depends on the rows that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.many, self.few = 2.0, 3.0

    def forward(self, x):
        return x * self.many if float(x.detach().abs().sum()) > -1 and len(x) > 6 else x * self.few


class WithBranch(Model):
    def __init__(self) -> None:
        super().__init__()
        self.branch = Branch()

    def forward(self, ids):
        return self.branch(super().forward(ids))


@pytest.mark.long
def test_numbers_of_a_leaf_that_the_example_did_not_read():
    original, module = WithBranch(), des.compile(WithBranch(), (IDS,))
    assert "leaf_branch" in module.print_readable()
    for net in (original, module):
        net.branch.few = 5.0
    assert torch.allclose(module(IDS[:4]), original(IDS[:4]))


class Frozen(nn.Module):
    """Its batch norm keeps its statistics, and its table stands still, while the rest is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.item, self.norm, self.top = nn.Embedding(23, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)

    def train(self, mode=True):
        super().train(mode)
        self.norm.eval()
        self.item.weight.requires_grad_(not mode)
        return self

    def eval(self):
        super().eval()
        self.norm.train()
        return self

    def forward(self, ids):
        return self.top(self.norm(self.item(ids).sum(1)))


@pytest.mark.parametrize("deferred", [False, True])
def test_flags_are_set_as_the_originals_own_train_does(deferred):
    original, module = Frozen(), des.compile(Frozen(), *(() if deferred else ((IDS,),)))
    for net in (original, module):
        assert net.train() is net
    module(IDS)
    module.load_state_dict(original.state_dict())
    for call in ("train", "eval", "train"):
        for net in (original, module):
            getattr(net, call)()
        assert [m.training for m in module.modules()] == [m.training for m in original.modules()]
        assert module.item.weight.requires_grad is original.item.weight.requires_grad
        assert torch.allclose(module(IDS), original(IDS))
    assert torch.allclose(module.norm.running_mean, original.norm.running_mean)


class Kind(enum.Enum):
    FIRST, LAST = range(2)


def test_numbers_of_a_dict_are_followed_whatever_their_keys_are():
    class ByKind(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.item, self.scales = nn.Embedding(23, 4), {Kind.FIRST: 2.0, (1, 2): 3.0, None: 5.0, 0.5: 1.0, int: 2.0}

        def forward(self, ids):
            x = self.item(ids).sum(1)
            for key in (Kind.FIRST, (1, 2), None, 0.5, int):
                x = x * self.scales[key]
            return x

    original, module = ByKind(), des.compile(ByKind(), (IDS,))
    module.load_state_dict(original.state_dict())
    for key in original.scales:
        original.scales[key] = module.scales[key] = 7.0
        assert torch.allclose(module(IDS), original(IDS)), key


def test_a_number_of_another_type_is_another_number():
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.item, self.factor = nn.Embedding(23, 4), 1

        def forward(self, ids):
            return self.item(ids).sum(1), ids * self.factor

    module = des.compile(Counts(), (IDS,))
    assert module(IDS)[1].dtype == torch.int64
    module.factor = 1.0
    assert module(IDS)[1].dtype == torch.float32


def test_a_copy_goes_on_with_what_was_changed():
    original, module = Model(), des.compile(Model(), (IDS,))
    module(IDS)
    original.alpha = module.alpha = 3.0
    other = copy.deepcopy(module)
    assert torch.allclose(other(IDS), original(IDS))
    original.alpha = other.alpha = 2.0
    assert torch.allclose(other(IDS), original(IDS))
    other.config["beta"][1] = 5.0
    assert module.alpha == 3.0 and module.config["beta"] == [0.5, 3.0]
    module.top.register_forward_hook(lambda m, x, out: out * 2)
    with pytest.raises(UnsupportedError, match="'top'"):
        copy.deepcopy(module)


def _in_part(rank, ranks):
    module = des.compile(InPart(), (IDS,), loss="sum")
    assert not module.predicts_traffic
    told, host = {}, vars(module)["_host"]
    loss = module(IDS[ROWS[rank]]).sum()
    loss.backward()
    torch.optim.Adagrad(module.parameters(), lr=0.1).step()
    told["set there"] = sorted(vars(host).keys() - vars(InPart()).keys() - {"calls"})  # which forward sets
    for name, change in {
        "parameter": FOLLOWED["parameter"],
        "part": _put("0", lambda: nn.Linear(12, 8)),
        "more": lambda m: m.tower.append(nn.Linear(8, 8)),
    }.items():
        undo = change(module)
        told[name] = raised(lambda: module(IDS[ROWS[rank]]))
        if name != "more":
            undo()
            module(IDS[ROWS[rank]])
    return told


def test_parameters_that_nobody_would_average_are_refused_where_the_users_forward_runs(on_ranks):
    for told in on_ranks(_in_part, 2):
        assert not told["set there"]
        assert "in the place of 'top.weight'" in told["parameter"]
        assert "in the place of 'tower.0.weight'" in told["part"]
        assert "'tower.3.weight': not among the parameters" in told["more"]


def test_hooks_that_torch_itself_puts_on_all_modules_look_on():
    from torch.utils.flop_counter import FlopCounterMode

    module = des.compile(Model(), (IDS,))
    with FlopCounterMode(display=False) as counter:
        module(IDS)
    assert counter.get_total_flops() > 0


def test_a_structure_tells_hooks_that_were_there_from_those_that_came():
    module = nn.Sequential(nn.Linear(1, 1), nn.ReLU())
    handle = module[0].register_forward_hook(lambda m, x, out: None)
    structure = Structure(module)
    module.register_forward_hook(lambda m, x, out: None)  # its own is called
    structure.check(module)
    handle.remove()
    with pytest.raises(UnsupportedError, match="not there any more"):
        structure.check(module)


class CountsCalls(nn.Module):
    calls = 0

    def __init__(self) -> None:
        super().__init__()
        self.item = nn.Embedding(23, 4)

    def forward(self, ids):
        CountsCalls.calls = self.calls + 1
        return self.item(ids).sum(1)


def test_what_forward_sets_on_its_class_is_no_change_of_the_users():
    module = des.compile(CountsCalls(), (IDS,))
    module(IDS)
    module.eval()  # captured anew, which calls forward
    module(IDS)
    assert CountsCalls.calls == 0
    CountsCalls.calls = 5
    assert "CountsCalls.calls, which forward reads, was 0" in raised(lambda: module(IDS))
    CountsCalls.calls = 0


class NotDerived(nn.Module):
    """No class can be derived from it, so that nobody sees what its forward reads."""

    shift, scale = 1.0, 2.0

    def __init__(self) -> None:
        super().__init__()
        self.shift = 3.0

    def __init_subclass__(cls, **kwargs):
        raise TypeError("final")

    def forward(self, x):
        return x * self.scale + self.shift


def test_a_class_that_can_not_be_watched_may_read_all_that_it_has():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.item, self.last = nn.Embedding(23, 4), NotDerived()

        def forward(self, ids):
            return self.last(self.item(ids).sum(1))

    original, module = Net(), des.compile(Net(), (IDS,))
    module.load_state_dict(original.state_dict())
    module.last.note = "of the user"  # neither there nor in the class
    original.last.shift = module.last.shift = 5.0
    assert torch.allclose(module(IDS), original(IDS))
    module.last.scale = 3.0
    assert "last.scale has been set since the model was compiled" in raised(lambda: module(IDS))
