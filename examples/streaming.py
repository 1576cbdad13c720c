"""Train on an endless click stream whose ids come and go: dynamic tables beside hashed ids, in the same memory.

    torchrun --standalone --nproc-per-node 2 examples/streaming.py                # until Ctrl-C; goes on the next time
    torchrun --standalone --nproc-per-node 2 examples/streaming.py --steps 400 --anew
    python examples/streaming.py                                                  # one rank

Two models of ``contest.py`` are trained on the stream of ``clicks.py``, each compiled by `des.compile`. They differ in
their tables: one has `des.DynamicEmbedding`, the other ``nn.Embedding`` with the id modulo its rows, and as many bytes.
The folder gets a drawing, ``stream.svg``, and a checkpoint from which a run goes on exactly.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from clicks import Stream
from contest import BEST, DYNAMIC, HASHED, Contest, Record, hashed_rows, settings
from rich.console import Console
from rich.live import Live
from rich.text import Text
from train_ctr import Ranks

import descompiler as des
from descompiler.report import charts
from descompiler.units import format_bytes, format_count

LATEST = "latest.json"
"""The file of a folder that names its last whole checkpoint, and the options of its run."""


class GoOnError(Exception):
    """A run can't go on from what is in the folder."""


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--steps", type=int, help="stop when so many have been made, earlier runs' included")
    parser.add_argument("--folder", type=Path, default=Path("artefacts/stream"), help="of the checkpoint and drawing")
    parser.add_argument("--anew", action="store_true", help="begin again, whatever is in the folder")
    parser.add_argument("--batch", type=int, default=1024, help="rows of a global batch, over all ranks")
    parser.add_argument("--dim", type=int, default=16, help="width of an embedding")
    parser.add_argument("--lr", type=float, default=0.1, help="Adagrad's learning rate")
    parser.add_argument("--capacity", type=int, default=8192, help="rows of each dynamic table")
    parser.add_argument("--hashed-rows", type=int, help="rows of each hashed table; default: as many bytes")
    parser.add_argument("--form", help="how both tables are divided; default: as the planner chooses")
    parser.add_argument("--every", type=int, default=20, help="steps from report to report")
    parser.add_argument("--window", type=int, default=100, help="steps that AUC and log loss are of")
    parser.add_argument("--save-every", type=int, default=200, help="steps from checkpoint to checkpoint")
    parser.add_argument("--seed", type=int, default=0, help="of stream and weights")
    parser.add_argument("--smaller", type=int, default=1, help="so many times fewer users and items")
    args = parser.parse_args(given)
    for name in ("steps", "batch", "dim", "hashed_rows", "every", "window", "save_every", "smaller"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    for name in ("steps", "save_every"):
        if (getattr(args, name) or 0) % args.every:
            parser.error(f"--{name.replace('_', '-')} must be a multiple of --every {args.every}")
    return args


class Line:
    """One line of progress, written over in a terminal; elsewhere a line for each report."""

    def __init__(self, console: Console):
        self._console = console
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None

    def __enter__(self) -> Line:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, record: Record) -> None:
        """Show a report."""
        aucs = ", ".join(f"{record[f'{name} auc']:.4f} {name}" for name in (DYNAMIC, HASHED, BEST))
        text = (
            f"step {int(record['step']):,}: AUC {aucs}; {int(record['rows']):,} rows of {int(record['seen']):,} ids, "
            f"{format_bytes(record['dynamic bytes'])}; {format_bytes(record['dynamic sent'])} a step and rank"
        )
        if self._live is None:
            self._console.print(text, highlight=False, soft_wrap=True)
        else:
            self._live.update(Text(text, overflow="ellipsis", no_wrap=True), refresh=True)


class Stop:
    """Whether Ctrl-C or a SIGTERM has come: the run ends at the next report, with a checkpoint."""

    def __enter__(self) -> Stop:
        self._asked = False
        # torchrun passes them on, so a rank may get one twice
        self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __call__(self) -> bool:
        return self._asked

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True


def save(contest: Contest, ranks: Ranks, folder: Path) -> None:
    """Write a checkpoint; the one of before is the folder's until this one is whole. Collective."""
    name = f"step-{contest.done}"
    (folder / name).mkdir(parents=True, exist_ok=True)
    for of, contestant in contest.contestants.items():
        path = folder / name / of
        des.save(contestant.module, contestant.optimizer, path, step=contest.done, **contest.state())
    if ranks.rank == 0:
        written = folder / f"{LATEST}.new"
        written.write_text(json.dumps({"checkpoint": name, "settings": settings(contest.args)}))
        written.replace(folder / LATEST)
        for other in folder.glob("step-*"):
            if other.name != name:
                shutil.rmtree(other)


def begun(args: argparse.Namespace, ranks: Ranks) -> dict[str, Any] | None:
    """What the folder's last checkpoint is and which options its run has; None without. Collective.

    Raises
    ------
    GoOnError
        On every rank, if the options are others.
    """
    latest = args.folder / LATEST
    text = ranks.agree(latest.read_text() if ranks.rank == 0 and latest.exists() else None)
    if text is None:
        return None
    found: dict[str, Any] = json.loads(text)
    there, here = found["settings"], settings(args)
    here["hashed_rows"] = here["hashed_rows"] or there["hashed_rows"]  # their default is another for other ranks
    if other := [name for name in here if here[name] != there[name]]:
        said = ", ".join(f"--{name.replace('_', '-')} {there[name]}" for name in other)
        raise GoOnError(f"{args.folder} has a run with {said}: give the same, another --folder, or --anew")
    return found


def go_on(contest: Contest, path: Path) -> None:
    """Go on from a checkpoint, of any number of ranks. Collective."""
    for name, contestant in contest.contestants.items():
        values = des.load(contestant.module, contestant.optimizer, path / name)
    contest.go_on(values.pop("step"), values)


def draw(history: list[Record], window: int, path: Path) -> None:
    """Write what the history shows as a drawing."""
    steps = [r["step"] for r in history]

    def chart(lines: dict[str, str], say: Callable[[float], str], even: str) -> str:
        of = [charts.Line(text, tuple(r[n] for r in history), n.startswith(DYNAMIC)) for n, text in lines.items()]
        return charts.draw_lines("step", steps, of, format_x=format_count, format_y=say, even=even)

    def share(x: float) -> str:
        return f"{x:.3f}"

    kinds = {DYNAMIC: "dynamic tables", HASHED: "hashed ids", BEST: "the stream's own odds"}
    memory = {"dynamic bytes": "dynamic tables", "hashed bytes": "hashed tables", "process bytes": "processes"}
    drawn = {
        f"AUC of the last {window} steps, predicted before they were trained on": chart(
            {f"{name} auc": text for name, text in kinds.items()}, share, "xy"
        ),
        "log loss of the same": chart({f"{name} log loss": text for name, text in kinds.items()}, share, "xy"),
        "ids, by how many there are": chart({"seen": "seen so far", "rows": "with rows"}, format_count, "x"),
        "memory, of all ranks": chart(memory, format_bytes, "x"),
    }
    if history[-1]["pushed"]:
        sent = {"dynamic sent": "dynamic tables", "hashed sent": "hashed ids"}
        pushed = {"pushed": "each id pulled and pushed", "pushed unique": "each unique id so"}
        drawn["sent by a rank in a step"] = chart(sent | pushed, format_bytes, "xy")
    path.write_text(charts.standing_alone("a click stream", drawn), encoding="utf-8")


def run(args: argparse.Namespace, ranks: Ranks, console: Console, stop: Callable[[], bool]) -> list[Record]:
    """Train until a step or a stop; the history. Collective."""
    if args.anew and ranks.rank == 0:  # the others hear of it
        (args.folder / LATEST).unlink(missing_ok=True)
    found = begun(args, ranks)
    args.hashed_rows = found["settings"]["hashed_rows"] if found else args.hashed_rows or hashed_rows(args, ranks.size)
    contest = Contest(args, ranks, Stream(args.seed).smaller(args.smaller))
    if found:
        go_on(contest, args.folder / found["checkpoint"])
    saved, stopped = contest.done, False

    def keep() -> None:
        nonlocal saved
        save(contest, ranks, args.folder)
        if ranks.rank == 0 and len(contest.history) > 1:
            draw(contest.history, args.window, args.folder / "stream.svg")
        saved = contest.done

    with Line(console) as line:
        while not stopped and (args.steps is None or contest.done < args.steps):
            contest.step()
            if contest.done % args.every:
                continue
            stopped = contest.report(stop())
            line.show(contest.history[-1])
            if contest.done % args.save_every == 0:
                keep()
    if saved != contest.done:
        keep()
    return contest.history


def main() -> None:
    """Run on this rank."""
    args = arguments()
    warnings.filterwarnings("ignore", message="Sparse invariant checks")  # of Adagrad's steps on sparse gradients
    ranks = Ranks.start()
    console = Console(quiet=ranks.rank != 0)
    try:
        with Stop() as stop:
            run(args, ranks, console, stop)
    except GoOnError as error:
        console.print(f"error: {error}", markup=False, soft_wrap=True)  # on every rank
        sys.exit(1)
    finally:
        ranks.stop()


if __name__ == "__main__":
    main()
