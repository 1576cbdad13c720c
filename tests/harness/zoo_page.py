"""The page of the zoo, docs/zoo.md: written of what a sweep found, and renewed in part by one of some models."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from descompiler.check.judge import DIVERGED
from descompiler.passes import FORMS as ALL_FORMS
from tests.harness.zoo import LEFT_OUT

FILE = Path(__file__).resolve().parents[2] / "docs" / "zoo.md"
RANKS = 2
LARGE_ROWS = 100_000
BATCH = 1024
FORMS = tuple(f.name for f in ALL_FORMS)
COLUMNS = (
    *("model", "result", "worst error", "captured by", "tables", "splits", "aggregation"),
    *("bytes", "data parallel", "sparse", "compile s"),
)
INSTALLED_IN = re.compile(r"/\S*/site-packages/")


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


NOT_VERIFIED, MOVED, WEAK = "Not verified, and why", "Gradients that rounding moves", "Weak proofs"
SECTIONS: dict[str, tuple[str, ...]] = {
    NOT_VERIFIED: (),
    MOVED: (
        "Rounding of weights, of the steps so far or in the last place, moves these gradients of one process by",
        "this share, which is more than the tolerance: they are compared with the original's at the same weights,",
        "or with that movement, and are no part of the worst error.",
    ),
    WEAK: (
        "The training of these originals diverges within the steps: beside their largest weights, errors of small",
        "tensors are rounding.",
    ),
}
IN_LOOPS = (
    "## In libraries' own loops",
    "",
    "What is refused by name there, or has to be said:",
    "",
    "- torch-geometric's models take pairs as `[2, B]`: the batch is not in dim 0, which is refused. The zoo's modules",
    "  hold the graph, and take users and items.",
    "- rectools' `training_step` logs to its trainer: compiled in place it is refused once there is a trainer",
    "  (`_trainer was None when the model was compiled`). Compile a module that calls it, and give the trainer a",
    "  module of your own around that; draw the weights (`on_train_start`) first.",
    "- transformers' `Trainer` gives forward the number of its own tokens, a tensor without rows, which is refused:",
    "  `trainer.model_accepts_loss_kwargs = False`. `max_grad_norm` is exact.",
    "- A forward that calls `backward`, or differentiates by a divided table, is refused. What higher copies for its",
    "  inner loops is whole on every rank.",
)
BLOCKED = "Where values leave the region"
BLOCKED_WORDS = (
    "Operators that no rule kept inside in at least one form, by the number of models in the last sweep of all: values",
    "are aggregated in front of them. Most reasons are no lack of a rule. A sum of ranks' terms goes through what is",
    "linear; one rank's value and another's meet where they are sent; what each rank has for its own rows alone (dense",
    "features, towers, whatever left the region before) would have to be sent in.",
    "",
    "| operator | why | models |",
    "|---|---|---|",
)
ROW = re.compile(r"^\| `([^`]+)` \| (verified|refused|random|original fails|failed) \| ([^|]*)\|", re.MULTILINE)
NOTE = re.compile(r"^- `([^`]+)`: ", re.MULTILINE)


def verified_in(text: str) -> set[str]:
    """Names that the page lists as verified.

    >>> sorted(verified_in("| `a.B` | verified | x |\\n| `a.C` | refused | y |"))
    ['a.B']
    """
    return set(re.findall(r"^\| `([^`]+)` \| verified \|", text, re.MULTILINE))


@dataclass(frozen=True)
class Page:
    """Lines of the page.

    Attributes
    ----------
    rows : mapping of str to str
        By model.
    notes : mapping of str to mapping of str to str
        By section and model.
    blocked : sequence of str
        The last table's.
    """

    rows: Mapping[str, str]
    notes: Mapping[str, Mapping[str, str]]
    blocked: Sequence[str]

    @staticmethod
    def of(findings: Sequence[Finding]) -> Page:
        good = [f for f in findings if f.status == "verified"]
        notes: dict[str, dict[str, str]] = {
            NOT_VERIFIED: {
                f.name: f"{f.status}: {INSTALLED_IN.sub('', f.reason)}" for f in findings if f.status != "verified"
            },
            MOVED: {
                f.name: ", ".join(f"{n} {x:.1e}" for n, x in sorted(f.conditioned.items()))
                for f in good
                if f.conditioned
            },
            WEAK: {f.name: f"weights grow {f.growth:.0e} times" for f in good if f.growth > DIVERGED},
        }
        blocked: Counter[tuple[str, str]] = Counter(d for f in findings for d in f.declined)
        return Page(
            {f.name: _row(f) for f in findings},
            {title: {n: f"- `{n}`: {words}" for n, words in of.items()} for title, of in notes.items()},
            [
                f"| `{op}` | {why} | {n} |"
                for (op, why), n in sorted(blocked.items(), key=lambda x: (-x[1], x[0]))
                if n > 1
            ],
        )

    @staticmethod
    def read(text: str) -> Page:
        """The lines of a page that `text` wrote."""
        sections = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL))
        last = sections.get(BLOCKED, "").partition("|---|---|---|\n")[2]
        return Page(
            _named(ROW, text), {title: _named(NOTE, sections.get(title, "")) for title in SECTIONS}, last.splitlines()
        )

    def renewed(self, other: Page) -> Page:
        """With the rows of another page, which is of some models."""
        notes = {
            title: {n: line for n, line in self.notes[title].items() if n not in other.rows} | other.notes[title]
            for title in SECTIONS
        }
        return replace(self, rows={**self.rows, **other.rows}, notes=notes)

    def text(self) -> str:
        found = [match for line in self.rows.values() if (match := ROW.match(line))]
        count = Counter(m[2] for m in found)
        worst = max((float(m[3]) for m in found if m[2] == "verified"), default=0.0)
        lines = [
            "# The zoo",
            "",
            "Generated by `make zoo` (`python -m tests.harness.sweep`); do not edit.",
            '`make zoo ARGS="--merge recbole"` renews the rows of a part.',
            "",
            f"Models of public libraries, unmodified, on {RANKS} ranks in float64: `des.verify` with the compiler's",
            f"own choice and with every form forced ({', '.join(FORMS)}),",
            "on uneven batches, one empty, with repeated rows: outputs, every gradient, every weight after 3 steps,",
            "and predicted against sent bytes. Those of rectools, torch-geometric, transformers and",
            "higher are trained in the library's own loop with its own loss, too (`tests/test_zoo.py`).",
            "",
            f"{len(self.rows)} models: {count['verified']} verified, {count['refused']} refused by name, "
            f"{count['random']} random, {count['original fails']} whose original fails on other batches, "
            f"{count['failed']} failed. Worst relative error: {worst:.1e}.",
            "",
            "Splits, aggregation and bytes (per rank and step, float32) are of the plan for tables of",
            f"{LARGE_ROWS:,} rows and {BATCH:,} rows a rank; beside it data parallel with dense and with sparse",
            "gradients. Compile time is that of the small model, both ranks at once on a shared 2-core machine.",
            "",
            "| " + " | ".join(COLUMNS) + " |",
            "|" + "---|" * len(COLUMNS),
            *self.rows.values(),
        ]
        for title, words in SECTIONS.items():
            if self.notes[title]:
                lines += ["", f"## {title}", "", *words, *([""] if words else []), *self.notes[title].values()]
        lines += ["", "## Left out", "", *(f"- `{n}`: {why}" for n, why in sorted(LEFT_OUT.items())), "", *IN_LOOPS]
        if self.blocked:
            lines += ["", f"## {BLOCKED}", "", *BLOCKED_WORDS, *self.blocked]
        return "\n".join(lines) + "\n"


def _row(f: Finding) -> str:
    sizes = [("" if n is None else f"{n:,}") for n in (f.bytes_sent, f.dense_bytes, f.sparse_bytes)]
    error = f"{f.worst:.1e}" if f.status == "verified" else ""
    cells = [f.rung, str(f.tables), f.splits, f.aggregation, *sizes, f"{f.compile_s:.1f}"]
    return f"| `{f.name}` | {f.status} | {error} | " + " | ".join(cells) + " |"


def _named(pattern: re.Pattern[str], text: str) -> dict[str, str]:
    return {match[1]: line for line in text.splitlines() if (match := pattern.match(line))}
