"""The sweep over the zoo: ``make zoo``, or ``python -m tests.harness.sweep [NAME ...]``.

Every model of `tests.harness.zoo`, on 2 ranks in float64: captured how, split how, aggregated where, bytes against data
parallel, and whether it trains as the original (`des.verify`, the compiler's own choice and every form forced). Writes
``docs/zoo.md``, and exits with status 1 if a model that the file lists as verified is not any more.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
from typing import Any

import torch
from torch import nn

import descompiler as des
from descompiler.builder import Builder
from descompiler.check.compare import ORIGINAL_FAILS
from descompiler.check.judge import DRAWS_DIFFER
from descompiler.errors import CaptureError, DescompilerError, EquivalenceError
from descompiler.graph.nodes import target_name
from descompiler.model.probe import blueprint
from descompiler.passes import RULES
from descompiler.planning.objective import assign
from descompiler.planning.plan import Plan
from descompiler.region.place import place
from descompiler.tables.form import find_tables
from tests.harness.pool import RankPool, RankPoolError, here
from tests.harness.zoo import ZOO
from tests.harness.zoo_page import BATCH, FILE, FORMS, LARGE_ROWS, RANKS, Finding, Page, verified_in

TIMEOUT_S = 240.0
PLANS = (None, *({"*": form} for form in FORMS))


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


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.harness.sweep", description=__doc__)
    parser.add_argument(
        "names", nargs="*", help="models or parts of their names; all by default, and then the page is written"
    )
    parser.add_argument("--merge", action="store_true", help="write the rows of these models into the page")
    parser.add_argument("--timeout", type=float, default=TIMEOUT_S, help="seconds per model")
    options = parser.parse_args(arguments)
    names = [n for n in ZOO if not options.names or any(part in n for part in options.names)]
    os.environ["OMP_NUM_THREADS"] = "1"
    findings = sweep(names, options.timeout)
    before = verified_in(FILE.read_text()) if FILE.exists() else set()
    worse = sorted(before & {f.name for f in findings if f.status != "verified"})
    page = Page.of(findings)
    if options.merge:
        page = Page.read(FILE.read_text()).renewed(page)
    if options.names and not options.merge:
        print(page.text())
    else:
        FILE.write_text(page.text())
    if worse:
        print(f"verified before, not now: {', '.join(worse)}", file=sys.stderr)
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
