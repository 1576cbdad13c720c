"""Who should solve planning's minimum cuts: networkx's algorithms, scipy's, or ours? On the graphs that planning makes.

    python benchmarks/cut_solvers.py                                # all cases, as Markdown
    python benchmarks/cut_solvers.py --tables 1000 --ranks 1024 --graphs 2

Each model of `benchmarks/plan_scale.py` (DeepFM on the meta device) and each example is planned, and the graphs of its
cuts and of its bound's are kept. Some of them are solved by everyone, in one process, one after the other, again and
again: ratios of medians of CPU time, ours being 1, from the networkx graph to the nodes on the source's side. The last
columns are what a user feels: the CPU seconds of the whole planning, and how many times as long it takes with networkx.

scipy's capacities have 32 bits, and larger ones wrap around without a word: its graphs are scaled down. The column says
how many of its cuts are then none of the least.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import networkx as nx
import numpy as np
import torch
from networkx.algorithms import flow as algorithms
from scipy.sparse import csr_array
from scipy.sparse.csgraph import breadth_first_order, maximum_flow

from descompiler.captured import Captured
from descompiler.examples import CTR_MODELS, MODELS, example
from descompiler.region.flow import SINK, SOLVERS, SOURCE, Solver, by_dinic

NETWORKX = ("boykov_kolmogorov", "dinitz", "edmonds_karp", "shortest_augmenting_path", "preflow_push")
LARGEST = 2**31 - 1
COLUMNS = (
    *("tables", "ranks", "graphs", "nodes", "solving, of planning"),
    *("ours", "scipy", "not the least", *NETWORKX, "planning, s", "with networkx"),
)

recorded: list[nx.DiGraph] = []
solving: list[float] = []


def record(graph: nx.DiGraph) -> Any:
    """Solve as ever; keep the seconds, and the graph if it has a finite cut."""
    start = time.process_time()
    try:
        found = by_dinic(graph)
        recorded.append(graph)
        return found
    finally:
        solving.append(time.process_time() - start)


def by_algorithm(name: str, graph: nx.DiGraph) -> set[Any]:
    """The source's side by one of networkx's algorithms."""
    return nx.minimum_cut(graph, SOURCE, SINK, flow_func=getattr(algorithms, name))[1][0]


def by_scipy(graph: nx.DiGraph) -> set[Any]:
    """The source's side by scipy's Dinic, with capacities scaled so that all of them together have 32 bits."""
    names = list(graph)
    index = {name: i for i, name in enumerate(names)}
    every = [(index[a], index[b], c) for a, b, c in graph.edges(data="capacity")]
    total = sum(c for _, _, c in every if c is not None) + 1
    scale = -(-total // (LARGEST // 2))
    unlimited = total // scale + len(every)
    capacities = [unlimited if c is None else -(-c // scale) for _, _, c in every]
    at = ([a for a, _, _ in every], [b for _, b, _ in every])
    csr = csr_array((np.array(capacities, dtype=np.int32), at), shape=(len(names),) * 2)
    left = csr - maximum_flow(csr, index[SOURCE], index[SINK]).flow
    left.eliminate_zeros()
    reaches = breadth_first_order(csr_array(left.T), index[SINK], return_predecessors=False)
    return set(names) - {names[i] for i in reaches}


SIDES: dict[str, Callable[[nx.DiGraph], set[Any]]] = {
    "ours": lambda graph: by_dinic(graph)[1],
    "scipy": by_scipy,
    **{name: partial(by_algorithm, name) for name in NETWORKX},
}


def capacity(graph: nx.DiGraph, side: set[Any]) -> float:
    """Of the cut with that side of the source."""
    return sum(d.get("capacity", float("inf")) for a, b, d in graph.edges(data=True) if a in side and b not in side)


def cpu_seconds(function: Callable[[], Any]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def measure(captured: Captured, name: str, ranks: int, batch: int, graphs: int, repeats: int) -> tuple[str, ...]:
    """One line of the table."""
    recorded.clear(), solving.clear()
    whole = cpu_seconds(lambda: captured.plan(ranks=ranks, batch=batch, solver="recorder"))
    share, count = sum(solving) / whole, len(solving)
    some = recorded[:: -(-len(recorded) // graphs)]
    worse = sum(capacity(g, by_scipy(g)) > by_dinic(g)[0] for g in some)
    assert all(SIDES[n](g) == by_dinic(g)[1] for n in NETWORKX for g in some)
    times: dict[str, list[float]] = {n: [] for n in SIDES}
    for _ in range(repeats):
        for solver, function in SIDES.items():
            times[solver].append(cpu_seconds(lambda f=function: [f(g) for g in some]))  # type: ignore[misc]
    medians = {n: statistics.median(x) for n, x in times.items()}
    ratios = {n: f"{x / medians['ours']:.1f}" for n, x in medians.items()}
    nodes = max(map(len, recorded))
    recorded.clear()
    planned: dict[str, list[float]] = {"dinic": [], "networkx": []}
    for _ in range(repeats):
        for solver, seconds in planned.items():
            seconds.append(cpu_seconds(lambda s=solver: captured.plan(ranks=ranks, batch=batch, solver=s)))  # type: ignore[misc]
    plain, other = (statistics.median(x) for x in planned.values())
    return (
        *(name, f"{ranks:,}", str(count), f"{nodes:,}", f"{share:.0%}", ratios.pop("ours"), ratios.pop("scipy")),
        *(f"{worse} of {len(some)}", *ratios.values(), f"{plain:.2f}", f"{other / plain:.2f}"),
    )


def cases(tables: Iterable[int], examples: Iterable[str]) -> Iterator[tuple[str, Captured]]:
    """What is planned: DeepFM with so many tables, half of them the linear term's; examples."""
    for count in tables:
        fields = count // 2
        generator = torch.Generator().manual_seed(0)
        sizes = (10 ** (1 + 6 * torch.rand(fields, generator=generator))).long().tolist()
        with torch.device("meta"):
            model = MODELS["deepfm"]("fields", vocab_sizes=sizes, dim=16, hidden=(400, 400))
        yield f"{count:,}", Captured.of(model, (torch.randn(4, 3), torch.zeros(4, fields, dtype=torch.int64)))
    for name in examples:
        yield name, Captured.of(*example(name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", type=int, nargs="*", default=[10, 30, 100, 300])
    parser.add_argument("--examples", nargs="*", default=list(CTR_MODELS))
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 1024])
    parser.add_argument("--batch", type=int, default=1024, help="rows a rank")
    parser.add_argument("--graphs", type=int, default=6, help="that everyone solves, of each plan")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    SOLVERS.add(Solver("recorder", record), "benchmarks")
    print(f"| {' | '.join(COLUMNS)} |\n|{'--:|' * len(COLUMNS)}", flush=True)
    for name, captured in cases(args.tables, args.examples):
        for ranks in args.ranks:
            print(
                f"| {' | '.join(measure(captured, name, ranks, args.batch, args.graphs, args.repeats))} |", flush=True
            )


if __name__ == "__main__":
    main()
