"""Views of calls whose arguments several modules read: lookups, batch norms, products with a table, by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from descompiler.dynamic.stand_in import DynamicIds
from descompiler.graph.nodes import aten, signature, value
from descompiler.ops.local import bag, widest
from descompiler.ops.vocabulary import Request, vocabulary

LOOKUP_OPERATORS = frozenset({aten.embedding.default, bag})
"""Operators that take rows of a table by ids."""


def operand(node: fx.Node, i: int = 0) -> fx.Node:
    """The node that is a call's positional argument."""
    x = node.args[i]
    assert isinstance(x, fx.Node), f"argument {i} of {node.format_node()} is {x!r}"
    return x


def optional_operand(node: fx.Node, i: int) -> fx.Node | None:
    """As `operand`, of an argument that may be None, or left out."""
    return operand(node, i) if i < len(node.args) and node.args[i] is not None else None


@dataclass(frozen=True)
class LookupCall:
    """``embedding(weight, ids, ...)``, or ``bag(weight, ids, mode, ...)``: rows of a table, which a bag pools."""

    node: fx.Node

    @classmethod
    def of(cls, node: fx.Node) -> LookupCall | None:
        """The view of a node; None if it is another call."""
        return cls(node) if node.target in LOOKUP_OPERATORS else None

    @property
    def weight(self) -> fx.Node:
        return operand(self.node, 0)

    @property
    def ids(self) -> fx.Node:
        return operand(self.node, 1)

    @property
    def dynamic(self) -> DynamicIds | None:
        """How ids are looked up in a dynamic table; they are the operand of `ids` then. None: in a static one."""
        if self.ids.target is not torch.ops.descompiler.stand_in_rows.default:
            return None
        _, salt, slices, rows, padding_idx, create = signature(self.ids).values()
        return DynamicIds(salt, slices, rows, padding_idx, create)

    @property
    def mode(self) -> str | None:
        """How a bag pools its rows; None for rows as they are."""
        return str(self._arguments["mode"]) if self.node.target is bag else None

    @property
    def padding_idx(self) -> int:
        """The row that gets no gradient; -1 for none."""
        found = self._arguments["padding_idx"]
        return -1 if found is None else int(found)

    @property
    def sparse(self) -> bool:
        return bool(self._arguments["sparse"])

    def let_sparse(self, sparse: bool) -> None:
        """Let the table's gradient be sparse, or dense."""
        place = 4  # of both operators' arguments
        if len(self.node.args) > place:
            self.node.args = (*self.node.args[:place], sparse, *self.node.args[place + 1 :])
        else:
            self.node.kwargs = {**self.node.kwargs, "sparse": sparse}

    @property
    def counts_frequency(self) -> bool:
        """Whether gradients are divided by how often an id is in the batch."""
        return bool(self._arguments["scale_grad_by_freq"])

    @property
    def _arguments(self) -> dict[str, Any]:
        if self.node.target is not bag:
            return signature(self.node)
        names = ("weight", "ids", "mode", "padding_idx", "sparse")
        given = dict(zip(names, self.node.args, strict=False)) | self.node.kwargs
        return {"padding_idx": None, "sparse": False, "scale_grad_by_freq": False} | given


@dataclass(frozen=True)
class BatchNormCall:
    """``batch_norm(x, weight, bias, running_mean, running_var, training, momentum, eps, ...)``."""

    node: fx.Node

    @classmethod
    def of(cls, node: fx.Node) -> BatchNormCall | None:
        """The view of a node; None if it is another call."""
        return cls(node) if node.target is aten.batch_norm.default else None

    @property
    def x(self) -> fx.Node:
        return operand(self.node, 0)

    @property
    def affine(self) -> tuple[fx.Node | None, fx.Node | None]:
        """Weight and bias."""
        return optional_operand(self.node, 1), optional_operand(self.node, 2)

    @property
    def statistics(self) -> tuple[fx.Node | None, fx.Node | None]:
        """Running mean and variance."""
        return optional_operand(self.node, 3), optional_operand(self.node, 4)

    @property
    def training(self) -> bool:
        """Whether it normalises with statistics of its batch, which move the running ones."""
        return bool(self.node.args[5])

    @property
    def dtype(self) -> torch.dtype:
        """Of the statistics of its batch: one that holds the numbers of all its operands."""
        return widest(value(n) for n in (self.x, *self.affine, *self.statistics) if n is not None)

    @property
    def options(self) -> tuple[Any, Any]:
        """Momentum and epsilon."""
        momentum, eps = self.node.args[6:8]
        return momentum, eps


def training_norm(node: fx.Node) -> BatchNormCall | None:
    """The view of a batch norm that normalises with statistics of its batch; None for any other node."""
    norm = BatchNormCall.of(node)
    return norm if norm is not None and norm.training else None


@dataclass(frozen=True)
class VocabularyCall:
    """``vocabulary(x, weight, bias, first, size, requests)``: what is asked of products with rows of a table."""

    node: fx.Node

    @classmethod
    def of(cls, node: fx.Node) -> VocabularyCall | None:
        """The view of a node; None if it is another call."""
        return cls(node) if node.target is vocabulary else None

    @property
    def x(self) -> fx.Node:
        return operand(self.node, 0)

    @property
    def weight(self) -> fx.Node:
        return operand(self.node, 1)

    @property
    def bias(self) -> fx.Node | None:
        return optional_operand(self.node, 2)

    @property
    def first(self) -> int:
        """The first row of the table that takes part."""
        return self._rows[0]

    @property
    def size(self) -> int:
        """How many rows do."""
        return self._rows[1]

    @property
    def requests(self) -> Sequence[Request]:
        found: Any = self.node.args[5]
        return tuple(found)

    @property
    def _rows(self) -> tuple[int, int]:
        first, size = self.node.args[3:5]
        assert isinstance(first, int) and isinstance(size, int)
        return first, size
