"""Measuring ids of a model captured in part: what the user's forward looks up in batches of samples."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from torch import nn

from descompiler.eager.outline import outline_of
from descompiler.eager.recorder import Runs, in_float64
from descompiler.eager.survey import Survey
from descompiler.errors import InputError
from descompiler.layout.statistics import Statistics
from descompiler.model.inputs import flatten, normalise_inputs, split_statics
from descompiler.model.probe import CALL, method_of
from descompiler.tables.measure import statistics_of


def measure_in_part(
    template: nn.Module, seen: Survey, samples: Iterable[Any], ranks: int, method: str = CALL
) -> Statistics:
    """Statistics of the ids of sample batches, each one rank's.

    Where rows are coupled a rank looks up those of all ranks: a sample is the batch of all.

    Raises
    ------
    InputError
        If there is no sample, or the model can't run one.
    """
    operators = outline_of(template, seen, ranks).operators
    gathered: dict[str, list[tuple[int, np.ndarray, int]]] = {o.name: [] for o in operators}
    batches = rows = 0
    run: Runs | None = None
    for x in samples:
        inputs = in_float64(normalise_inputs(x, method_of(template, method)))
        try:
            run = run or Runs(template, inputs, method)
            outputs, recorder = run(inputs)
        except Exception as error:  # whatever the user's forward raises
            cause = error.__cause__ or error
            raise InputError(f"the model can't run sample {batches} ({type(cause).__name__}: {cause})") from error
        sizes = {t.shape[0] if t.dim() else None for t in split_statics(flatten(inputs)[0])[0]}
        size = sizes.pop() if len(sizes) == 1 else next((o.shape[0] for o in outputs if o.dim()), None)
        size = (size or 1) // ranks if seen.coupled else size or 1
        batches, rows = batches + 1, rows + size
        for o in operators:
            parts = [ids.reshape(-1).cpu().numpy() for ids in recorder.ids.get(o.name, [])]
            drawn = np.concatenate([np.zeros(0, np.int64), *parts])
            gathered[o.name].append((size, np.where(drawn < 0, drawn + o.rows, drawn), 0))
    looked_up = {n: seen_in for n, seen_in in gathered.items() if any(len(drawn) for _, drawn, _ in seen_in)}
    return statistics_of(operators, looked_up, batches, rows)
