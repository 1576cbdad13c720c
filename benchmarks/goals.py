"""What the compiled module is to reach, and whether it does: a table of all stored runs, for docs/benchmarks.md."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.contestants.compiled import BY_BYTES, BY_CLUSTER, FORCED, FUSED, PURE
from benchmarks.ranks import LINKS

Run = Mapping[str, Any]
TORCHREC, EAGER = "TorchRec", "eager"
FM_AND_LR = ("fm", "lr")


def seconds(run: Run) -> dict[str, float]:
    """Medians of the contestants that are not void."""
    return {name: of["median_s"] for name, of in run["contestants"].items() if name not in run["void"]}


def is_other(name: str) -> bool:
    """Whether a contestant is no plan of ours."""
    return not name.startswith((BY_BYTES, BY_CLUSTER, FORCED))


@dataclass(frozen=True)
class Goal:
    """A ratio that is to be at most a limit, or at least, in each run that it is about.

    Attributes
    ----------
    of : callable
        From a run and all runs; None where the run says nothing of it.
    """

    text: str
    limit: float
    of: Callable[[Run, Sequence[Run]], float | None]
    at_least: bool = False

    def is_met(self, value: float) -> bool:
        return value >= self.limit if self.at_least else value <= self.limit


def _wire(run: Run, _: Sequence[Run]) -> float | None:
    sent = {n: x["wire_bytes"] for n, x in run["contestants"].items() if x.get("wire_bytes") and n not in run["void"]}
    others = [b for n, b in sent.items() if is_other(n)]
    return sent[BY_BYTES] / min(others) if others and BY_BYTES in sent else None


def _against(chosen: str, part: str = "", link: str = "", workloads: Sequence[str] = ()) -> Any:
    """A chosen plan's time through the best of the others', of whose names ``part`` is a part."""

    def of(run: Run, _: Sequence[Run]) -> float | None:
        if run["ranks"] == 1 or (link and run["link"] != link) or (workloads and run["workload"] not in workloads):
            return None
        times = seconds(run)
        others = [t for n, t in times.items() if is_other(n) and part in n]
        return times[chosen] / min(others) if others and chosen in times else None

    return of


def _regret(run: Run, _: Sequence[Run]) -> float | None:
    times = seconds(run)
    forms = [t for n, t in times.items() if n.startswith(FORCED)]
    return times[BY_CLUSTER] / min(forms) if forms and BY_CLUSTER in times and run["ranks"] > 1 else None


def _overlap(run: Run, runs: Sequence[Run]) -> float | None:
    """Time through what computation alone, or bytes at the line's rate, would take."""
    chosen, rate = f"{BY_CLUSTER}{FUSED}", LINKS.get(run["link"])
    fast = next((r for r in runs if r["link"] == "unshaped" and same_case(r, run)), None)
    if rate not in (100, 1000) or fast is None or chosen not in seconds(run) or chosen not in seconds(fast):
        return None
    on_wire = run["contestants"][chosen]["wire_bytes"] * 8 / (rate * 1e6)
    return seconds(run)[chosen] / max(seconds(fast)[chosen], on_wire)


def same_case(a: Run, b: Run) -> bool:
    """Whether runs are alike but for their links."""
    return all(a[k] == b[k] for k in ("workload", "rows", "batch", "ranks", "gradients"))


def _one_rank(chosen: str, workload: str) -> Any:
    def of(run: Run, _: Sequence[Run]) -> float | None:
        times = seconds(run)
        ours = run["ranks"] == 1 and run["workload"] == workload and run["gradients"] == "sparse"
        return times[EAGER] / times[chosen] if ours and {EAGER, chosen} <= times.keys() else None

    return of


def _errors(run: Run) -> list[float]:
    """Of each forced plan, measured through predicted seconds."""
    times = seconds(run)
    predicted = run.get("predicted_s", {}) if run["ranks"] > 1 else {}
    return [times[n] / p for n, p in predicted.items() if n in times and p > 0]


def _predicted(run: Run, _: Sequence[Run]) -> float | None:
    """The largest distance between a predicted and a measured time, as a factor."""
    errors = _errors(run)
    return max(max(e, 1 / e) for e in errors) if errors else None


def _order(run: Run, _: Sequence[Run]) -> float | None:
    """Spearman's correlation of predicted and measured times."""
    times, predicted = seconds(run), run.get("predicted_s", {})
    both = [n for n in predicted if n in times]
    if len(both) < 3 or run["ranks"] == 1:
        return None
    return statistics.correlation(_ranks([predicted[n] for n in both]), _ranks([times[n] for n in both]))


def _ranks(values: Sequence[float]) -> list[float]:
    """The place of each among all, the mean of places where they are equal."""
    ordered = sorted(values)
    return [ordered.index(x) + (ordered.count(x) - 1) / 2 for x in values]


GOALS = (
    Goal("bytes on the wire: the plan by bytes, through the least of all others", 1.0, _wire),
    Goal("step: by cluster with FBGEMM, through the best of all others", 1.0, _against(f"{BY_CLUSTER}{FUSED}")),
    Goal("step: by cluster with PyTorch alone, through the best of all others", 1.0, _against(f"{BY_CLUSTER}{PURE}")),
    *(
        Goal(
            f"step of FM and LR, {link}: by cluster with FBGEMM, through TorchRec's",
            limit,
            _against(f"{BY_CLUSTER}{FUSED}", TORCHREC, link, FM_AND_LR),
        )
        for link, limit in (("unshaped", 0.85), ("1 Gbit/s", 0.7), ("100 Mbit/s", 0.45))
    ),
    Goal("regret: by cluster, through the fastest forced form", 1.05, _regret),
    Goal("step through max(computation alone, bytes at line rate), 100 Mbit/s and 1 Gbit/s", 1.25, _overlap),
    Goal("one rank, FM: eager through compiled", 1.5, _one_rank(BY_BYTES, "fm"), at_least=True),
    Goal("one rank, FM: eager through fused", 2.1, _one_rank(f"{BY_BYTES}{FUSED}", "fm"), at_least=True),
    Goal("one rank, DeepFM: eager through fused", 1.1, _one_rank(f"{BY_BYTES}{FUSED}", "deepfm"), at_least=True),
    Goal("measured through predicted step, or the inverse, the worst forced form of a run", 1.15, _predicted),
    Goal("rank correlation of predicted and measured steps of forced forms", 0.95, _order, at_least=True),
)
"""Those of docs/benchmarks.md, in its order."""


def rows(runs: Sequence[Run]) -> list[str]:
    """The cells of each goal: its limit, how many runs it is met in, the median, and the worst run."""
    result = []
    for goal in GOALS:
        values = [(v, run) for run in runs if (v := goal.of(run, runs)) is not None]
        limit = f"{'≥' if goal.at_least else '≤'} {goal.limit:.2f}"
        if not values:
            result.append(f"{goal.text} | {limit} | no run | | |")
            continue
        met = sum(goal.is_met(v) for v, _ in values)
        worst, run = (min if goal.at_least else max)(values, key=lambda found: found[0])
        where = "{workload}, {rows:,} rows, {ranks} ranks, batch {batch:,}, {link}".format(**run)
        middle = statistics.median(v for v, _ in values)
        result.append(f"{goal.text} | {limit} | {met} of {len(values)} | {middle:.2f} | {worst:.2f} | {where}")
    return result


def by_workload(runs: Sequence[Run]) -> list[str]:
    """Geometric means of the step against the best of the others, by workload and link."""
    result = []
    of = _against(f"{BY_CLUSTER}{FUSED}")
    for workload in dict.fromkeys(run["workload"] for run in runs):
        cells = []
        for link in LINKS:
            found = [of(r, runs) for r in runs if r["workload"] == workload and r["link"] == link]
            values = [math.log(v) for v in found if v is not None]
            cells.append(f"{math.exp(statistics.fmean(values)):.2f}" if values else "")
        result.append(f"{workload} | " + " | ".join(cells))
    return result
