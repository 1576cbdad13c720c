"""FBGEMM's Adagrad for rows of tables, over tables and states that stay PyTorch's (``descompiler[fbgemm]``).

This kernel sorts ids, and then sums, squares and moves each row while it is in the cache. PyTorch's operators pass over
the rows several times, but tables looked up with the same ids share a sort (`descompiler.ops.unique`), and they are
the faster for wide rows. The kernel is for float32 on CPUs; lookups, SGD and Adagrad of one number a row take PyTorch's
operators no more time.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from descompiler.eager.piece import Piece
from descompiler.module.updates import Step, adagrad_rate

OPERATOR = "split_embedding_backward_codegen_adagrad_cpu"
ARGUMENTS = (
    *("grad_output", "host_weights", "weights_placements", "weights_offsets", "D_offsets", "max_D", "hash_size_cumsum"),
    *("total_hash_size_bits", "indices", "offsets", "pooling_mode", "indice_weights", "stochastic_rounding"),
    *("momentum1_host", "momentum1_placements", "momentum1_offsets", "learning_rate_tensor", "eps", "output_dtype"),
)
"""Of the operator, which is none of FBGEMM's public interface: a release that has others is not called."""

MOST_ROWS = 2**31 - 2
"""Of a table: the kernel has positions of 32 bits."""

NARROW = 4
"""Columns up to which the kernel is the faster, where PyTorch's operators sort the rows of all tables once; measured,
docs/standard.md has the figures."""

MOST_COLUMNS = 2**14
"""The kernel has one row on its stack."""

SUM_POOLING = 0


@functools.cache
def lacks() -> str | None:
    """Why this process can't call FBGEMM's kernel; None if it can. The first call imports FBGEMM: most of a second."""
    try:
        importlib.import_module("fbgemm_gpu")
    except (ImportError, OSError) as error:  # OSError: built for another PyTorch
        return f"FBGEMM can't be imported ({error}): pip install descompiler[fbgemm]"
    operator = getattr(torch.ops.fbgemm, OPERATOR, None)
    if operator is None or tuple(a.name for a in operator.default._schema.arguments) != ARGUMENTS:
        return f"this release of FBGEMM has another {OPERATOR}: pip install descompiler[fbgemm] -c constraints.txt"
    return None


def is_for(table: Tensor) -> bool:
    """Whether the kernel updates tables of this kind."""
    return table.dtype == torch.float32 and table.device.type == "cpu"


def is_narrow(table: Tensor) -> bool:
    """Whether the kernel is faster than PyTorch's operators, by its width in the original: alike on every rank."""
    return (table.pieces.shape if isinstance(table, Piece) else table.shape)[1] <= NARROW


def adagrad(s: Step) -> bool:
    """Make a step of Adagrad, of rows that may be there several times; False, and nothing, if the kernel can't."""
    (total,), (count, width) = s.states, s.table.shape
    several = (s.table, total, s.gradient)
    if not all(is_for(x) for x in several) or not (s.table.is_contiguous() and total.is_contiguous()):
        return False
    if total.shape != s.table.shape or count > MOST_ROWS or width > MOST_COLUMNS or not len(s.rows):
        return False
    ids = len(s.rows)
    first, placement = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int32)
    _operator()(
        grad_output=s.gradient,
        host_weights=s.table.view(-1),
        weights_placements=placement,
        weights_offsets=first,
        D_offsets=torch.tensor([0, width], dtype=torch.int32),
        max_D=width,
        hash_size_cumsum=torch.tensor([0, count]),
        total_hash_size_bits=count.bit_length(),
        indices=s.rows,
        offsets=torch.arange(ids + 1, dtype=s.rows.dtype),  # each is a bag of one
        pooling_mode=SUM_POOLING,
        indice_weights=torch.ones(ids),  # Python can't say none: an empty tensor may be read
        stochastic_rounding=False,
        momentum1_host=total.view(-1),
        momentum1_placements=placement,
        momentum1_offsets=first,
        learning_rate_tensor=torch.tensor(float(adagrad_rate(s)), dtype=torch.float32),
        eps=s.options["eps"],
    )
    return True


def _operator() -> Any:
    return getattr(torch.ops.fbgemm, OPERATOR)


KERNELS: dict[type[torch.optim.Optimizer], Callable[[Step], bool]] = {torch.optim.Adagrad: adagrad}
"""By optimiser."""
