"""Transfers: what crosses between ranks, each kind with its collectives and their bytes.

A `descompiler.layout.layout.Layout` is a list of them. One transfer is what crosses together: values of one kind that
share a collective each way. A kind is a frozen class whose docstring begins as a rule's, ``kind: before --> after``:
which rank has what (`descompiler.layout.placement`), before it and then. Its collectives are constants of the class;
what makes them takes their names from there, and `descompiler.runtime.carriers` has it by kind.

A rank's bytes are counted for all ranks at once, as arrays ``[N]``: those that send alike are found by them.

Each value crosses in its own dtype. Where several of different ones share a message, it is one of bytes; a sum is made
once for each. A ``wire_dtype`` says which it is if it is another than the model's, the one that holds the numbers of
all parameters: a model of one dtype may be cast, and what crosses is cast with it. Where the user asks for it
(`descompiler.layout.layout.Layout.wire_dtype`) some kinds cross in a narrower one: `crosses_in`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from fractions import Fraction
from functools import cached_property
from typing import ClassVar, NamedTuple

import numpy as np
import sympy
import torch

from descompiler.cost_models.exchange import IDS_IN, OUTPUTS, VALUES_OUT_AND_BACK
from descompiler.cost_models.symbols import s
from descompiler.layout.traffic import Collective


@dataclass(frozen=True)
class Counts:
    """Unique ids of one table in a step, as one rank sees them: counted, or expected; or as every rank does, ``[N]``.

    Attributes
    ----------
    asked : float or ndarray
        Of this rank's, those that other ranks own.
    served : float or ndarray
        Of the other ranks', those that this one owns.
    shared : float or ndarray
        Of this rank's, those that every rank holds.
    asked_bytes, shared_bytes : float or ndarray
        Of those ids as they cross, each as its distance to the one before it.
    """

    asked: float | np.ndarray = 0
    served: float | np.ndarray = 0
    shared: float | np.ndarray = 0
    asked_bytes: float | np.ndarray = 0
    shared_bytes: float | np.ndarray = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Counts)))


def crosses_in(dtype: torch.dtype, narrow: torch.dtype | None) -> torch.dtype:
    """The dtype that values of ``dtype`` cross in, where wider ones are rounded to ``narrow`` (None: none are).

    >>> crosses_in(torch.float32, torch.bfloat16), crosses_in(torch.float16, torch.bfloat16)
    (torch.bfloat16, torch.float16)
    """
    if narrow is None or not dtype.is_floating_point or dtype.itemsize <= narrow.itemsize:
        return dtype
    return narrow


@dataclass(frozen=True, eq=False)
class Step:
    """A step, as far as its bytes depend on it.

    Attributes
    ----------
    rows : ndarray
        Of each rank, ``[N]``.
    itemsize : int
        Bytes of an element of the model's dtype.
    unique : mapping of str to Counts
        Unique ids, by table.
    narrow : torch.dtype or None
        What wider values are rounded to, of the kinds that may be.
    """

    rows: np.ndarray
    itemsize: int
    unique: Mapping[str, Counts]
    narrow: torch.dtype | None = None

    @cached_property
    def total(self) -> int:
        """Rows of the global batch."""
        return int(self.rows.sum())

    @cached_property
    def rest(self) -> np.ndarray:
        """Rows of the other ranks, ``[N]``."""
        return self.total - self.rows

    @property
    def others(self) -> int:
        """Ranks but one."""
        return len(self.rows) - 1

    def size_of(self, wire_dtype: torch.dtype | None) -> int:
        """Bytes of an element that crosses in a dtype; None: in the model's."""
        return self.itemsize if wire_dtype is None else wire_dtype.itemsize

    def narrow_size_of(self, wire_dtype: torch.dtype | None) -> int:
        """As `size_of`, of a kind that may cross in a narrower one."""
        return narrow_size(self.itemsize, wire_dtype, self.narrow)


def narrow_size(itemsize: int, wire_dtype: torch.dtype | None, narrow: torch.dtype | None) -> int:
    """Bytes of an element of ``wire_dtype`` (None: the model's, of ``itemsize`` bytes) that may be rounded.

    >>> narrow_size(4, None, torch.bfloat16), narrow_size(4, torch.int64, torch.bfloat16)
    (2, 8)
    """
    if wire_dtype is not None:
        return crosses_in(wire_dtype, narrow).itemsize
    return itemsize if narrow is None else min(itemsize, narrow.itemsize)


class Sent(NamedTuple):
    """Calls of one collective.

    Attributes
    ----------
    size_bytes : int, Fraction or ndarray
        As `descompiler.layout.traffic.Collective.sent_bytes` takes it: of every rank, or of each, ``[N]``.
    """

    collective: Collective
    size_bytes: int | Fraction | np.ndarray
    calls: int = 1


@dataclass(frozen=True)
class Crossed:
    """One value of a transfer, of which people are told by itself.

    Attributes
    ----------
    kind : {"ids", "values", "product"}
        Ids into the region; values out of it, whose gradients come back; rows to the owners of a table that they are
        multiplied with, and results back.
    value : str
        Its name in the program.
    width : int
        Ids, or elements, per row of the batch, over all ranks that receive, or send, them.
    ids : int
        Ids per row of the batch that a product sends, besides the elements.
    wire_dtype : torch.dtype or None
        Of its elements; None: the model's.
    """

    kind: str
    value: str
    width: int
    ids: int
    wire_dtype: torch.dtype | None

    @property
    def formula(self) -> sympy.Expr:
        """Bytes per rank and step, the mean over ranks."""
        formula = {"ids": IDS_IN, "values": VALUES_OUT_AND_BACK, "product": OUTPUTS}[self.kind]
        return formula if self.wire_dtype is None else formula.subs(s, self.wire_dtype.itemsize)

    @property
    def symbols(self) -> dict[str, int]:
        """The formula's symbols that are this value's own."""
        return {"ids": {"L": self.width}, "values": {"w": self.width}, "product": {"w": self.width, "L": self.ids}}[
            self.kind
        ]


class Transfer(ABC):
    """Values of one kind that cross together.

    Attributes
    ----------
    kind : str
        For people, and in docstrings.
    """

    kind: ClassVar[str]

    @abstractmethod
    def sent(self, step: Step) -> Iterator[Sent]:
        """What ranks send in a step with gradients, forward and backward."""

    def crossed(self) -> Iterator[Crossed]:
        """Its values that plans tell of one by one."""
        return iter(())
