"""The sweep over the zoo: ``make zoo``, or ``python -m tests.harness.sweep [NAME ...]``.

Every model of `tests.harness.zoo`, on 2 ranks in float64: captured how, split how, aggregated where, bytes against data
parallel, and whether it trains as the original (`des.verify`, the compiler's own choice and every form forced). Writes
``docs/zoo.md``, and exits with status 1 if a model that the file lists as verified is not any more.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import descompiler as des
from descompiler.builder import Builder
from descompiler.check.compare import ORIGINAL_FAILS
from descompiler.check.judge import DIVERGED, DRAWS_DIFFER
from descompiler.errors import CaptureError, DescompilerError, EquivalenceError
from descompiler.graph.nodes import target_name
from descompiler.model.probe import blueprint
from descompiler.passes import FORMS as ALL_FORMS
from descompiler.passes import RULES
from descompiler.planning.objective import assign
from descompiler.planning.plan import Plan
from descompiler.region.place import place
from descompiler.tables.form import find_tables
from tests.harness.pool import RankPool, RankPoolError, here
from tests.harness.zoo import ZOO

FILE = Path(__file__).resolve().parents[2] / "docs" / "zoo.md"
RANKS = 2
TIMEOUT_S = 240.0
LARGE_ROWS = 100_000
BATCH = 1024
COLUMNS = (
    *("model", "result", "worst error", "captured by", "tables", "splits", "aggregation"),
    *("bytes", "data parallel", "sparse", "compile s"),
)
INSTALLED_IN = re.compile(r"/\S*/site-packages/")
FORMS = tuple(f.name for f in ALL_FORMS)
PLANS = (None, *({"*": form} for form in FORMS))


@dataclass
class Finding:
    """What the sweep saw of one model.

    Attributes
    ----------
    status : {"verified", "refused", "random", "failed"}
    reason : str
        Why it was refused, or what failed.
    bytes_sent, dense_bytes, sparse_bytes : int or None
        Per rank and step with tables of `LARGE_ROWS` rows and `BATCH` rows a rank: the plan's, and data parallel's.
    declined : set of (operator, reason)
        Where no rule kept a value inside the region, in any form.
    conditioned : dict of str to float
        Gradients that rounding the original's weights moves by more than the tolerance, as shares of their size:
        `des.verify` compares them with that.
    growth : float
        Of the original's largest weight within the steps; where training diverges, the proof is weak.
    """

    name: str
    status: str = "failed"
    reason: str = ""
    rung: str = ""
    tables: int = 0
    splits: str = ""
    aggregation: str = ""
    bytes_sent: int | None = None
    dense_bytes: int | None = None
    sparse_bytes: int | None = None
    cases: int = 0
    worst: float = 0.0
    compile_s: float = 0.0
    declined: set[tuple[str, str]] = field(default_factory=set)
    conditioned: dict[str, float] = field(default_factory=dict)
    growth: float = 1.0


def examine(rank: int, ranks: int, name: str) -> Finding:
    """On every rank: compile and verify one model of the zoo."""
    found = Finding(name)
    model, inputs = ZOO[name]()
    start = time.perf_counter()
    try:
        plan = des.compile(model, inputs).plan
    except DescompilerError as error:  # every rank raises: compile is collective
        found.status, found.reason = "refused", _first_line(error)
        return found
    found.compile_s = time.perf_counter() - start
    found.tables = len(plan.tables)
    if rank == 0:
        _price(found, model, inputs, plan)
    plans = PLANS if plan.tables else PLANS[:1]
    try:
        report = des.verify(model, inputs, ranks=ranks, plans=plans, launch=here)
    except EquivalenceError as error:  # every rank raises it: each runs the original on the global batch
        kinds = {ORIGINAL_FAILS: "original fails", DRAWS_DIFFER: "random"}
        found.status = next((kind for text, kind in kinds.items() if text in str(error)), "failed")
        if found.status == "failed":
            raise
        found.reason = _first_line(error)
        return found
    found.status, found.cases, found.worst = "verified", report.cases, max(report.worst.values())
    found.conditioned, found.growth = report.conditioned, report.growth
    return found


def _price(found: Finding, model: nn.Module, inputs: Any, small: Plan) -> None:
    """The plan for large tables (the model's own where they can't be enlarged), and what no rule kept inside."""
    large, plan = _enlarged(model), small
    try:
        plan = des.plan(large, inputs, ranks=RANKS, batch=BATCH)
        found.bytes_sent = max(plan.traffic(r).total for r in range(RANKS))
        baselines = plan.baselines()
        found.dense_bytes = baselines["data parallel, dense gradients"]
        found.sparse_bytes = baselines["data parallel, sparse gradients"]
    except (DescompilerError, RuntimeError):  # a weight beside the table has its size too: no large variant
        large = model
    found.splits = _counted(s.form for s in plan.splits.values())
    found.aggregation = _counted(
        f"{c.name} {c.placement.partition('(')[0]}" for c in plan.crossings if c.kind == "values"
    )
    try:
        program, _ = Builder(blueprint(large), inputs).capture(None)
    except CaptureError:
        found.rung = "in part"
        return
    found.rung = program.rung
    operators = find_tables(program)
    for form in FORMS:
        forms = {o.name: form if form in o.forms else "replicate" for o in operators}
        candidates = place(program, operators, assign(operators, forms, RANKS), RULES, RANKS)
        found.declined |= {(target_name(n), why) for n, why in candidates.declined.items()}


def _enlarged(model: nn.Module) -> nn.Module:
    """A copy whose tables have `LARGE_ROWS` rows, on the meta device: for plans, which need no weights."""
    large = blueprint(model)
    for module in large.modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            shape = (max(LARGE_ROWS, module.weight.shape[0]), *module.weight.shape[1:])
            module.weight.data = torch.empty(shape, device="meta")  # the same object: lists hold it too
    return large


def _counted(words: Any) -> str:
    return ", ".join(f"{w}" + (f" ×{n}" if n > 1 else "") for w, n in Counter(words).items())


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def sweep(names: list[str], timeout_s: float) -> list[Finding]:
    """Examine models in turn on one pool of ranks; one that crashes or hangs is a finding too."""
    findings = []
    with RankPool(RANKS) as pool:
        for number, name in enumerate(names, 1):
            start = time.perf_counter()
            try:
                found = pool(examine, name, timeout_s=timeout_s)[0]
            except RankPoolError as error:
                lines = [x for x in str(error).splitlines() if x and not x.startswith(" ")]
                found = Finding(name, reason=next((x for x in reversed(lines) if "Error" in x), lines[-1]))
                print(error, file=sys.stderr)
            findings.append(found)
            took = time.perf_counter() - start
            print(f"{number}/{len(names)} {name}: {found.status} {found.reason[:150]} ({took:.0f} s)", flush=True)
    return findings


def verified_in(text: str) -> set[str]:
    """Names that a table written by `markdown` lists as verified.

    >>> sorted(verified_in("| `a.B` | verified | x |\\n| `a.C` | refused | y |"))
    ['a.B']
    """
    return set(re.findall(r"^\| `([^`]+)` \| verified \|", text, re.MULTILINE))


def markdown(findings: list[Finding]) -> str:
    """The page."""
    count = Counter(f.status for f in findings)
    good = [f for f in findings if f.status == "verified"]
    lines = [
        "# The zoo",
        "",
        "Generated by `make zoo` (`python -m tests.harness.sweep`); do not edit.",
        "",
        f"Models of public libraries, unmodified, on {RANKS} ranks in float64: `des.verify` with the compiler's own",
        f"choice and with every form forced ({', '.join(FORMS)}),",
        "on uneven batches, one empty, with repeated rows: outputs, every gradient, every weight after 3 steps,",
        "and predicted against sent bytes.",
        "",
        f"{len(findings)} models: {count['verified']} verified, {count['refused']} refused by name, "
        f"{count['random']} random, {count['original fails']} whose original fails on other batches, "
        f"{count['failed']} failed. Worst relative error: {max((f.worst for f in good), default=0.0):.1e}.",
        "",
        "Splits, aggregation and bytes (per rank and step, float32) are of the plan for tables of",
        f"{LARGE_ROWS:,} rows and {BATCH:,} rows a rank; beside it data parallel with dense and with sparse gradients.",
        "Compile time is that of the small model, both ranks at once on a shared 2-core machine.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
    ]
    for f in findings:
        sizes = [("" if n is None else f"{n:,}") for n in (f.bytes_sent, f.dense_bytes, f.sparse_bytes)]
        error = f"{f.worst:.1e}" if f.status == "verified" else ""
        cells = [f.rung, str(f.tables), f.splits, f.aggregation, *sizes, f"{f.compile_s:.1f}"]
        lines.append(f"| `{f.name}` | {f.status} | {error} | " + " | ".join(cells) + " |")
    if bad := [f for f in findings if f.status != "verified"]:
        lines += ["", "## Not verified, and why", ""]
        lines += [f"- `{f.name}`: {f.status}: {INSTALLED_IN.sub('', f.reason)}" for f in bad]
    if moved := [f for f in good if f.conditioned]:
        lines += [
            "",
            "## Gradients that rounding moves",
            "",
            "Rounding of weights, of the steps so far or in the last place, moves these gradients of one process by",
            "this share, which is more than the tolerance: they are compared with the original's at the same weights,",
            "or with that movement, and are no part of the worst error.",
            "",
        ]
        lines += [
            f"- `{f.name}`: " + ", ".join(f"{n} {x:.1e}" for n, x in sorted(f.conditioned.items())) for f in moved
        ]
    if wild := [f for f in good if f.growth > DIVERGED]:
        lines += [
            "",
            "## Weak proofs",
            "",
            "The training of these originals diverges within the steps: beside their largest weights, errors of small",
            "tensors are rounding.",
            "",
        ]
        lines += [f"- `{f.name}`: weights grow {f.growth:.0e} times" for f in wild]
    blocked: dict[tuple[str, str], int] = Counter(d for f in findings for d in f.declined)
    if blocked:
        lines += [
            "",
            "## Where values leave the region",
            "",
            "Operators that no rule kept inside in at least one form, by the number of models: values are aggregated",
            "in front of them. Most reasons are no lack of a rule. A sum of ranks' terms goes through what is linear;",
            "one rank's value and another's meet where they are sent; what each rank has for its own rows alone (dense",
            "features, towers, whatever left the region before) would have to be sent in.",
            "",
            "| operator | why | models |",
            "|---|---|---|",
        ]
        lines += [
            f"| `{op}` | {why} | {n} |"
            for (op, why), n in sorted(blocked.items(), key=lambda x: (-x[1], x[0]))
            if n > 1
        ]
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.harness.sweep", description=__doc__)
    parser.add_argument(
        "names", nargs="*", help="models or parts of their names; all by default, and then the page is written"
    )
    parser.add_argument("--timeout", type=float, default=TIMEOUT_S, help="seconds per model")
    options = parser.parse_args(arguments)
    names = [n for n in ZOO if not options.names or any(part in n for part in options.names)]
    os.environ["OMP_NUM_THREADS"] = "1"
    findings = sweep(names, options.timeout)
    before = verified_in(FILE.read_text()) if FILE.exists() else set()
    worse = sorted(before & {f.name for f in findings if f.status != "verified"})
    if options.names:
        print(markdown(findings))
    else:
        FILE.write_text(markdown(findings))
    if worse:
        print(f"verified before, not now: {', '.join(worse)}", file=sys.stderr)
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
