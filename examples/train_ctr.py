"""Train a click-through-rate model on several ranks, and check it against the same model on one.

    torchrun --standalone --nproc-per-node 2 examples/train_ctr.py
    torchrun --standalone --nproc-per-node 4 examples/train_ctr.py --model fm --data path/to/criteo.tsv
    python examples/train_ctr.py                                     # one rank

The model is an ordinary one from ``models.py``; `des.compile` is the only line that distributes it. Rank 0 prints the
plan, trains, prints AUC and log loss on held-out rows, and the bytes that each rank sent in a step beside those that
the plan predicted and those that other strategies would send. Then it trains the original model alone, on the same
global batches and from the same weights; the exit status is 1 if the two differ in AUC by more than 0.001.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from data import ClickLog, DataError, auc, load, log_loss, row_counts
from models import CTR_MODELS, MODELS, initialise_tables
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn

import descompiler as des
from descompiler.captured import Captured

AUC_TOLERANCE = 1e-3

Batch = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Ranks:
    """The processes that train together, and what they tell each other."""

    rank: int
    size: int

    @classmethod
    def start(cls) -> Ranks:
        """Join the process group that torchrun describes; a plain ``python`` run is one rank without a group."""
        if "WORLD_SIZE" not in os.environ:
            return cls(0, 1)
        dist.init_process_group("gloo")
        return cls(dist.get_rank(), dist.get_world_size())

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value in order of rank, on rank 0; nothing elsewhere."""
        if self.size == 1:
            return [value]
        values: list[Any] | None = [None] * self.size if self.rank == 0 else None
        dist.gather_object(value, values)
        return values or []

    def agree(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]

    def stop(self) -> None:
        """Leave the process group."""
        if dist.is_initialized():
            dist.destroy_process_group()


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, help="Criteo or libfm file, or a folder with train, valid, test; default: generated rows"
    )
    parser.add_argument(
        "--rows", type=int, help="rows to generate, or to read of each file; default: 100000, or all of a file"
    )
    parser.add_argument("--epochs", type=int, default=1, help="passes over the training rows")
    parser.add_argument("--batch", type=int, default=1024, help="rows of a global batch, over all ranks")
    parser.add_argument("--dim", type=int, default=16, help="width of an embedding")
    parser.add_argument("--lr", type=float, default=0.02, help="Adagrad's learning rate")
    parser.add_argument("--model", choices=CTR_MODELS, default="deepfm", help="a model of models.py")
    parser.add_argument("--layout", choices=("fields", "offsets"), default="fields", help="how tables are held")
    parser.add_argument("--seed", type=int, default=0, help="of weights, generated rows and their order")
    parser.add_argument("--prefetch", action="store_true", help="exchange the next batch's ids during a step")
    parser.add_argument("--compare", action=argparse.BooleanOptionalAction, default=True, help="train on one rank too")
    args = parser.parse_args()
    for name in ("rows", "epochs", "batch", "dim"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1")
    if args.data is None and args.rows is None:
        args.rows = 100_000
    return args


def build(args: argparse.Namespace, log: ClickLog) -> nn.Module:
    """The model, in one process and knowing of no other."""
    torch.manual_seed(args.seed)
    model = MODELS[args.model](
        args.layout, vocab_sizes=log.vocab_sizes, n_dense=log.n_dense, dim=args.dim, hidden=(64, 32)
    )
    return initialise_tables(model)


def mean_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean over this rank's rows; a rank without rows takes part in backward all the same, with a zero."""
    return F.binary_cross_entropy_with_logits(logits, labels) if len(labels) else logits.sum() * 0


def train(
    module: nn.Module,
    batches: Iterable[Batch],
    lr: float,
    after_step: Callable[[float | None], None],
) -> None:
    """One Adagrad step per batch; ``after_step`` gets the loss, None where the rank has no rows."""
    optimizer = torch.optim.Adagrad(module.parameters(), lr=lr)
    module.train()
    for dense, sparse, labels in batches:
        loss = mean_loss(module(dense, sparse), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        after_step(float(loss.detach()) if len(labels) else None)


@torch.no_grad()
def predict(module: nn.Module, batches: Iterable[Batch]) -> list[Tensor]:
    """Logits of each batch."""
    module.eval()
    return [module(dense, sparse) for dense, sparse, _ in batches]


def progress(console: Console, text: str, visible: bool) -> Progress:
    """A bar with the number of steps and a text beside it."""
    return Progress(
        TextColumn(text),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeRemainingColumn(),
        console=console,
        disable=not visible,
    )


def train_with_bar(
    console: Console,
    text: str,
    visible: bool,
    steps: int,
    module: nn.Module,
    batches: Iterable[Batch],
    lr: float,
    after_step: Callable[[int], None] = lambda step: None,
) -> float:
    """`train` with a progress bar; returns the seconds it took."""
    step = 0
    with progress(console, text, visible) as bar:
        task = bar.add_task(text, total=steps, loss="")

        def show(loss: float | None) -> None:
            nonlocal step
            bar.update(task, advance=1, **({} if loss is None else {"loss": f"loss {loss:.4f}"}))
            after_step(step)
            step += 1

        start = time.perf_counter()
        train(module, batches, lr, show)
        return time.perf_counter() - start


def print_traffic(
    console: Console, sent: dict[tuple[int, ...], list[tuple[int, int]]], baselines: dict[str, Any], batch: int
) -> None:
    """Predicted and actual bytes of each rank, by the rows of the ranks; then what other strategies would send."""
    table = Table("rows of the ranks", "rank", "predicted", "sent", "", title="Bytes sent per rank and step")
    for column in table.columns[1:4]:
        column.justify = "right"
    for rows, ranks in sent.items():
        for rank, (predicted, actual) in enumerate(ranks):
            same = "equal" if predicted == actual else f"{actual - predicted:+,}"
            label = ", ".join(map(str, rows)) if rank == 0 else ""
            table.add_row(label, str(rank), f"{predicted:,}", f"{actual:,}", same)
    console.print(table)
    if all(predicted == actual for ranks in sent.values() for predicted, actual in ranks):
        console.print("predicted == actual: yes, on every rank")
    else:
        console.print("predicted == actual: no")

    ours = max(actual for _, actual in next(iter(sent.values())))
    table = Table("strategy", "bytes", title=f"Bytes per rank and step, {batch:,} rows a rank")
    table.columns[1].justify = "right"
    table.add_row("this plan", f"{ours:,}", style="bold")
    for name, size in sorted(baselines.items(), key=lambda item: item[1]):
        table.add_row(name, f"{round(size):,}")
    console.print(table)


def run(args: argparse.Namespace, ranks: Ranks, console: Console) -> bool:
    """Train, report, compare; whether all is well."""
    first = ranks.rank == 0
    data = load(args.data, rows=args.rows, seed=args.seed)
    rows_per_rank = max(row_counts(args.batch, ranks.size))
    model = build(args, data.train)
    example = data.train[:rows_per_rank]

    start = time.perf_counter()
    module = des.compile(model, example_inputs=(example.dense, example.sparse), loss="row_mean", batch=rows_per_rank)
    compiled_s = time.perf_counter() - start
    if first:
        # The plan is text for people, with brackets that rich would take for markup.
        console.print(module.plan.explain(), markup=False, highlight=False, soft_wrap=True)
    weights: dict[str, Tensor] = {}
    if args.compare:
        # Copies: training goes on in the tensors that a state dict may refer to.
        weights = {name: value.clone() for name, value in des.full_state_dict(module).items()}

    # The bytes of a step depend on how many rows each rank has, which changes in the last batch of an epoch only.
    sizes = [min(args.batch, len(data.train) - i) for i in range(0, len(data.train), args.batch)]
    sent: dict[tuple[int, ...], tuple[int, int]] = {}

    def note_traffic(step: int) -> None:
        rows = tuple(row_counts(sizes[step % len(sizes)], ranks.size))
        if rows not in sent:
            predicted = module.plan.traffic(ranks.rank, list(rows), unique=module.unique())
            if args.prefetch:  # steps whose ids went ahead tell one header more, which is no plan's
                predicted = module.predicted_traffic()
            sent[rows] = (int(predicted.total), int(module.traffic().total))

    def batches(rank: int, world_size: int) -> Iterable[Batch]:
        for epoch in range(args.epochs):
            yield from data.train.batches(args.batch, rank, world_size, seed=args.seed + epoch)

    steps = args.epochs * len(sizes)
    name = f"{args.model} on {ranks.size} rank{'s' if ranks.size > 1 else ''}"
    mine = batches(ranks.rank, ranks.size)
    if args.prefetch:
        mine = des.prefetch(mine, module)
    trained_s = train_with_bar(console, name, first, steps, module, mine, args.lr, note_traffic)
    logits = ranks.gather(predict(module, data.test.batches(args.batch, ranks.rank, ranks.size)))
    by_rank = ranks.gather(sent)
    good = True
    if first:
        # Slices of a global batch lie one after another, so this is the order of the held-out rows.
        scores = torch.cat([part for parts in zip(*logits, strict=True) for part in parts])
        distributed = auc(data.test.labels, scores)
        console.print(f"compiled in {compiled_s:.1f} s, trained {len(data.train):,} rows in {trained_s:.1f} s")
        console.print(
            f"held-out rows {len(data.test):,}: AUC {distributed:.5f}, "
            f"log loss {log_loss(data.test.labels, scores):.5f}"
        )
        table = {rows: [other[rows] for other in by_rank] for rows in sent}
        # other strategies would have sent the ids of the step whose bytes were counted, not the expected ones
        sizes_of = (1, ranks.size) if ranks.size > 1 else (1,)
        in_step = [next(iter(data.train.batches(args.batch, r, n, seed=args.seed))) for n in sizes_of for r in range(n)]
        captured = Captured.of(model, (example.dense, example.sparse))
        statistics = captured.measure((dense, sparse) for dense, sparse, _ in in_step)
        print_traffic(console, table, module.plan.baselines(rows_per_rank, statistics), rows_per_rank)
        if args.compare:
            good = compare(args, console, data.train, data.test, weights, steps, batches(0, 1), distributed)
    return ranks.agree(good)


def compare(
    args: argparse.Namespace,
    console: Console,
    train_log: ClickLog,
    test_log: ClickLog,
    weights: dict[str, Tensor],
    steps: int,
    batches: Iterable[Batch],
    distributed: float,
) -> bool:
    """Train the original model in this process alone; whether its AUC agrees with that of the ranks."""
    model = build(args, train_log)
    model.load_state_dict(weights)
    seconds = train_with_bar(console, f"{args.model} in one process", True, steps, model, batches, args.lr)
    scores = torch.cat(predict(model, test_log.batches(args.batch)))
    single = auc(test_log.labels, scores)
    difference = abs(single - distributed)
    good = difference <= AUC_TOLERANCE  # False for NaN
    console.print(
        f"one process, same batches and initial weights: trained in {seconds:.1f} s, AUC {single:.5f}, "
        f"log loss {log_loss(test_log.labels, scores):.5f}"
    )
    console.print(f"AUC differs by {difference:.2e}: {'equivalent' if good else 'NOT EQUIVALENT'}")
    return good


def main() -> None:
    """Run on this rank."""
    args = arguments()
    ranks = Ranks.start()
    console = Console(quiet=ranks.rank != 0)
    try:
        good = run(args, ranks, console)
    except DataError as error:
        # All ranks read the same files, so all are here.
        console.print(f"error: {error}", markup=False, soft_wrap=True)
        good = False
    finally:
        ranks.stop()
    if not good:
        sys.exit(1)


if __name__ == "__main__":
    main()
