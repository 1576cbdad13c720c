"""A dynamic table that begins with the rows of a static one."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from descompiler.dynamic.embedding import DynamicEmbedding
from descompiler.errors import InputError, UnsupportedError


def from_embedding(embedding: nn.Embedding, **options: Any) -> DynamicEmbedding:
    """A dynamic table that has the rows of a static one under ids 0 to n - 1.

    They are there whatever the admission; the first step sees them as new where the table evicts.

    Parameters
    ----------
    embedding : torch.nn.Embedding
    **options
        Those of `DynamicEmbedding` but ``dim``, ``dtype``, ``device`` and ``padding_idx``, which are the embedding's.

    Raises
    ------
    UnsupportedError
        For ``max_norm``, ``scale_grad_by_freq``, and a padding row that is not zeros.
    InputError
        If the rows are more than ``max_rows``.

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
    rows, padding = embedding.weight.detach(), embedding.padding_idx
    if padding is not None and bool(rows[padding].any()):
        raise UnsupportedError(
            f"row {padding} of the embedding, its padding_idx, is not zeros, as a dynamic table's is: set it to zeros"
        )
    made = DynamicEmbedding(rows.shape[1], dtype=rows.dtype, device=rows.device, padding_idx=padding, **options)
    most = made._table.config.max_rows
    ids = torch.arange(len(rows))
    if padding is not None:
        ids = ids[ids != padding]
    if most is not None and len(ids) > most:
        raise InputError(f"the embedding has {len(ids)} rows, more than max_rows={most}")
    made._table.enter(ids, rows[ids.to(rows.device)])
    return made.train(embedding.training)
