"""How evenly the ids of real streams fall on ranks: rows that they hold, and rows that owners serve in a step.

    python benchmarks/balance.py ../shared/data/frappe/train.libfm ../shared/data/criteo/train.tiny.csv

Each file's ids are one table's (those of all its fields; each with its field, as values of fields may be alike), beside
the click stream of examples/streaming.py. A step has 1,024 rows of the file, in its order, divided among ranks; each
rank asks the owners for its unique ids. Printed is what the busiest rank has, over the mean: of all ids, and of what
owners serve in a step (mean of the steps); for owners by slices of the hashed key space
(`descompiler.dynamic.owners.Owners`), for equal ranges of a vocabulary in the order of appearance, and for
``id % ranks`` of it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

import descompiler as des
from benchmarks.ranks import ROOT
from descompiler.dynamic.hashing import mix
from descompiler.dynamic.owners import Owners

sys.path.insert(0, str(ROOT / "examples"))

ROWS, RANKS, STEPS = 1024, (2, 4, 8), 200

Owner = Callable[[Tensor, int], Tensor]
"""The rank of each id, of so many."""


def ids_of(path: Path) -> Tensor:
    """The ids of a file, int64 ``[rows, fields]``, numbered in the order of appearance."""
    from data import read_criteo, read_libfm, sniff

    log = (read_criteo if sniff(path) == "criteo" else read_libfm)(path)
    starts = torch.tensor([0, *log.vocab_sizes[:-1]]).cumsum(0)
    return in_order(log.sparse + starts)


def of_stream() -> Tensor:
    """The users of the example's stream, ``[rows, 1]``: hashes, numbered in the order of appearance."""
    from clicks import Stream

    stream = Stream(0)
    return in_order(torch.cat([stream.batch(step, ROWS).inputs.users for step in range(STEPS)])[:, None])


def in_order(ids: Tensor) -> Tensor:
    """The same ids, numbered as they appear."""
    values, which = ids.reshape(-1).unique(return_inverse=True)
    first = torch.full_like(values, ids.numel()).scatter_reduce_(0, which, torch.arange(ids.numel()), "amin")
    number = torch.empty_like(first)
    number[first.argsort()] = torch.arange(len(first))
    return number[which].view(ids.shape)


def owners(count: int) -> dict[str, Owner]:
    """Ways to divide so many ids."""
    table = des.DynamicEmbedding(1, name="ids")._table

    def hashed(ids: Tensor, ranks: int) -> Tensor:
        # of a table that numbers had been hashed for: what they are does not matter, as keys are mixed
        return Owners(table.residence.slices, ranks).of(table.keys(mix(ids)))

    return {
        "slices": hashed,
        "ranges": lambda ids, ranks: ids * ranks // count,
        "id % ranks": lambda ids, ranks: ids % ranks,
    }


def busiest(of: Tensor, ranks: int) -> float:
    """What the busiest rank has, over the mean."""
    return float(of.bincount(minlength=ranks).max() * ranks / max(of.numel(), 1))


def steps(ids: Tensor, ranks: int) -> Iterator[Tensor]:
    """What owners are asked for in each step: the unique ids of each rank's rows."""
    for rows in ids[: len(ids) // ROWS * ROWS].split(ROWS):
        yield torch.cat([part.unique() for part in rows.chunk(ranks)])


def report(name: str, ids: Tensor) -> list[str]:
    """A line for each number of ranks and way to divide."""
    count, lines = int(ids.max()) + 1, []
    for ranks in RANKS:
        asked = list(steps(ids, ranks))
        cells = []
        for owner in owners(count).values():
            served = [busiest(owner(x, ranks), ranks) for x in asked]
            cells.append(f"{busiest(owner(torch.arange(count), ranks), ranks):.3f} | {sum(served) / len(served):.3f}")
        lines.append(f"| {name} | {count:,} | {ranks} | {' | '.join(cells)} |")
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="Criteo's or libfm files")
    options = parser.parse_args(argv)
    ways = list(owners(1))
    print(f"| ids of | ids | ranks | {' | '.join(f'{w}: rows | served' for w in ways)} |")
    print("|---" * (3 + 2 * len(ways)) + "|")
    for file in options.files:
        print("\n".join(report(file.parent.name, ids_of(file))))
    print("\n".join(report("stream", of_stream())))


if __name__ == "__main__":
    main()
