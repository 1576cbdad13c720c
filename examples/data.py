"""Click logs for the examples: a generator with a planted model, readers of Criteo and libfm files, AUC, log loss."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

N_DENSE, N_FIELDS = 13, 26
"""Columns I1 to I13 and C1 to C26 of Criteo's files."""

# The numbers of distinct values of C1 to C26 in the Criteo Display Advertising Challenge's training set.
# fmt: off
CRITEO_CARDINALITIES = (
    1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194,
    27, 14992, 5461306, 10, 5652, 2173, 4, 7046547, 18, 15, 286181, 105, 142572,
)
# fmt: on


class DataError(ValueError):
    """A file is not what a reader takes; the text starts with ``file:line`` where a line is to blame."""


def row_counts(rows: int, world_size: int) -> list[int]:
    """Rows of a global batch that each rank gets: they differ by at most one, and may be 0."""
    return [rows * (r + 1) // world_size - rows * r // world_size for r in range(world_size)]


@dataclass(frozen=True)
class ClickLog:
    """Rows of a click log.

    Attributes
    ----------
    dense : torch.Tensor
        ``float32 [n, n_dense]``.
    sparse : torch.Tensor
        ``int64 [n, fields]``, ids below ``vocab_sizes``.
    labels : torch.Tensor
        ``float32 [n]``, 0 or 1.
    vocab_sizes : tuple of int
        Ids of each field.
    """

    dense: Tensor
    sparse: Tensor
    labels: Tensor
    vocab_sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        n = len(self.labels)
        if len(self.dense) != n or self.sparse.shape != (n, len(self.vocab_sizes)):
            raise ValueError(
                f"{n} labels, dense features {tuple(self.dense.shape)}, ids {tuple(self.sparse.shape)} and "
                f"{len(self.vocab_sizes)} vocabularies do not belong together"
            )

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def n_dense(self) -> int:
        """Number of dense features."""
        return self.dense.shape[1]

    def __getitem__(self, rows: slice | Tensor) -> ClickLog:
        return ClickLog(self.dense[rows], self.sparse[rows], self.labels[rows], self.vocab_sizes)

    def split(self, fraction: float) -> tuple[ClickLog, ClickLog]:
        """The first ``fraction`` of the rows, and the rest: logs are in order of time."""
        cut = round(len(self) * fraction)
        return self[:cut], self[cut:]

    def batches(
        self, batch: int, rank: int = 0, world_size: int = 1, seed: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """This rank's slices of the global batches.

        Parameters
        ----------
        batch : int
            Rows of a global batch; the last has what is left.
        rank, world_size : int
            Every rank gets the same number of slices, cut as in `row_counts`; together they hold each row once. A
            slice may have no rows.
        seed : int, optional
            Shuffles the rows, on every rank alike. In order if not given.

        Yields
        ------
        dense, sparse, labels : torch.Tensor
        """
        if batch < 1:
            raise ValueError(f"batch must be at least 1; it is {batch}")
        n = len(self)
        order = None if seed is None else torch.randperm(n, generator=torch.Generator().manual_seed(seed))
        for start in range(0, n, batch):
            size = min(batch, n - start)
            first = start + size * rank // world_size
            last = start + size * (rank + 1) // world_size
            rows: slice | Tensor = slice(first, last) if order is None else order[first:last]
            yield self.dense[rows], self.sparse[rows], self.labels[rows]


class Splits(NamedTuple):
    """What `load` returns; ``valid`` is None where there is no such file."""

    train: ClickLog
    valid: ClickLog | None
    test: ClickLog


def synthetic_ctr(rows: int, seed: int = 0, scale: float = 1e-3) -> ClickLog:
    """Rows like Criteo's: 13 dense features, 26 fields with Zipf-distributed ids, clicks of a planted model.

    Parameters
    ----------
    rows : int
        How many.
    seed : int
        Of everything: the same seed gives the same planted model and rows.
    scale : float
        Criteo's cardinalities above 100 are multiplied by this, but stay at least 100.

    Returns
    -------
    ClickLog
        Between a quarter and a half of the labels are 1. The planted model is a factorisation machine of rank 4.
    """
    rng = np.random.default_rng(seed)
    vocab_sizes = tuple(c if c <= 100 else min(c, max(100, round(c * scale))) for c in CRITEO_CARDINALITIES)
    dense = rng.standard_normal((rows, N_DENSE), dtype=np.float32)
    sparse = np.empty((rows, N_FIELDS), dtype=np.int64)
    logit = dense @ rng.normal(0, 1, N_DENSE)
    total, squares = np.zeros((rows, 4)), np.zeros((rows, 4))
    for f, size in enumerate(vocab_sizes):
        weights = 1 / np.arange(1, size + 1) ** 1.05
        cumulated = np.cumsum(weights / weights.sum())
        rank_of_row = np.searchsorted(cumulated, rng.random(rows)).clip(max=size - 1)
        sparse[:, f] = rng.permutation(size)[rank_of_row]
        logit += rng.normal(0, 1, size)[sparse[:, f]]
        v = rng.normal(0, 0.5, (size, 4))[sparse[:, f]]
        total += v
        squares += v**2
    logit += 0.5 * (total**2 - squares).sum(axis=1)
    # Fixed numbers rather than the sample's own mean and deviation, so that a label depends on its row alone.
    probability = 1 / (1 + np.exp(-(logit / 4 - 1)))
    labels = (rng.random(rows) < probability).astype(np.float32)
    return ClickLog(*map(torch.from_numpy, (dense, sparse, labels)), vocab_sizes)


# Readers parse all files of a data set together: only then do equal values get equal ids.


class _Raw(NamedTuple):
    """The rows of one file, its categorical values not yet numbered."""

    dense: npt.NDArray[np.float32]
    values: list[Sequence[str | int]]  # a row's categorical values; "" is missing
    labels: npt.NDArray[np.float32]


def _number(raws: Sequence[_Raw]) -> list[ClickLog]:
    """Number each field's values in the order of first appearance; a missing value is a value."""
    fields = len(raws[0].values[0])
    known: list[dict[str | int, int]] = [{} for _ in range(fields)]
    numbered = [
        np.array(
            [[k.setdefault(v, len(k)) for k, v in zip(known, row, strict=True)] for row in raw.values],
            dtype=np.int64,
        ).reshape(len(raw.values), fields)
        for raw in raws
    ]
    vocab_sizes = tuple(len(k) for k in known)
    return [
        ClickLog(torch.from_numpy(raw.dense), torch.from_numpy(ids), torch.from_numpy(raw.labels), vocab_sizes)
        for raw, ids in zip(raws, numbered, strict=True)
    ]


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Non-empty lines with their numbers, from 1."""
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    # Not strip(): in a tab-separated row the last columns may be missing.
                    yield number, line.rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not a text file ({error.reason})") from error
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error


def _label(text: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if value not in (-1, 0, 1):
        raise DataError(f"{where}: the label must be 0 or 1 (or -1 for 0); it is {text!r}")
    return float(value > 0)


def _raw_criteo(path: Path, rows: int | None) -> _Raw:
    names = ["label", *(f"i{i}" for i in range(1, N_DENSE + 1)), *(f"c{i}" for i in range(1, N_FIELDS + 1))]
    columns, separator, width = list(range(len(names))), "\t", len(names)
    dense: list[list[float]] = []
    values: list[Sequence[str | int]] = []
    labels: list[float] = []
    for i, (number, line) in enumerate(_lines(path)):
        where = f"{path}:{number}"
        if i == 0 and "\t" not in line:
            separator = ","
            header = [name.strip().lower() for name in line.split(separator)]
            missing = [name for name in names if name not in header]
            if missing:
                raise DataError(f"{where}: the header has no column {', '.join(missing)}")
            columns, width = [header.index(name) for name in names], len(header)
            continue
        if rows is not None and len(labels) == rows:
            break
        parts = line.split(separator)
        if len(parts) != width:
            raise DataError(f"{where}: {len(parts)} columns instead of {width}")
        parts = [parts[c] for c in columns]
        labels.append(_label(parts[0], where))
        try:
            # Counts; -1 to -3 occur, and mean as little as a missing value.
            dense.append([max(float(p), 0.0) if p else 0.0 for p in parts[1 : N_DENSE + 1]])
        except ValueError as error:
            raise DataError(f"{where}: I1 to I{N_DENSE} must be numbers or empty: {error}") from None
        values.append(parts[N_DENSE + 1 :])
    if not labels:
        raise DataError(f"{path}: has no rows")
    return _Raw(np.log1p(np.array(dense, dtype=np.float32)), values, np.array(labels, dtype=np.float32))


def _raw_libfm(path: Path, rows: int | None) -> _Raw:
    values: list[Sequence[str | int]] = []
    labels: list[float] = []
    for number, line in _lines(path):
        where = f"{path}:{number}"
        if rows is not None and len(labels) == rows:
            break
        label, *features = line.split()
        indices: list[str | int] = []
        for feature in features:
            index, _, value = feature.partition(":")
            if not index.isdecimal():
                raise DataError(f"{where}: expected index:value, found {feature!r}")
            try:
                one = float(value) == 1
            except ValueError:
                one = False
            if not one:
                raise DataError(f"{where}: only one-hot fields (index:1) are read, found {feature!r}")
            indices.append(int(index))
        if not indices or (values and len(indices) != len(values[0])):
            expected = f"{len(values[0])} as in the rows before" if values else "at least one"
            raise DataError(f"{where}: {len(indices)} fields instead of {expected}")
        labels.append(_label(label, where))
        values.append(indices)
    if not labels:
        raise DataError(f"{path}: has no rows")
    return _Raw(np.empty((len(labels), 0), np.float32), values, np.array(labels, dtype=np.float32))


def read_criteo(path: str | Path, rows: int | None = None) -> ClickLog:
    """Read rows of the Criteo Display Advertising Challenge.

    Parameters
    ----------
    path : path
        Tab-separated without a header (label, I1 to I13, C1 to C26), or comma-separated with a header that names
        these columns in any order, beside others.
    rows : int, optional
        Read the first rows only.

    Returns
    -------
    ClickLog
        Dense features are ``log(1 + x)``, negative and missing ones 0. Each field's values are numbered in the order
        of appearance; a missing value is a value.

    Raises
    ------
    DataError
        With file and line.
    """
    return _number([_raw_criteo(Path(path), rows)])[0]


def read_libfm(path: str | Path, rows: int | None = None) -> ClickLog:
    """Read a libfm file of one-hot fields, ``label index:1 index:1 ...``: the i-th index of a row is field i's value.

    Parameters
    ----------
    path : path
        Every row must have the same number of indices; labels are 1, and 0 or -1.
    rows : int, optional
        Read the first rows only.

    Returns
    -------
    ClickLog
        Without dense features. Each field's values are numbered in the order of appearance.

    Raises
    ------
    DataError
        With file and line.
    """
    return _number([_raw_libfm(Path(path), rows)])[0]


_READERS = {"criteo": _raw_criteo, "libfm": _raw_libfm}


def sniff(path: str | Path) -> str:
    """The format of a file, by its first line: ``"criteo"`` or ``"libfm"``."""
    for number, line in _lines(Path(path)):
        if line.count("\t") == N_DENSE + N_FIELDS:
            return "criteo"
        if re.fullmatch(r"[-+.\d]+(\s+\d+:\S+)+\s*", line):
            return "libfm"
        if "label" in [name.strip().lower() for name in line.split(",")]:
            return "criteo"
        raise DataError(
            f"{path}:{number}: neither Criteo (40 tab-separated columns, or a comma-separated header with "
            "label,I1,...,C26) nor libfm (label index:1 ...)"
        )
    raise DataError(f"{path}: has no rows")


def _read_together(paths: Sequence[Path], rows: int | None) -> list[ClickLog]:
    raws: list[_Raw] = []
    for path in paths:
        raws.append(_READERS[sniff(path)](path, rows))
    for (first, a), (second, b) in pairwise(zip(paths, raws, strict=True)):
        if len(a.values[0]) != len(b.values[0]) or a.dense.shape[1] != b.dense.shape[1]:
            raise DataError(f"{second}: has other columns than {first}")
    return _number(raws)


def _files_of(folder: Path) -> dict[str, Path]:
    """The files of a folder by role, told by how their names begin."""
    found: dict[str, Path] = {}
    for path in sorted(p for p in folder.iterdir() if p.is_file()):
        for role, prefixes in {"train": ("train",), "valid": ("valid", "val", "dev"), "test": ("test",)}.items():
            if path.name.lower().startswith(prefixes):
                if role in found:
                    raise DataError(f"{folder}: both {found[role].name} and {path.name} could be the {role} set")
                found[role] = path
    return found


def load(path: str | Path | None = None, *, rows: int | None = None, seed: int = 0, fraction: float = 0.8) -> Splits:
    """Training, validation and test rows from a file, a folder, or the generator.

    Parameters
    ----------
    path : path, optional
        A file of any format that `sniff` knows; or a folder whose files' names begin with train, valid and test, of
        which only train must be there. Without a path, rows are generated by `synthetic_ctr`.
    rows : int, optional
        Rows to generate (50,000 if not given), or to read from each file at most (all if not given).
    seed : int
        Of the generator.
    fraction : float
        Share of the rows to train on where there is no file to test on.

    Returns
    -------
    Splits
        Their ids mean the same things.

    Raises
    ------
    DataError
        With the file, and the line where one is to blame.
    """
    if path is None:
        train, test = synthetic_ctr(50_000 if rows is None else rows, seed).split(fraction)
        return _with_rows(Splits(train, None, test), "the generator")
    path = Path(path)
    if not path.exists():
        raise DataError(f"{path}: does not exist")
    files = _files_of(path) if path.is_dir() else {"train": path}
    if "train" not in files:
        raise DataError(f"{path}: holds no file whose name begins with train")
    logs = dict(zip(files, _read_together(list(files.values()), rows), strict=True))
    train, valid, test = logs["train"], logs.get("valid"), logs.get("test")
    if test is None:
        if valid is None:
            train, test = train.split(fraction)
        else:
            valid, test = None, valid
    return _with_rows(Splits(train, valid, test), str(path))


def _with_rows(splits: Splits, origin: str) -> Splits:
    if not len(splits.train) or not len(splits.test):
        raise DataError(f"{origin}: too few rows to train on some and test on others")
    return splits


def _array(x: Tensor | npt.ArrayLike) -> npt.NDArray[np.float64]:
    return np.asarray(x.detach().cpu() if isinstance(x, Tensor) else x, dtype=np.float64).reshape(-1)


def auc(labels: Tensor | npt.ArrayLike, scores: Tensor | npt.ArrayLike) -> float:
    """Area under the ROC curve: how often a positive scores above a negative, a tie counting half.

    Returns
    -------
    float
        NaN if all labels are equal.
    """
    y, s = _array(labels) > 0.5, _array(scores)
    positives = int(y.sum())
    negatives = len(y) - positives
    if not positives or not negatives:
        return float("nan")
    _, inverse, counts = np.unique(s, return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - (counts - 1) / 2  # equal scores share the mean of their ranks
    return float((ranks[inverse][y].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def log_loss(labels: Tensor | npt.ArrayLike, logits: Tensor | npt.ArrayLike) -> float:
    """Mean negative log-likelihood of the labels, in nats; from logits, so that no score is too certain for it."""
    y, z = _array(labels), _array(logits)
    return float(np.mean(np.logaddexp(0, z) - y * z))
