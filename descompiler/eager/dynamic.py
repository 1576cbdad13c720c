"""Weights of dynamic tables on ranks: what happens when Python code uses rows of which this rank holds some, by slot.

Nothing says which row another rank has in a slot, or how many it has. So what goes element by element, as optimisers
do, goes on here; everything that is about all rows, or makes other numbers of them, is refused by name.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from descompiler.dynamic.table import Table
from descompiler.eager.held import Whose, held, on_pieces, take_in_lists, tensors_among
from descompiler.eager.parameters import BACKWARDS, NEVER_USES
from descompiler.eager.piece import Divided, Piece, local
from descompiler.errors import UnsupportedError
from descompiler.layout.pieces import Pieces
from descompiler.ops.functions import function_name
from descompiler.ops.local import plain
from descompiler.runtime.runtime import Runtime


class DynamicParameter(Divided):
    """This rank's rows of a dynamic table, by slot."""

    whose: Whose  # of what it gives away
    original = property(lambda self: self.whose.original)
    pieces = property(lambda self: self.whose.pieces)
    rank = property(lambda self: self.whose.rank)
    runtime = property(lambda self: self.whose.runtime)
    is_moved = property(lambda self: True)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in BACKWARDS:
            return local(func, args, kwargs)
        if not torch.is_grad_enabled() or func in NEVER_USES:
            return on_pieces(func, args, kwargs)
        result = local(func, args, kwargs)
        if result is None:
            return None
        given = tensors_among((args, kwargs))
        if any(all(x is not y for y in given) for x in tensors_among(result)):
            own: Any = next(x for x in given if isinstance(x, Piece))
            raise UnsupportedError(
                f"{function_name(func)} of {own.original!r}, the rows of a dynamic table, of which each rank holds "
                "some: only lookups use them. Penalise what the lookups return"
            )
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        result = nn.Parameter(plain(self).detach().clone(), self.requires_grad)
        memo[id(self)] = result
        return result  # a copy is a plain tensor: it belongs to no module

    def __reduce_ex__(self, protocol: Any) -> Any:
        return nn.Parameter(plain(self).detach(), self.requires_grad).__reduce_ex__(protocol)


take_in_lists(DynamicParameter)


def substitute_dynamic(p: nn.Parameter, name: str, pieces: Pieces, table: Table, runtime: Runtime) -> None:
    """Make the weight of a rank's part of a table a `DynamicParameter`, in place."""
    p.__class__ = DynamicParameter
    p.whose = Whose(name, pieces, runtime.rank, runtime, is_moved=True)  # type: ignore[attr-defined]

    def marked(x: Tensor) -> Tensor:
        return held(x, p)

    table.rows.marked = marked
