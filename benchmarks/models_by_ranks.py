"""Every example model by number of ranks: where it aggregates, what a step sends, what other strategies would send.

    python benchmarks/models_by_ranks.py [--verify]     # prints Markdown

Bytes are exact, sent by the busiest rank in a training step of 1,024 rows a rank; tables have 100,000 rows and dim 16.
With ``--verify`` the largest relative error on real ranks (2 and 4, small tables) is measured too, which takes minutes.
"""

from __future__ import annotations

import argparse

import torch

import descompiler as des
from descompiler.captured import Captured
from descompiler.cost_models import baselines
from descompiler.report.render import to_markdown
from descompiler.sheet import Column, Sheet
from examples.models import MODELS, make_inputs

RANKS = (1, 2, 4, 8)
ROWS = 1024
STRATEGIES = (baselines.DDP_DENSE, baselines.DDP_SPARSE, baselines.TABLE_WISE)
SIZES = {"dim": 16, "hidden": (64, 32)}
VOCABULARY = 100_000


def sizes_of(name: str) -> dict[str, object]:
    """Options of a model of a realistic size."""
    if name == "two_tower":
        return {**SIZES, "user_vocab_sizes": [VOCABULARY] * 4, "item_vocab_sizes": [VOCABULARY] * 4}
    if name == "neumf":
        return {**SIZES, "n_users": VOCABULARY, "n_items": VOCABULARY}
    return {**SIZES, "vocab_sizes": [VOCABULARY] * 26, "n_dense": 13}


def inputs_of(name: str) -> tuple[torch.Tensor, ...]:
    if name == "two_tower":
        return torch.zeros(4, 4, dtype=torch.int64), torch.zeros(4, 4, dtype=torch.int64)
    if name == "neumf":
        return torch.zeros(4, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)
    return torch.zeros(4, 13), torch.zeros(4, 26, dtype=torch.int64)


def aggregation(plan: des.Plan) -> str:
    """The forms of the tables, and the operators whose results cross."""
    forms: dict[str, int] = {}
    for split in plan.splits.values():
        forms[split.form] = forms.get(split.form, 0) + 1
    points: dict[str, int] = {}
    for c in plan.crossings:
        if c.kind == "values":
            text = f"{c.name.removeprefix('aten.')} {c.placement.split('(')[0]}"
            points[text] = points.get(text, 0) + 1
    tables = ", ".join(f"{n} {form}" for form, n in forms.items())
    return tables + (": " + ", ".join(f"{n} x {text}" for text, n in points.items()) if points else "")


def worst_error(name: str, ranks: int) -> float:
    torch.manual_seed(0)
    report = des.verify(MODELS[name]("fields"), make_inputs(name, "fields", 8), ranks=ranks)
    return max(report.worst.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--verify", action="store_true", help="also measure the largest relative error on real ranks")
    verify = parser.parse_args().verify
    columns = [
        Column("model"),
        Column("ranks", "count"),
        Column("tables and aggregation points"),
        Column("plan", "bytes"),
    ]
    columns += [Column(x.name, "bytes") for x in STRATEGIES] + [Column("worst error")] * verify
    rows = []
    for name in MODELS:
        with torch.device("meta"):
            model = MODELS[name]("fields", **sizes_of(name))
        captured = Captured.of(model, inputs_of(name))
        for ranks in RANKS:
            plan = captured.plan(ranks=ranks, batch=ROWS)
            others = {x.name: x.busiest_bytes for x in plan.priced()}
            row = [name, ranks, aggregation(plan), plan.price_bytes, *(others[x.name] for x in STRATEGIES)]
            if verify:
                row.append(f"{worst_error(name, ranks):.1e}" if ranks in (2, 4) else None)
            rows.append(tuple(row))
    print(
        to_markdown(
            Sheet(f"bytes that the busiest rank sends in a step, {ROWS} rows a rank", tuple(columns), tuple(rows))
        )
    )


if __name__ == "__main__":
    main()
