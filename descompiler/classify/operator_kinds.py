"""Kinds of ATen operators, by what they do to the rows of a batch."""

from __future__ import annotations

from typing import Any

from descompiler.graph.arguments import LOOKUP_OPERATORS
from descompiler.graph.nodes import aten
from descompiler.ops.vocabulary import vocabulary

HEAVY = LOOKUP_OPERATORS | {
    aten.linear.default,
    aten.matmul.default,
    aten.mm.default,
    aten.bmm.default,
    aten.addmm.default,
    aten.gru.input,
    aten.lstm.input,
    aten.scaled_dot_product_attention.default,
    vocabulary,
}
"""Operators worth computing for own rows only, also where every rank has the global batch's operands."""


SUM_OPERATORS = frozenset({aten.sum.default, aten.sum.dim_IntList, aten.mean.default, aten.mean.dim})


DROPPING = frozenset(
    {
        aten.dropout.default,
        aten.feature_dropout.default,
        aten.alpha_dropout.default,
        aten.feature_alpha_dropout.default,
        aten.gru.input,
        aten.lstm.input,
        aten.scaled_dot_product_attention.default,
    }
)
"""Random operators that only drop: judged as if they dropped nothing, by the numbers."""


DRAWN_BY_ROW = frozenset(
    {
        aten.bernoulli.default,
        aten.bernoulli.p,
        aten.rand_like.default,
        aten.randn_like.default,
        aten.randint_like.default,
        aten.randint_like.low_dtype,
        aten.rrelu.default,
        aten.multinomial.default,
        aten.rand.default,
        aten.randn.default,
        aten.randint.default,
        aten.randint.low,
    }
)
"""Random operators that draw independently for each row of their operand, or of their shape."""


SEARCHED: dict[Any, str] = {
    aten.isin.Tensor_Tensor: "test_elements",
    aten.isin.Scalar_Tensor: "test_elements",
    aten.searchsorted.Tensor: "sorted_sequence",
    aten.searchsorted.Scalar: "sorted_sequence",
    aten.bucketize.Tensor: "boundaries",
    aten.bucketize.Scalar: "boundaries",
}
"""Operators that look for each element in all of an operand. Numbers of a few rows don't show it: few are found."""


SHAPE_ONLY = frozenset({aten.expand_as.default, aten.view_as.default, aten.reshape_as.default, aten.type_as.default})
"""Operators that take the shape or dtype of their second argument, and send it no gradient."""
