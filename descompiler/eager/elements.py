"""Functions of torch that meet pieces outside of a graph, by what they ask of elements that other ranks hold.

A call is let through because it is known to go element by element, and for no other reason: `is_local`. What is in none
of these sets, and makes a tensor of a piece, is refused.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from descompiler.ops.functions import ELEMENTWISE, NORMS, PRODUCTS


def _of_torch(names: str) -> set[Any]:
    return {getattr(home, name) for home in (torch, Tensor) for name in names.split() if hasattr(home, name)}


_NEW = _of_torch("detach zeros_like ones_like empty_like full_like")


COPIES = _NEW
"""What is of no graph, though gradients are on."""


_ELEMENT_BY_ELEMENT = """
    abs absolute acos acosh asin asinh atan atan2 atanh ceil clip copysign cos cosh deg2rad erf erfc erfinv exp2 expm1
    floor floor_divide fmod fmax fmin frac heaviside hypot isclose isfinite isinf isnan isneginf isposinf lerp lgamma
    digamma log10 log2 logical_and logical_not logical_or logical_xor logit masked_fill maximum minimum nan_to_num
    positive reciprocal remainder round rsub sgn sigmoid sign sin sinc sinh tan trunc true_divide where xlogy addcdiv
    addcmul eq ne lt le gt ge greater greater_equal less less_equal not_equal bitwise_and bitwise_or bitwise_xor
    bitwise_not
"""


_CHANGES = """
    add sub mul div multiply subtract divide neg negative sqrt rsqrt square pow exp log log1p tanh relu clamp clamp_min
    clamp_max float_power ldexp
"""


_COPIED = """
    clone detach detach_ to cpu cuda float double half bfloat16 int long bool contiguous pin_memory type type_as
    zeros_like ones_like empty_like full_like new_empty new_zeros new_ones new_full __eq__ __ne__ __lt__ __le__ __gt__
    __ge__ __rtruediv__ __rpow__ __invert__ __and__ __or__ __xor__ __floordiv__ __mod__ __rfloordiv__ __rmod__ __pos__
    __abs__
"""


KEEPS = ELEMENTWISE | _of_torch(_ELEMENT_BY_ELEMENT) | _of_torch(_CHANGES) | _of_torch(_COPIED)
"""What makes a piece of the same kind of a piece."""


_VIEWS = """
    view reshape flatten ravel t transpose permute unsqueeze squeeze unflatten movedim moveaxis swapaxes swapdims expand
    view_as reshape_as expand_as adjoint view_as_real view_as_complex
"""


MOVES = _of_torch(_VIEWS)
TURNED: set[Any] = {getattr(Tensor, n).__get__ for n in ("T", "mT", "H", "mH")}
"""What leaves the elements, and puts them in another shape: sums and norms of that are no longer asked for."""


JOINS = _of_torch("cat stack hstack vstack concat concatenate dstack column_stack row_stack")


GIVES_PIECES: set[Any] = {Tensor.grad.__get__, Tensor.data.__get__}  # type: ignore[attr-defined,union-attr]


_FILLS = "uniform_ normal_ random_ bernoulli_ exponential_ geometric_ cauchy_ log_normal_"


RANDOM = _of_torch(_FILLS + " rand_like randn_like randint_like bernoulli dropout")


INITIALISERS: set[Any] = {
    f
    for n, f in vars(torch.nn.init).items()
    if n.endswith("_") and not n.startswith("_") and n not in ("constant_", "zeros_", "ones_")
}
"""What `torch.nn.init` fills at random, or for the sizes of what it is given."""


EXTREMES = {"max": dist.ReduceOp.MAX, "amax": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN, "amin": dist.ReduceOp.MIN}


OF_ALL = {"sum": dist.ReduceOp.SUM, "mean": dist.ReduceOp.SUM, "any": dist.ReduceOp.MAX, "all": dist.ReduceOp.MIN}


_WITHOUT_RANKS = "std var prod median nanmean nansum argmax argmin logsumexp softmax count_nonzero aminmax"


REDUCTIONS = {
    getattr(h, n): n for h in (torch, Tensor) for n in (*EXTREMES, *OF_ALL, *_WITHOUT_RANKS.split()) if hasattr(h, n)
}
"""By function, its name: along dimensions that are not cut each rank has the result of its piece."""


_NAMES = """
    numpy tolist item __array__ __dlpack__ cumsum sort topk unique quantile histc dot vdot inner addmm mv einsum
    tensordot svd qr equal allclose is_nonzero __bool__ __float__ __int__ __complex__ __index__ __contains__
"""


COMPARES = _of_torch("equal allclose")
"""What has one answer of two tensors, which is every rank's where they are cut alike."""


OF_THE_WHOLE = PRODUCTS | _of_torch(_NAMES)
"""What means nothing of a piece."""


SPECIAL = (KEEPS | MOVES | TURNED | JOINS | NORMS | set(REDUCTIONS) | OF_THE_WHOLE | RANDOM | INITIALISERS) | {
    Tensor.__setitem__,
    torch._foreach_norm,
    torch._amp_foreach_non_finite_check_and_unscale_,
}
"""What is more than a call on what this rank holds."""


_IN_PLACE = {f"{n}_" for n in f"{_ELEMENT_BY_ELEMENT} {_CHANGES}".split()} | {
    *("zero_", "fill_", "copy_", "detach_", "requires_grad_", "share_memory_", "rename_", "constant_", "zeros_"),
    *("ones_", "set_", "_resize_output_"),
}
_VIEWED = {"as_subclass", "untyped_storage", "coalesce", "to_sparse", "sparse_mask", "_fw_grad", "_to_dtype"}


@functools.cache
def is_local(func: Any) -> bool:
    """Whether a call asks of each element alone: what changes one in place, and lists of tensors, one by one.

    >>> is_local(Tensor.mul_), is_local(torch._foreach_add), is_local(Tensor.index_add_), is_local(torch.flip)
    (True, True, False, False)
    """
    name = getattr(func, "__name__", "")
    if name.startswith(("_foreach_", "_fused_")):
        return name not in ("_foreach_norm", "_foreach_max")
    if name in ("__get__", "__set__", "__delete__"):
        return func not in TURNED
    return name in _IN_PLACE or name in _VIEWED or func in SPECIAL


_OPERATORS = "add sub mul truediv floordiv mod pow and or xor lshift rshift"
_AUGMENTED = {"__setitem__", *(f"__i{name}__" for name in _OPERATORS.split())}


def changes_in_place(func: Any) -> bool:
    """Whether a function's name says that it changes what it is given.

    >>> changes_in_place(Tensor.mul_), changes_in_place(Tensor.__imul__), changes_in_place(Tensor.__mul__)
    (True, True, False)
    """
    name = getattr(func, "__name__", "")
    return (name.endswith("_") and not name.endswith("__")) or name in _AUGMENTED
