"""Sparse matrices that a model holds (an adjacency for graph propagation): taken apart, hashed, sent.

They are constants or buffers of a program, as dense ones are; only what looks into their memory has to know of them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from descompiler.model.attributes import COMPRESSED, held_tensors


def parts_of(x: Tensor) -> list[Tensor]:
    """The dense tensors that a tensor is made of: itself, or indices and values.

    >>> [p.shape for p in parts_of(torch.eye(3).to_sparse())]
    [torch.Size([2, 3]), torch.Size([3])]
    """
    if x.layout is torch.sparse_coo:
        return [x._indices(), x._values()]
    if x.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [x.crow_indices(), x.col_indices(), x.values()]
    if x.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [x.ccol_indices(), x.row_indices(), x.values()]
    return [x]


def equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same, bit for bit, and stored the same way."""
    if a.layout is not b.layout or a.shape != b.shape:
        return False
    return all(map(torch.equal, parts_of(a), parts_of(b)))


def with_parts(like: Tensor, parts: list[Tensor]) -> Tensor:
    """The tensor of the shape and layout of ``like`` that is made of these parts: the inverse of `parts_of`."""
    if like.layout is torch.sparse_coo:
        made = torch.sparse_coo_tensor(parts[0], parts[1], like.shape, check_invariants=False)
        return made._coalesced_(like.is_coalesced())
    if like.layout in COMPRESSED:
        compressed, plain, values = parts
        return torch.sparse_compressed_tensor(
            compressed, plain, values, size=like.shape, layout=like.layout, check_invariants=False
        )
    return parts[0]


def register_compressed(model: nn.Module) -> set[str]:
    """Make buffers of compressed matrices that are plain attributes, which `torch.export` takes; their names."""
    wanted = [(m, n, x) for m, n, x in held_tensors(model) if x.layout in COMPRESSED]
    for module, name, x in wanted:
        delattr(module, name)
        module.register_buffer(name, x, persistent=False)
    made = {(id(m), n) for m, n, _ in wanted}
    return {
        f"{prefix}.{n}".lstrip(".") for prefix, m in model.named_modules() for n in m._buffers if (id(m), n) in made
    }
