"""Importing this traces, plans and runs a model: forks of a process that has done so need not pay for it.

The first `des.compile` of a process imports torch's tracers, and fills caches of sympy and torch, which takes seconds.
For the server that local ranks are forked from (`tests.harness.pool.serve_ready_ranks`); it has no threads afterwards.
"""

import contextlib
import warnings

import torch
from torch import nn

import descompiler as des
from tests.harness.pool import collect_rarely


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.top = nn.Embedding(8, 4), nn.Linear(8, 1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(self.top(self.table(ids).flatten(1)))


is_ready = False
"""Whether all of it went well."""


def _make_ready() -> None:
    global is_ready
    torch.set_num_threads(1)
    ids = torch.arange(8).view(4, 2)
    # whatever is wrong here is wrong in tests too, and they say so
    with torch.random.fork_rng(), warnings.catch_warnings(), contextlib.suppress(Exception):
        warnings.simplefilter("ignore")
        torch.compile(_Model(), backend="eager")(ids)
        torch._dynamo.reset()
        des.compile(_Model(), (ids,))(ids).sum().backward()
        des.plan(_Model(), (ids,), ranks=2).explain()
        is_ready = True
    collect_rarely()


_make_ready()
