"""Every way of passing inputs: what is an argument, what a leaf, and what each rank gets, on real ranks."""

import collections
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import descompiler as des
from descompiler.model.inputs import flatten, normalise_inputs, take_rows
from tests.harness.jagged import Jagged

GENERATOR = torch.Generator().manual_seed(3)
USER = torch.randint(7, (9,), generator=GENERATOR)
ITEMS = torch.randint(1, 11, (9, 4), generator=GENERATOR)
LENGTH = torch.randint(0, 5, (9,), generator=GENERATOR)


class Scorer(nn.Module):
    """A user table and a pooled, masked history; subclasses say how their forward is called."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.user = nn.Embedding(7, 4)
        self.item = nn.Embedding(11, 4, padding_idx=0)
        self.top = nn.Linear(8, 1)

    def score(self, user: Tensor, items: Tensor, length: Tensor) -> Tensor:
        mask = torch.arange(items.shape[1]) < length[:, None]
        pooled = (self.item(items) * mask.unsqueeze(-1)).sum(1) / length.clamp(min=1)[:, None]
        return self.top(torch.cat([self.user(user), pooled], 1)).squeeze(1)


class OneDict(Scorer):
    def forward(self, batch, scale: float = 2.0):
        return self.score(batch["user"], batch["history"]["items"], batch["history"]["length"]) * scale


class Keywords(Scorer):
    def forward(self, user, items, length, reduction=None, *, name: str = "x"):
        assert name == "here"
        return {"score": self.score(user, items, length), "note": reduction, "loss": None}


@dataclass(frozen=True)
class Batch:
    user: Tensor
    items: Tensor
    length: Tensor
    split: str = "train"


@dataclass
class Result:
    score: Tensor
    extra: Tensor | None = None


class OneDataclass(Scorer):
    def forward(self, batch):
        assert isinstance(batch, Batch) and batch.split == "train"
        return Result(self.score(batch.user, batch.items, batch.length))


Named = collections.namedtuple("Named", ["user", "items", "length"])


class OneNamedTuple(Scorer):
    def forward(self, batch):
        return self.score(batch.user, batch.items, batch.length)


class Registered:
    """Registered as a pytree by its own library."""

    def __init__(self, user, items, length):
        self.user, self.items, self.length = user, items, length


pytree.register_pytree_node(
    Registered, lambda x: ([x.user, x.items, x.length], None), lambda children, _: Registered(*children)
)


class OneRegistered(Scorer):
    def forward(self, batch):
        return self.score(batch.user, batch.items, batch.length)


class Interaction:
    """As RecBole's: columns by name, and a length that is derived from them."""

    def __init__(self, columns):
        self.columns = columns
        self.size = next(iter(columns.values())).shape[0]

    def __getitem__(self, name):
        return self.columns[name]


class Unknown(Interaction):
    pass


des.register_input(Interaction, lambda x: ([x.columns], None), lambda children, _: Interaction(*children))


class OneInteraction(Scorer):
    def forward(self, interaction):
        return self.score(interaction["user"], interaction["items"], interaction["length"])


class Columns(dict):
    """A dict of its own class, as many libraries' batches are."""


class OneDictSubclass(Scorer):
    def forward(self, batch):
        assert isinstance(batch, Columns)
        return self.score(batch["user"], batch["items"], batch["length"])


class Floats(Scorer):
    """Ids are columns of a float matrix, beside dense features."""

    def forward(self, x):
        ids = x[:, :5].long()
        return self.score(ids[:, 0], ids[:, 1:5], x[:, 5].long()) + x[:, 6]


class OneJagged(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.items = nn.EmbeddingBag(11, 4, mode="mean", include_last_offset=True)
        self.top = nn.Linear(4, 1)

    def forward(self, x):
        offsets = torch.cat([x.lengths.new_zeros(1), x.lengths.cumsum(0)])
        return self.top(self.items(x.values, offsets)).squeeze(1)


COLUMNS = {"user": USER, "items": ITEMS, "length": LENGTH}
CASES = {
    "dict, one argument": (OneDict, {"user": USER, "history": {"items": ITEMS, "length": LENGTH}}),
    "dict, keywords": (Keywords, {**COLUMNS, "reduction": None, "name": "here"}),
    "args and kwargs": (Keywords, ((USER,), {"items": ITEMS, "length": LENGTH, "name": "here"})),
    "dataclass": (OneDataclass, Batch(USER, ITEMS, LENGTH)),
    "named tuple": (OneNamedTuple, Named(USER, ITEMS, LENGTH)),
    "pytree": (OneRegistered, Registered(USER, ITEMS, LENGTH)),
    "custom class": (OneInteraction, Interaction(COLUMNS)),
    "dict subclass": (OneDictSubclass, Columns(COLUMNS)),
    "float matrix": (
        Floats,
        (torch.cat([USER[:, None], ITEMS, LENGTH[:, None], torch.randn(9, 2, generator=GENERATOR)], 1),),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_one_rank_computes_as_the_model(case):
    cls, inputs = CASES[case]
    model = cls()
    module = des.compile(model, inputs)
    args, kwargs = normalise_inputs(inputs, model.forward)
    args, kwargs = take_rows((args, kwargs), torch.tensor([1, 1, 4]))
    got, expected = module(*args, **kwargs), model(*args, **kwargs)
    assert type(got) is type(expected)
    for a, b in zip(flatten(got)[0], flatten(expected)[0], strict=True):
        assert torch.allclose(a, b) if isinstance(b, Tensor) else a == b


@pytest.mark.parametrize("case", ["custom class", "float matrix"])
def test_two_ranks(on_ranks, case):
    cls, inputs = CASES[case]
    assert des.verify(cls(), inputs, plans=[{"*": "row_wise"}], launch=on_ranks).cases == 1


def test_jagged_values_and_lengths_on_two_ranks(on_ranks):
    inputs = Jagged(LENGTH, torch.randint(11, (int(LENGTH.sum()),), generator=GENERATOR))
    assert des.compile(OneJagged(), inputs).coverage().rung == "partial"
    assert des.verify(OneJagged(), inputs, plans=[{"*": "row_wise"}], launch=on_ranks).cases == 1


def test_jagged_tensors_without_a_class():
    """Their rows are not known: it is said that they were not checked."""

    class Plain(OneJagged):
        def forward(self, lengths, values):
            return super().forward(Jagged(lengths, values))

    inputs = (LENGTH, torch.randint(11, (int(LENGTH.sum()),), generator=GENERATOR))
    with pytest.warns(UserWarning, match="not checked for independence: the inputs differ in dim 0"):
        module = des.compile(Plain(), inputs)
    assert torch.equal(module(*inputs), Plain()(*inputs))


class Keyed(nn.Module):
    """Bags of two keys of torchrec's KeyedJaggedTensor, one with weights for its values, and dense features."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.items = nn.EmbeddingBag(30, 4, mode="sum", include_last_offset=True)
        self.shops = nn.EmbeddingBag(20, 4, mode="mean", include_last_offset=True)
        self.top = nn.Linear(10, 1)

    def forward(self, dense, features):
        items, shops = features["items"], features["shops"]
        bags = [
            self.items(items.values(), items.offsets(), per_sample_weights=items.weights()),
            self.shops(shops.values(), shops.offsets()),
        ]
        return self.top(torch.cat([*bags, dense], 1))


@pytest.fixture(scope="module")
def torchrec():
    return pytest.importorskip("torchrec.sparse.jagged_tensor", reason="torchrec is not installed")


def keyed(torchrec, **options):
    lengths = torch.tensor([1, 0, 3, 2, 1, 2, 2, 1, 1, 0, 3, 1])
    values = torch.randint(20, (int(lengths.sum()),), generator=GENERATOR)
    weights = torch.rand(len(values), generator=GENERATOR)
    return torchrec.KeyedJaggedTensor(["items", "shops"], values, weights, lengths=lengths, **options)


def test_keyed_jagged_tensor(on_ranks, torchrec):
    inputs = (torch.randn(6, 2, generator=GENERATOR), keyed(torchrec))
    module = des.compile(Keyed(), inputs)
    for _ in range(2):  # forward has torchrec keep offsets, which are no other input
        assert torch.allclose(module(*inputs), Keyed()(*inputs))
    assert des.verify(Keyed(), inputs, plans=[None, {"*": "row_wise"}], launch=on_ranks).cases == 2


def test_rows_of_jagged_tensors(torchrec):
    x = keyed(torchrec)
    taken = take_rows((x,), torch.tensor([4, 0, 0]))[0]
    for key in x.keys():  # noqa: SIM118
        assert [p.tolist() for p in taken[key].to_dense()] == [x[key].to_dense()[i].tolist() for i in (4, 0, 0)]
        assert [p.tolist() for p in taken[key].to_dense_weights()] == [
            x[key].to_dense_weights()[i].tolist() for i in (4, 0, 0)
        ]
    one = x["items"]
    assert [p.tolist() for p in take_rows((one,), torch.tensor([2]))[0].to_dense()] == [one.to_dense()[2].tolist()]


def test_keys_without_common_rows_are_refused(torchrec):
    x = keyed(torchrec, stride_per_key_per_rank=[[7], [5]])
    with pytest.raises(des.InputError, match="same number of rows for each key"):
        des.compile(Keyed(), (torch.randn(6, 2), x))


def test_a_dict_is_keywords_only_if_it_names_them_all():
    def forward(user, items=None, **rest): ...

    assert normalise_inputs({"user": 1}, forward) == ((), {"user": 1})
    assert normalise_inputs({"items": 1}, forward) == (({"items": 1},), {})  # user is missing
    assert normalise_inputs({"user": 1, "other": 2}, forward) == (({"user": 1, "other": 2},), {})
    assert normalise_inputs({0: 1}, forward) == (({0: 1},), {})
    assert normalise_inputs([1, 2], forward) == ((1, 2), {})
    assert normalise_inputs(3, forward) == ((3,), {})


def test_an_unknown_class_is_told_how_to_register():
    with pytest.raises(des.InputError, match=r"(?s)Unknown, and it is not known.*lambda x: \(\[x.columns\], None\)"):
        des.compile(OneInteraction(), Unknown(COLUMNS))
    with pytest.raises(des.InputError, match="registered already"):
        des.register_input(Interaction, lambda x: ([], None), lambda c, _: None)
    with pytest.raises(des.InputError, match="pass a tensor"):
        des.compile(OneNamedTuple(), Named(np.zeros(9), ITEMS, LENGTH))


def test_statics_are_part_of_what_was_compiled():
    module = des.compile(OneDict(), CASES["dict, one argument"][1])
    with pytest.raises(des.InputError, match="nested"):
        module({"user": USER})
    module = des.compile(Keywords(), {**COLUMNS, "name": "here"})
    with pytest.raises(des.InputError, match=r"nested.*'name'.* is 'there'.*AssertionError"):  # it takes no other
        module(user=USER, items=ITEMS, length=LENGTH, name="there")
    with pytest.raises(des.InputError, match="dim 0 of every input is the batch"):
        module(user=USER[:3], items=ITEMS, length=LENGTH, name="here")


class Pairs(nn.Module):
    """A pair of ids of one table, and of numbers, which an example may have as one object."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.table, self.top = nn.Embedding(30, 4), nn.Linear(8, 1)

    def forward(self, left, right, x, y):
        values = torch.cat([self.table(left) * x.unsqueeze(1), self.table(right) * y.unsqueeze(1)], 1)
        return self.top(values).squeeze(1)


ZEROS, ONES, SEVERAL = torch.zeros(6, dtype=torch.int64), torch.ones(6), torch.arange(6)


@pytest.mark.parametrize(
    "example",
    [
        (ZEROS, ZEROS, ONES, ONES),
        (SEVERAL, SEVERAL, torch.linspace(0, 1, 6), ONES),
        {"left": SEVERAL, "right": SEVERAL, "x": ONES, "y": ONES},
        (SEVERAL, SEVERAL[:], ONES, ONES.view(6)),
        (ZEROS[:1], ZEROS[:1], ONES[:1], ONES[:1]),
    ],
    ids=["zeros", "several", "keywords", "views", "one row"],
)
def test_a_tensor_that_is_given_twice_is_two_inputs(example):
    model = Pairs()
    module = des.compile(model, example)
    assert module.coverage().rung == "export"
    inputs = (torch.arange(6), torch.arange(6) + 10, torch.randn(6), torch.randn(6))
    torch.testing.assert_close(module(*inputs), model(*inputs))
