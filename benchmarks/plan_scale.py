"""How long it takes to plan a model of very many tables for very many ranks, without its weights.

    python benchmarks/plan_scale.py --tables 1000 --ranks 1024

DeepFM on the meta device: half of the tables are embeddings, half the linear term's. Vocabularies are log-uniform from
10 to 10 million. Prints seconds of capture (torch.export and its checks) and of planning, both wall clock and of this
process's CPU.
"""

from __future__ import annotations

import argparse
import time

import torch

from descompiler.captured import Captured
from descompiler.examples import MODELS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", type=int, default=1000)
    parser.add_argument("--ranks", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=1024, help="rows a rank")
    parser.add_argument("--dim", type=int, default=16)
    args = parser.parse_args()
    fields = args.tables // 2
    generator = torch.Generator().manual_seed(0)
    sizes = (10 ** (1 + 6 * torch.rand(fields, generator=generator))).long().tolist()
    with torch.device("meta"):
        model = MODELS["deepfm"]("fields", vocab_sizes=sizes, dim=args.dim, hidden=(400, 400))
    inputs = (torch.randn(4, 3), torch.zeros(4, fields, dtype=torch.int64))
    wall, cpu = time.perf_counter(), time.process_time()
    captured = Captured.of(model, inputs)
    captured_s = time.perf_counter() - wall, time.process_time() - cpu
    wall, cpu = time.perf_counter(), time.process_time()
    plan = captured.plan(ranks=args.ranks, batch=args.batch)
    planned_s = time.perf_counter() - wall, time.process_time() - cpu
    forms = {f: list(plan.forms.values()).count(f) for f in sorted(set(plan.forms.values()))}
    print(f"{len(plan.tables)} tables, {sum(sizes):,} rows, {plan.ranks} ranks, {plan.rows} rows a rank")
    print(f"capture   {captured_s[0]:6.1f} s, of CPU {captured_s[1]:6.1f} s")
    print(f"planning  {planned_s[0]:6.1f} s, of CPU {planned_s[1]:6.1f} s, {plan.trials} trials")
    print(f"{plan.price_bytes:,} B of the busiest rank, at most {plan.gap:.2%} above the best; forms: {forms}")


if __name__ == "__main__":
    main()
