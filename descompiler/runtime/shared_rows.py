"""Gradients of rows that every rank holds: gathered, each unique row once, or all-reduced."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from descompiler.layout.fetches import Fetch
from descompiler.layout.pieces import ALL
from descompiler.runtime.carriers import carries
from descompiler.runtime.collectives import Pending
from descompiler.runtime.communicator import Communicator
from descompiler.runtime.differences import decode
from descompiler.runtime.fetching import Fetching, Gathering, collected, message_sizes
from descompiler.runtime.messages import message_dtype, packed


def to_all(runtime: Communicator, mine: Tensor, counts: Sequence[int], name: str) -> Pending:
    """What every other rank sends, ``counts`` elements, in order of rank; ``mine`` goes to them.

    An all-to-all: gloo has no all-gather of uneven sizes, and padding would cost bytes.
    """
    sent = [0 if r == runtime.rank else len(mine) for r in range(runtime.ranks)]
    sizes = [0 if r == runtime.rank else n for r, n in enumerate(counts)]
    return runtime.exchange(mine.repeat(runtime.ranks - 1), sent, sizes, name)


@carries(Fetch)
def start_gathering(runtime: Communicator, fetching: Fetching, own: list[Tensor]) -> Gathering:
    """Send every rank the gradients of the shared rows that this one looked up."""
    fetch, rank = fetching.fetch, runtime.rank
    assert fetching.telling is not None
    sizes = [0 if r == rank else n for r, n in enumerate(fetching.gathered_counts)]
    received = decode(fetching.telling.wait(), sizes, fetch.digits)
    firsts = fetching.space.shared[torch.tensor([m.start for m in fetch.classes], device=received.device)]
    counts, keys = [], []
    for part in torch.split(received, sizes):  # in order of class
        ends = [*torch.searchsorted(part, firsts).tolist(), len(part)]
        counts.append([b - a for a, b in itertools.pairwise(ends)])
        keys.append(torch.split(part, counts[-1]))
    keys[rank] = tuple(fetching.shared_keys)
    rounded = [g.to(wire) for g, wire in zip(own, fetching.wires, strict=True)]
    values = packed([rounded[c] for c in fetch.gathered_classes], message_dtype(fetching.wires), received.device)
    sizes = message_sizes(fetching, counts)
    own = [g.to(dtype) for g, dtype in zip(rounded, fetching.dtypes, strict=True)]  # as the others get them
    return Gathering(to_all(runtime, values, sizes, Fetch.GATHERED_BACK), counts, keys, own)


def gathered_gradients(runtime: Communicator, fetching: Fetching) -> dict[int, tuple[Tensor, Tensor]]:
    """By class, the shared keys of all ranks and their gradients.

    In order of rank everywhere, so that replicas stay equal bit for bit: sums run in the same order.
    """
    g = fetching.gathering
    if g is None:
        return {}
    parts = collected(fetching, g.values.wait(), g.counts)
    result = {}
    for c in fetching.fetch.gathered_classes:
        parts[c][runtime.rank] = g.own[c]
        result[c] = torch.cat([k[c] for k in g.keys]), torch.cat(parts[c])
    return result


@carries(Fetch)
def start_reducing(runtime: Communicator, fetching: Fetching, own: Sequence[Tensor]) -> list[tuple[Pending, Tensor]]:
    """Sum dense gradients of shared rows over ranks; a table with sparse gradients adds who looked a row up."""
    fetch, shared = fetching.fetch, fetching.space.shared
    parts: dict[torch.dtype, list[Tensor]] = {}
    for c, members in enumerate(fetch.classes):
        if any(t in fetch.reduced_tables for t in members):
            keys, values = fetching.shared_keys[c] - shared[members.start], own[c]
            if fetch.tables[members.start].sparse:
                values = torch.cat([values, values.new_ones((len(values), 1))], 1)
            rows = sum(int(fetch.tables[t].sizes[ALL]) for t in members)
            terms = values.new_zeros((rows, values.shape[1])).index_add_(0, keys, values)
            parts.setdefault(values.dtype, []).append(terms.reshape(-1))
    sums = [torch.cat(of_dtype) for of_dtype in parts.values()]
    return [(runtime.all_reduce_start(Fetch.SUM_SHARED, flat), flat) for flat in sums]


def reduced_gradients(fetching: Fetching) -> dict[int, tuple[Tensor, Tensor]]:
    """By table, shared rows and their gradients, summed over ranks."""
    fetch, result = fetching.fetch, {}
    for work, flat in fetching.reducing:
        work.wait()
        tables = [t for t in fetch.reduced_tables if fetching.dtypes[fetch.class_of[t]] == flat.dtype]
        sizes = [int(fetch.tables[t].sizes[ALL]) for t in tables]
        widths = [fetch.tables[t].dim + fetch.tables[t].sparse for t in tables]
        parts = torch.split(flat, [n * w for n, w in zip(sizes, widths, strict=True)])
        for t, n, w, part in zip(tables, sizes, widths, parts, strict=True):
            values, rows = part.reshape(n, w), torch.arange(n, device=flat.device)
            if fetch.tables[t].sparse:
                rows = rows[values[:, -1] > 0]
                values = values[rows, :-1]
            result[t] = rows, values
    return result
