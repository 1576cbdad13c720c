"""What optimisers are called in texts."""

from __future__ import annotations

from torch.optim import Optimizer


def called(kind: type[Optimizer]) -> str:
    """A class of optimisers, as users write it.

    >>> from descompiler.optim import FTRL
    >>> called(FTRL), called(__import__("torch").optim.SGD)
    ('des.optim.FTRL', 'torch.optim.SGD')
    """
    return f"{'torch' if kind.__module__.startswith('torch.') else 'des'}.optim.{kind.__name__}"
