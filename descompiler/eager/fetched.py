"""Rows that were fetched where no graph is made: what one process has a view of is a copy here, and says so."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from descompiler.eager.elements import changes_in_place
from descompiler.eager.piece import local
from descompiler.errors import UnsupportedError
from descompiler.ops.functions import function_name
from descompiler.ops.local import plain


class Fetched(Tensor):
    """Rows of a piece's original, asked for where no graph is made: a copy, where one process has a view."""

    original: str

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if changes_in_place(func) and args and isinstance(args[0], Fetched):
            raise UnsupportedError(
                f"{function_name(func)} of rows of {args[0].original!r}: they are a copy, fetched from the ranks that "
                "hold them, and a change of it is lost. Write the rows themselves, p[3] = 0 or p[:7] = 0, under "
                "torch.no_grad(), or the whole, des.load_full_state_dict(module, state)"
            )
        result = local(func, args, kwargs or {})
        given = args[0] if args else None
        if type(result) is Tensor and isinstance(given, Fetched) and _is_view(result, given):
            return fetched(result, given.original)  # of the copy
        return result


def _is_view(x: Tensor, of: Tensor) -> bool:
    return x.numel() > 0 and x.untyped_storage().data_ptr() == of.untyped_storage().data_ptr()


def fetched(x: Tensor, original: str) -> Fetched:
    """Rows of an original, as `Fetched`."""
    result: Fetched = plain(x).as_subclass(Fetched)
    result.original = original
    return result
