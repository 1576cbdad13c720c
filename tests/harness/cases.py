"""Cases of tests: those that always run, and those that only `make test-all` runs."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def cases(values: Iterable[Any], always: Collection[Any]) -> list[Any]:
    """Parameters for ``pytest.mark.parametrize``, a tuple for each set of them; what is not in ``always`` is slow."""
    return [
        pytest.param(*(v if isinstance(v, tuple) else (v,)), marks=() if v in always else pytest.mark.slow)
        for v in values
    ]
