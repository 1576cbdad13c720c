"""How forward is called: the nesting of its inputs, checked and flattened to tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from descompiler.errors import InputError


@dataclass(frozen=True)
class Signature:
    """How forward is called: the nesting of its inputs, and of its outputs."""

    inputs: pytree.TreeSpec
    outputs: pytree.TreeSpec
    statics: tuple[Any, ...]  # non-tensor leaves by position, `Ellipsis` where a tensor goes

    def flatten(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """Tensor leaves of a call, in the order of the graph's inputs.

        Raises
        ------
        InputError
            If the nesting differs from the example inputs', a non-tensor argument has another value, or the tensors
            disagree about the batch size (dim 0).
        """
        leaves, spec = pytree.tree_flatten((args, kwargs))
        if spec != self.inputs:
            raise InputError(
                f"forward was compiled for inputs nested as {self.inputs}, and was called with {spec}; "
                "call it as in example_inputs, or compile again"
            )
        tensors: list[Tensor] = []
        for i, (leaf, static) in enumerate(zip(leaves, self.statics, strict=True)):
            if static is Ellipsis:
                if not isinstance(leaf, Tensor):
                    raise InputError(f"input {i} must be a tensor, as in example_inputs; it is {type(leaf).__name__}")
                tensors.append(leaf)
            elif leaf != static:
                raise InputError(f"input {i} was {static!r} when the model was compiled and is {leaf!r}: compile again")
        sizes = [t.shape[0] if t.dim() else None for t in tensors]
        if len(set(sizes)) > 1:
            raise InputError(f"dim 0 of every input is the batch; the inputs' sizes there are {sizes}")
        return tensors


def normalise_inputs(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """``example_inputs`` as (args, kwargs): a tuple is positional, a dict of argument names is keyword."""
    if (
        isinstance(example_inputs, tuple)
        and len(example_inputs) == 2
        and (isinstance(example_inputs[0], tuple) and isinstance(example_inputs[1], dict))
    ):
        return example_inputs
    if isinstance(example_inputs, tuple | list):
        return tuple(example_inputs), {}
    return (example_inputs,), {}
