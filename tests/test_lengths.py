"""Histories padded on each rank to its own longest, as every collate function does; other lengths in every step."""

import itertools
import re

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import descompiler as des
from tests.harness.cases import cases

FORMS = (None, "table_wise", "row_wise", "column_wise", "unique_rows", "sparse_all_gather", "hot_rows", "replicate")


class Pool(nn.Module):
    """A mean over a history whose padding is inert."""

    def __init__(self) -> None:
        super().__init__()
        self.item, self.user = nn.Embedding(60, 4, padding_idx=0), nn.Embedding(20, 4)
        self.head = nn.Linear(8, 1)

    def pooled(self, history: Tensor) -> Tensor:
        mask = (history != 0).unsqueeze(-1).to(self.item.weight.dtype)
        return (self.item(history) * mask).sum(1) / mask.sum(1).clamp(min=1)

    def forward(self, history: Tensor, user: Tensor) -> Tensor:
        return self.head(torch.cat([self.pooled(history), self.user(user)], 1))


class Normed(Pool):
    """Behind it a batch norm, whose statistics are of the global batch."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, history: Tensor, user: Tensor) -> Tensor:
        return self.head(torch.cat([self.norm(self.pooled(history)), self.user(user)], 1))


class Attention(Pool):
    def forward(self, history: Tensor, user: Tensor) -> Tensor:
        items, query = self.item(history), self.user(user)
        scores = (items @ query.unsqueeze(-1)).squeeze(-1).masked_fill(history == 0, -1e9).softmax(1)
        return self.head(torch.cat([(scores.unsqueeze(1) @ items).squeeze(1), query], 1))


class Positioned(Pool):
    """Positions, of which a program knows how many there are."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(1, 8, 1))

    def pooled(self, history: Tensor) -> Tensor:
        mask = (history != 0).unsqueeze(-1).to(self.item.weight.dtype)
        return (self.item(history) * self.position[:, : history.shape[1]] * mask).sum(1)


class NextItem(Pool):
    """Logits at every position, against the table itself."""

    def forward(self, history: Tensor, user: Tensor) -> Tensor:
        x = self.item(history) + self.user(user)[:, None]
        logits = x @ self.item.weight.t()
        mask = (history != 0).to(x.dtype)
        return ((logits.logsumexp(-1) - logits.gather(-1, history[..., None]).squeeze(-1)) * mask).sum(1, keepdim=True)


class Last(Pool):
    """The last item by a length that is an input: an example of a longer history can't be cut for it."""

    def forward(self, history: Tensor, user: Tensor, length: Tensor) -> Tensor:
        last = self.item(history)[torch.arange(len(history)), length - 1]
        return self.head(torch.cat([last, self.user(user)], 1))


def _batch(rows: int, longest: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    length = torch.randint(1, longest + 1, (rows,), generator=generator)
    history = torch.randint(1, 60, (rows, longest), generator=generator)
    history[torch.arange(longest) >= length[:, None]] = 0
    user = torch.randint(20, (rows,), generator=generator)
    return [history, user, length, torch.randn(rows, 1, generator=generator, dtype=torch.float64)]


STEPS = (((4, 3), (6, 5)), ((5, 5), (5, 3)), ((0, 3), (10, 5)), ((5, 5), (5, 5)))
"""Of each step, each rank's rows, and its longest history: they change sides, one has no rows, all are equal."""


def _own(rank: int, step: int) -> list[Tensor]:
    """A rank's rows of a step, padded to its own longest."""
    rows, longest = STEPS[step][rank]
    return _batch(rows, longest, 2 * step + rank)


def _global(step: int) -> list[Tensor]:
    """The rows of both ranks, padded to the longest of all."""
    histories, *rest = zip(*(_own(rank, step) for rank in range(2)), strict=True)
    longest = max(x.shape[1] for x in histories)
    return [torch.cat([F.pad(x, (0, longest - x.shape[1])) for x in histories]), *map(torch.cat, rest)]


def _train(rank, ranks, model, forms, same):
    """How far weights are from those of one process on the global batch, padded to the longest."""
    torch.set_default_dtype(torch.float64)
    count = 3 if isinstance(model, Last) else 2
    found = []
    for form in forms:
        reference = type(model)()
        reference.load_state_dict(model.state_dict())
        example = _batch(6, 5 if same else STEPS[0][rank][1], 99)[:count]
        module = des.compile(model, example, plan=form and {"item": form}, loss="sum")
        optimisers = [torch.optim.SGD(m.parameters(), 0.01) for m in (reference, module)]
        for step in range(len(STEPS)):
            for net, optimiser, batch in zip(
                (reference, module), optimisers, (_global(step), _own(rank, step)), strict=True
            ):
                optimiser.zero_grad()
                ((net(*batch[:count]) - batch[3]) ** 2).sum().backward()
                optimiser.step()
        state = des.full_state_dict(module)
        found.append(max(float((x - state[n]).abs().max()) for n, x in reference.state_dict().items()))
    return found


EXAMPLES = list(itertools.product([Pool, Normed, Attention, Positioned, NextItem, Last], [True, False]))
"""Models, and whether the ranks' examples are of one length."""


EXAMPLES_ALWAYS = (
    (Pool, False),
    (Attention, False),
    (Positioned, True),
    (Last, True),
)


@pytest.mark.long(but=1)
@pytest.mark.parametrize(("model", "same"), cases(EXAMPLES, EXAMPLES_ALWAYS))
def test_each_rank_pads_to_its_own_longest(model, same, on_ranks):
    torch.manual_seed(0)
    forms = FORMS if same and model is Normed else (None, "row_wise")
    for found in on_ranks(_train, 2, model().double(), forms, same):
        assert max(found) < 1e-9, dict(zip(forms, found, strict=True))


class Positions(Pool):
    """A batch norm over positions."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, history: Tensor, user: Tensor) -> Tensor:
        return self.norm(self.item(history).transpose(1, 2)).sum((1, 2)) + self.user(user).sum(1)


class MixedInPart(Pool):
    """In Python that no tracer goes through, on rows that depend on each other."""

    def forward(self, history: Tensor, user: Tensor) -> Tensor:
        history = torch.from_numpy(np.sort(history.numpy(), axis=1))
        return super().forward(history, user).softmax(0) * len(np.unique(history.numpy()))


def _refused(rank, ranks, model):
    module = des.compile(model, _batch(6, 5, 99)[:2])
    try:
        module(*_own(rank, 0)[:2])
    except des.DescompilerError as error:
        text = f"{type(error).__name__}: {error}"
    history, user, *_ = _batch(3, 7, rank)
    return text, module(history, user).isfinite().all().item()


@pytest.mark.long(but=1)
@pytest.mark.parametrize("model", [Positions, MixedInPart])
def test_what_would_mix_other_lengths_is_refused_on_every_rank(model, on_ranks):
    for text, fine in on_ranks(_refused, 2, model(), timeout_s=30):
        assert re.search("InputError: .*pad to one length on all ranks", text, re.DOTALL)
        assert fine, "the next step has to work"


@pytest.mark.long
def test_many_lengths_are_told_of():
    module = des.compile(Pool(), _batch(6, 5, 99)[:2])
    with pytest.warns(UserWarning, match="captured for inputs of 8 sizes.*Pad histories to a few lengths"):
        for longest in range(8, 16):
            module(*_batch(3, longest, 0)[:2])


class Threshold(Pool):
    def forward(self, history: Tensor, user: Tensor) -> Tensor:
        x = super().forward(history, user)
        return x * 2 if x.shape[0] > 8 else x


class ThresholdOfTables(Pool):
    """Other values cross in the other branch, and they are of other widths."""

    def forward(self, history: Tensor, user: Tensor) -> Tensor:
        if len(user) > 8:
            return torch.sigmoid(self.user(user))
        return super().forward(history, user).expand(-1, 4)


class Parity(Pool):
    def forward(self, history: Tensor, user: Tensor) -> Tensor:
        x = super().forward(history, user)
        return x * 2 if len(user) % 2 else x


class OtherLayer(Pool):
    """In the other branch other parameters have gradients, which every rank holds."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(4, 1)

    def forward(self, history: Tensor, user: Tensor) -> Tensor:
        return self.other(self.user(user)) if len(user) > 8 else super().forward(history, user)


class FirstRows(Pool):
    """Rows of the global batch, which every rank has."""

    def forward(self, history: Tensor, user: Tensor) -> Tensor:
        return super().forward(history, user)[:8]


class Best(Pool):
    def forward(self, history: Tensor, user: Tensor) -> Tensor:
        return super().forward(history, user).topk(5, 0).values


ROWS = ((4, 6), (2, 4), (3, 4), (0, 12))


def _branches(rank, ranks, model):
    """As `_train`, with the rows of `ROWS`."""
    torch.set_default_dtype(torch.float64)
    reference = type(model)()
    reference.load_state_dict(model.state_dict())
    module = des.compile(model, _batch(6, 4, 99)[:2], plan={"item": "row_wise"}, loss="sum")
    optimisers = [torch.optim.SGD(m.parameters(), 0.01) for m in (reference, module)]
    for step, rows in enumerate(ROWS):
        parts = [_batch(n, 4, 2 * step + r)[:2] for r, n in enumerate(rows)]
        whole = [torch.cat(x) for x in zip(*parts, strict=True)]
        for net, optimiser, batch in zip((reference, module), optimisers, (whole, parts[rank]), strict=True):
            optimiser.zero_grad()
            (net(*batch) ** 2).sum().backward()
            optimiser.step()
    state = des.full_state_dict(module)
    return max(float((x - state[n]).abs().max()) for n, x in reference.state_dict().items())


@pytest.mark.long(but=1)
@pytest.mark.parametrize("model", [Threshold, Parity, OtherLayer, FirstRows, Best])
def test_a_branch_on_the_batch_size_is_that_of_the_global_batch(model, on_ranks):
    assert max(on_ranks(_branches, 2, model().double())) < 1e-12


@pytest.mark.long
def test_traffic_of_each_branch_is_predicted(on_ranks):
    """`des.verify` takes batches of more rows than the example's, and of fewer."""
    forms = [{"*": "row_wise"}, {"item.weight": "column_wise", "user.weight": "unique_rows"}]
    des.verify(ThresholdOfTables(), _batch(6, 4, 99)[:2], plans=forms, launch=on_ranks)
