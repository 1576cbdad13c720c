"""What every strategy sends, and the plan that is chosen, against the number of ranks, as Markdown.

    python benchmarks/strategies.py > docs/strategies.md

DeepFM, FM, DLRM and Wide&Deep with 26 fields of 1,000,000 rows in all, dim 16, first layer 400 wide, 4,096 rows a rank,
ids by Zipf(1.05), float32. Nothing is measured: bytes are those of the formulas in `descompiler.cost_models.baselines`,
the mean over ranks, and of the plan's own layout, for the busiest rank and with its control messages (row counts,
agreement), which the formulas do not have.
"""

from __future__ import annotations

import torch

from descompiler.captured import Captured
from descompiler.examples import MODELS

RANKS = (2, 4, 8, 16, 32, 64)
NAMES = {"deepfm": "DeepFM", "fm": "FM", "dlrm": "DLRM", "wide_deep": "Wide&Deep"}
FIELDS, ROWS, DIM, BATCH = 26, 1_000_000, 16, 4096


def table_of(name: str) -> list[str]:
    """The lines of one model's table."""
    sizes = [ROWS // FIELDS + (i < ROWS % FIELDS) for i in range(FIELDS)]
    with torch.device("meta"):
        model = MODELS[name]("fields", vocab_sizes=sizes, dim=DIM, n_dense=13, hidden=(400, 400))
    captured = Captured.of(model, (torch.randn(4, 13), torch.zeros(4, FIELDS, dtype=torch.int64)))
    plans = [captured.plan(ranks=n, batch=BATCH) for n in RANKS]
    rows: dict[str, list[float]] = {}
    for plan in plans:
        for x in plan.priced():
            rows.setdefault(x.name, []).append(x.sent_bytes)
    best = [min(column) for column in zip(*rows.values(), strict=True)]
    lines = [f"## {NAMES[name]}", "", "| MB sent per rank and step | " + " | ".join(f"{n} ranks" for n in RANKS) + " |"]
    lines.append("|---|" + "--:|" * len(RANKS))
    for strategy, sent in rows.items():
        lines.append(f"| {strategy} | " + " | ".join(f"{x / 1e6:,.2f}" for x in sent) + " |")
    for form in ("replicate", "sparse_all_gather", "table_wise", "row_wise", "column_wise", "unique_rows"):
        sent = [captured.plan(ranks=n, batch=BATCH, pins={"*": form}).price_bytes for n in RANKS]
        lines.append(f"| all tables {form}, busiest rank | " + " | ".join(f"{x / 1e6:,.2f}" for x in sent) + " |")
    chosen = [p.price_bytes for p in plans]
    lines.append("| **chosen, busiest rank** | " + " | ".join(f"**{x / 1e6:,.2f}**" for x in chosen) + " |")
    lines.append(
        "| chosen, of the best strategy of the field | "
        + " | ".join(f"{a / b:.2%}" for a, b in zip(chosen, best, strict=True))
        + " |"
    )
    lines.append("| at most above the best plan | " + " | ".join(f"{p.gap:.1%}" for p in plans) + " |")
    forms = [", ".join(f"{list(p.forms.values()).count(f)} {f}" for f in sorted(set(p.forms.values()))) for p in plans]
    lines.append("| forms chosen | " + " | ".join(forms) + " |")
    return [*lines, ""]


def main() -> None:
    lines = ["# Strategies and the chosen plan", ""]
    lines.append("Written by `python benchmarks/strategies.py`; do not edit.")
    lines += ["", *(__doc__ or "").strip().split("\n\n", 2)[2].splitlines(), ""]
    for name in NAMES:
        lines += table_of(name)
    print("\n".join(lines).rstrip())


if __name__ == "__main__":
    main()
