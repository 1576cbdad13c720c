"""Write docs/benchmarks.md from what `benchmarks/steps.py` stored: ratios first, then times and bytes with bars.

python benchmarks/page.py           of benchmarks/results; --results and --to name other places
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import goals
from benchmarks.contestants.compiled import AHEAD, BY_BYTES, BY_CLUSTER, CHOSEN, FORCED, FUSED, PURE, ROWS_AHEAD
from benchmarks.goals import is_other, seconds
from benchmarks.ranks import LINKS, LOOPBACK
from benchmarks.steps import RTOL
from benchmarks.workloads import WORKLOADS

ROOT = Path(__file__).resolve().parent.parent
SECTIONS = [ROOT / "benchmarks" / "results" / name for name in ("where.md", "gpu.md")]
"""What `benchmarks/where.py` wrote, and `benchmarks/gpu.py` printed on a machine that had a GPU."""
WHY = ROOT / "benchmarks" / "results" / "why.md"
"""What was found of goals that are not met: written by hand, of the runs that are stored."""
BAR = 40
MANY = 1_000_000
"""Rows, where a workload is asked for its name alone."""
HEAD = """# Steps, side by side

Written by `python benchmarks/page.py` from `benchmarks/results/` (`make bench`); do not edit.

A training step (forward, backward, Adagrad) of descompiler's compiled module, and of every other way to train the same
model on the same batches from the same weights: the forms that a plan chooses from, each forced on every table that can
take it; DistributedDataParallel; TorchRec{release}; and what an expert writes by hand with FBGEMM: unique rows pulled
from their owners (dedup pull), and whole tables on ranks that send partial sums (field partials).

- One process with one thread a rank, in a network namespace of its own behind a link of the given rate, under gloo.
  With more ranks than cores, computation takes as many times longer, for all contestants alike.
- All contestants of a run are built in the same processes and take turns. Times are medians of so many rounds, with the
  least and the most; a round takes as long as on its slowest rank. Losses are compared after the same steps: a
  contestant whose losses differ by more than {rtol:g} is void, and has no numbers.
- A batch is each rank's rows. Ids have Zipf's distribution, exponent 1.05, popular ones lie anywhere in a table.
- `by bytes` is the plan with `cluster="bytes"`, `by cluster` with `cluster=des.calibrate()` on these links. With
  a `fused optimiser` tables are updated in backward (`des.fuse_optimizer`), as TorchRec's and those by hand are;
  `prefetched`: ids of the next batch travel during this one's step (`des.prefetch`); `rows prefetched`: rows, too.
  The model has a table a field, as users write it; DDP has one table of all fields, but where it says otherwise.
- **Ratios** are the other's time through the compiled module's: above 1, the compiled module is faster. **Regret** is
  the chosen plan's time through that of the fastest form: below 1, the plan is faster than every single form.
"""


def load(folder: Path) -> list[dict[str, Any]]:
    """All runs, in the order of workloads, then by size and link as stored."""
    order = list(WORKLOADS)
    runs = [run for file in sorted(folder.glob("*.json")) for run in json.loads(file.read_text()).values()]
    links = [*LINKS, LOOPBACK]

    def place(run: Mapping[str, Any]) -> tuple[Any, ...]:
        sizes = (run["rows"], run["ranks"], run["batch"], run["gradients"] == "dense")
        return order.index(run["workload"]), *sizes, links.index(run["link"])

    return sorted(runs, key=place)


def case(run: Mapping[str, Any]) -> str:
    """The cells that say which run it is."""
    return "{rows:,} | {ranks} | {batch:,} | {gradients} | {link}".format(**run)


GOALS_HEAD = "goal | limit | met in runs | median | worst | where"
CASE = "rows | ranks | batch | gradients | link"


def markdown(head: str, rows: Sequence[str]) -> str:
    """A table."""
    return "\n".join([f"| {head} |", "|" + "---|" * (head.count("|") + 1), *(f"| {row} |" for row in rows)])


def others(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Contestants that are no plans, in the order of the first run that has them."""
    names = [n for run in runs for n in (*run["contestants"], *run["refused"])]
    return [n for n in dict.fromkeys(names) if is_other(n)]


def ratios(runs: Sequence[Mapping[str, Any]]) -> str:
    """The other's time through the compiled module's."""
    columns, rows = others(runs), []
    for run in runs:
        of = seconds(run)
        for chosen in CHOSEN:
            if chosen in of:
                cells = [f"{of[name] / of[chosen]:.2f}" if name in of else "" for name in columns]
                rows.append(" | ".join([case(run), chosen, f"{of[chosen] * 1e3:.1f}", *cells]))
    return markdown(" | ".join([CASE, "plan", "ms", *columns]), rows)


def regrets(runs: Sequence[Mapping[str, Any]]) -> str:
    """Chosen plans against the fastest form."""
    rows = []
    for run in runs:
        of = seconds(run)
        if forms := {name: t for name, t in of.items() if name.startswith(FORCED)}:
            fastest = min(forms, key=lambda name: forms[name])
            cells = [case(run), fastest.removeprefix(FORCED), f"{forms[fastest] * 1e3:.1f}"]
            for chosen in (BY_BYTES, BY_CLUSTER):
                plan = run["contestants"].get(chosen, {}).get("plan", "")
                cells += [f"{of[chosen] / forms[fastest]:.2f}" if chosen in of else "", plan]
            rows.append(" | ".join(cells))
    if not rows:
        return ""
    return markdown(f"{CASE} | fastest form | ms | regret by bytes | plan | regret by cluster | plan", rows)


def summary(runs: Sequence[Mapping[str, Any]]) -> str:
    """Geometric means over all runs of a workload."""
    columns, rows = others(runs), []
    for name, factory in WORKLOADS.items():
        of = [seconds(run) for run in runs if run["workload"] == name]
        for chosen in CHOSEN:
            mine = [times for times in of if chosen in times]
            if mine:
                forms = [min((t for n, t in times.items() if n.startswith(FORCED)), default=None) for times in mine]
                unfused = not chosen.endswith((FUSED, PURE, AHEAD, ROWS_AHEAD))  # as forms are
                regret = [times[chosen] / t for times, t in zip(mine, forms, strict=True) if t and unfused]
                cells = [mean([times[n] / times[chosen] for times in mine if n in times]) for n in columns]
                worst = f"{max(regret):.2f}" if regret else ""
                title = f"{factory(MANY).name} | {chosen} | {len(mine)}"
                rows.append(" | ".join([title, *cells, mean(regret), worst]))
    return markdown(" | ".join(["model | plan | runs", *columns, "regret | worst regret"]), rows)


def mean(ratios: Sequence[float]) -> str:
    """Their geometric mean."""
    return f"{math.exp(statistics.fmean(map(math.log, ratios))):.2f}" if ratios else ""


def bars(run: Mapping[str, Any]) -> str:
    """Times of one run, the fastest first, with bars."""
    of, lines = seconds(run), []
    most = max(of.values(), default=1.0)
    for name in sorted(of, key=lambda n: of[n]):
        x = run["contestants"][name]
        sent = f"{x['wire_bytes'] / 1e6:9.3f} MB" if "wire_bytes" in x else ""
        own = f"{x['traffic'] / 1e6:9.3f} MB" if "traffic" in x else " " * 12
        spread = f"({x['least_s'] * 1e3:.1f} to {x['most_s'] * 1e3:.1f}, {x['rounds']} rounds)"
        bar = "█" * max(1, round(BAR * of[name] / most))
        lines.append(f"{name:<27}{of[name] * 1e3:9.1f} ms {spread:<32}{sent} {own}  {bar}")
    missing = [f"{name}: {why}" for name, why in sorted({**run["refused"], **run["void"]}.items())]
    facts = (
        f"{run['machine']['cores']} cores, {run['machine']['memory_gib']} GiB, {run['date']}, commit {run['commit']}"
    )
    title = "{rows:,} rows, {ranks} ranks, batch {batch:,}, {gradients} gradients, {link}".format(**run)
    head = f"{'':<27}{'step':>9}    {'least to most':<32}{'on the wire':>12} {'counted':>12}"
    text = "\n".join(line.rstrip() for line in [facts, "", head, *lines, *(["", *missing] if missing else [])])
    return f"<details><summary>{title}</summary>\n\n```\n{text}\n```\n\n</details>"


def page(runs: Sequence[Mapping[str, Any]]) -> str:
    """docs/benchmarks.md."""
    releases = {of["release"] for run in runs for of in run["contestants"].values() if "release" in of}
    parts = [HEAD.format(release=" " + ", ".join(sorted(releases)) if releases else "", rtol=RTOL)]
    parts += [file.read_text() for file in SECTIONS if file.exists()]
    parts += ["## Goals\n", markdown(GOALS_HEAD, goals.rows(runs)), ""]
    by_workload = markdown(" | ".join(["model", *LINKS]), goals.by_workload(runs))
    parts += ["The step by cluster with FBGEMM through the best of all others, geometric means:\n", by_workload, ""]
    parts += [WHY.read_text()] if WHY.exists() else []
    parts += ["## Ratios and regret, geometric means over all runs\n", summary(runs), ""]
    for name, factory in WORKLOADS.items():
        if of := [run for run in runs if run["workload"] == name]:
            parts += [f"## {factory(MANY).name}\n", factory.__doc__ or "", ""]
            parts += [ratios(of), "", regrets(of), "", *(bars(run) for run in of), ""]
    return "\n".join(parts).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--to", type=Path, default=ROOT / "docs" / "benchmarks.md")
    options = parser.parse_args()
    options.to.write_text(page(load(options.results)))


if __name__ == "__main__":
    main()
