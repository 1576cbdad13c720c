"""Dynamic tables that begin with the rows of static ones: one by itself, and those of a model."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from descompiler.dynamic.embedding import HOOKS, DynamicEmbedding, DynamicEmbeddingBag, DynamicTable
from descompiler.errors import InputError, UnsupportedError

_OF_THE_EMBEDDING = {"dim", "dtype", "device", "padding_idx", "mode", "include_last_offset"}


def from_embedding(embedding: nn.Embedding | nn.EmbeddingBag, **options: Any) -> DynamicTable:
    """A dynamic table that has the rows of a static one under ids 0 to n - 1.

    They are there whatever the admission; the first step sees them as new where the table evicts.

    Parameters
    ----------
    embedding : torch.nn.Embedding or torch.nn.EmbeddingBag
    **options
        Those of `DynamicEmbedding` but ``dim``, ``dtype``, ``device`` and ``padding_idx``, which are the embedding's.

    Raises
    ------
    UnsupportedError
        For ``max_norm``, ``scale_grad_by_freq``, a padding row that is not zeros, classes of its own, parametrisations
        and hooks, and rows on the meta device.
    InputError
        If the rows are more than ``max_rows``, or for options that are the embedding's.

    Examples
    --------
    >>> table = from_embedding(nn.Embedding.from_pretrained(torch.tensor([[1.0], [2.0]])), name="user")
    >>> table(torch.tensor([1, 0])).tolist(), table.resident().tolist()
    ([[2.0], [1.0]], [0, 1])
    """
    refused = {"max_norm": embedding.max_norm, "scale_grad_by_freq": embedding.scale_grad_by_freq}
    for name, value in refused.items():
        if value:
            raise UnsupportedError(f"nn.Embedding({name}={value}): a dynamic table has no {name}; leave it out")
    if type(embedding) not in (nn.Embedding, nn.EmbeddingBag):  # parametrisations make a class, too
        raise UnsupportedError(
            f"{type(embedding).__name__} may do more than nn.Embedding, and a dynamic table would not"
        )
    if any(vars(embedding).get(hooks) for hooks in HOOKS):
        raise UnsupportedError("the embedding has hooks, which a dynamic table would not call: register them on it")
    if embedding.weight.is_meta:
        raise UnsupportedError("the embedding is on the meta device and has no rows: make a DynamicEmbedding instead")
    if others := options.keys() & _OF_THE_EMBEDDING:
        raise InputError(f"{', '.join(sorted(others))}= of a dynamic table that has an embedding's rows are its own")
    if unknown := options.keys() - inspect.signature(DynamicTable).parameters.keys():
        known = sorted(inspect.signature(DynamicTable).parameters.keys() - _OF_THE_EMBEDDING)
        raise InputError(f"{', '.join(sorted(unknown))}= is no option of a dynamic table: {', '.join(known)}")
    rows, padding = embedding.weight.detach(), embedding.padding_idx
    if padding is not None and bool(rows[padding].any()):
        raise UnsupportedError(
            f"row {padding} of the embedding, its padding_idx, is not zeros, as a dynamic table's is: set it to zeros"
        )
    options |= {"dtype": rows.dtype, "device": rows.device, "padding_idx": padding}
    made: DynamicTable
    if isinstance(embedding, nn.EmbeddingBag):
        options |= {"mode": embedding.mode, "include_last_offset": embedding.include_last_offset}
        made = DynamicEmbeddingBag(rows.shape[1], **options)
    else:
        made = DynamicEmbedding(rows.shape[1], **options)
    made.weight.requires_grad_(embedding.weight.requires_grad)
    most = made._table.config.max_rows
    ids = torch.arange(len(rows))
    if padding is not None:
        ids = ids[ids != padding]
    if most is not None and len(ids) > most:
        raise InputError(f"the embedding has {len(ids)} rows, more than max_rows={most}")
    made._table.enter(ids, rows[ids.to(rows.device)])
    return made.train(embedding.training)


def with_dynamic(model: nn.Module, dynamic: Mapping[str, Mapping[str, Any] | None]) -> nn.Module:
    """A copy of a model in which some static tables are dynamic; everything else is the model's own.

    Parameters
    ----------
    dynamic : mapping of str to mapping or None
        Paths of ``nn.Embedding`` and ``nn.EmbeddingBag`` modules, or their ends, to options of `from_embedding`.
        Without a ``name`` a table has its path.

    Raises
    ------
    InputError
        For a name that is none of such a module, or of several.
    UnsupportedError
        For a table whose weight other modules have too.

    Examples
    --------
    >>> model = with_dynamic(nn.Sequential(nn.Embedding(3, 2), nn.Linear(2, 1)), {"0": {"seed": 1}})
    >>> model(torch.tensor([2, 1 << 60])).shape, len(model[0])
    (torch.Size([2, 1]), 4)
    """
    static = {n: m for n, m in model.named_modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)}
    made: dict[int, Any] = {}
    for wanted, options in dynamic.items():
        names = [n for n in static if n == wanted] or [n for n in static if n.endswith(f".{wanted}")]
        if len(names) != 1:
            found = f"is the end of {', '.join(names)}" if names else "is no table of the model"
            raise InputError(f"dynamic={{{wanted!r}: ...}} {found}; tables: {', '.join(static) or 'none'}")
        table = static[names[0]]
        owners = {n for n, m in model.named_modules() for p in m.parameters(recurse=False) if p is table.weight}
        if others := owners - {names[0]}:
            raise UnsupportedError(
                f"dynamic={{{wanted!r}: ...}}: its weight is that of {', '.join(sorted(others))} too, and rows that "
                "come and go are of one table: untie them"
            )
        made[id(table)] = from_embedding(table, **({"name": names[0]} | dict(options or {})))
    own: dict[int, Any] = {id(x): x for x in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, own | made)
