"""Optimisers that torch has not, as ordinary `torch.optim.Optimizer`: of dense parameters, rows and dynamic tables.

`ftrl` has `FTRL`, and its update of rows, which steps in backward share; `kinds` what classes are called.

May import: errors, ops.
"""

from descompiler.optim.ftrl import FTRL

__all__ = ["FTRL"]
