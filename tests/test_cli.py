"""The command line, through its own parser, and once as a process of its own."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from descompiler import units
from descompiler.cli.app import app, plan_app
from descompiler.errors import InputError
from descompiler.planning.cluster import Cluster

DOCS = Path(__file__).parents[1] / "docs" / "cli.md"

MODEL = """
import torch
from neighbour import FIELDS

class Tiny(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.tables = torch.nn.ModuleList(torch.nn.Embedding(rows, 4) for rows in FIELDS)
        self.out = torch.nn.Linear(4 * len(FIELDS), 1)

    def forward(self, ids):
        return self.out(torch.cat([t(ids[:, f]) for f, t in enumerate(self.tables)], 1)).squeeze(1)

def tiny():
    return Tiny(), (torch.arange(12).reshape(4, 3) % 7,)

def large():
    with torch.device("meta"):
        model = Tiny()
    return model, (torch.zeros(4, 3, dtype=torch.int64),)

def fails():
    return 1 / 0

def half():
    return Tiny()

def numbers():
    return 1, 2
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("user")
    (folder / "neighbour.py").write_text("FIELDS = (500, 7, 1000)\n")
    path = folder / "mine.py"
    path.write_text(MODEL)
    return str(path)


def run(*arguments, status=0):
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == status, f"{result.output}\n{result.exception!r}"
    return result


# --- parsers


@pytest.mark.parametrize(
    ("parse", "text"),
    [
        (units.parse_bandwidth, "25"),
        (units.parse_bandwidth, "25Gbyte"),
        (units.parse_bandwidth, "0Gbit"),
        (units.parse_bandwidth, "fast"),
        (units.parse_time, "20"),
        (units.parse_time, "20 parsecs"),
        (units.parse_size, "16Gbit"),
        (units.parse_size, "-1GB"),
        (units.parse_counts, "2:"),
        (units.parse_counts, "8:2"),
        (units.parse_counts, "0"),
        (units.parse_counts, "two"),
    ],
)
def test_parsers_say_what_is_wrong_and_what_to_give(parse, text):
    with pytest.raises(InputError, match=re.escape(repr(text))):
        parse(text)


def test_bits_and_bytes_differ_by_eight():
    assert units.parse_bandwidth("8Gbit") == units.parse_bandwidth("1GB/s") == units.parse_bandwidth("8 Gbps")


# --- cost


def test_cost_in_json_adds_up(file):
    data = json.loads(run("cost", f"{file}:tiny", "--ranks", "4", "--batch", "64", "--json").stdout)
    by_title = {s["title"].partition(":")[0]: s for s in data["sheets"]}
    operators = by_title["operators and the forms that they can take"]
    chosen = [r for n, r in enumerate(operators["rows"]) if n in operators["chosen"]]
    sent = by_title["what the busiest rank sends in a step, by collective"]["rows"]
    assert sent[-1]["collective"] == "total"
    assert sum(r["sent"] for r in sent[:-1]) == pytest.approx(sent[-1]["sent"])
    assert {r["busiest rank"] for r in chosen} == {sent[-1]["sent"]}
    assert all(r["busiest rank"] >= sent[-1]["sent"] for r in operators["rows"] if r["busiest rank"] is not None)
    strategies = {r["strategy"]: r["sent"] for r in by_title["strategies"]["rows"]}
    # tables of 1,507 rows of 4, and a Linear of 12 + 1, all-reduced
    assert strategies["data parallel, dense gradients"] == 2 * 3 / 4 * 4 * (1507 * 4 + 13)


def test_cost_needs_no_weights(file):
    assert "this plan" in run("cost", f"{file}:large", "--ranks", "2").stdout


def test_sweep_over_ranks_and_batch_with_a_cluster(file):
    arguments = ("--ranks", "2:8", "--batch", "32,64", "--bandwidth", "25Gbit", "--latency", "20us", "--json")
    strategies, chosen = json.loads(run("cost", f"{file}:tiny", *arguments).stdout)["sheets"]
    assert [r["at"] for r in chosen["rows"]] == [f"{n} ranks, {b} rows" for b in (32, 64) for n in (2, 4, 8)]
    mine = strategies["rows"][0]
    assert mine["strategy"] == "this plan"
    assert [r["sent"] for r in chosen["rows"]] == [mine[r["at"]] for r in chosen["rows"]]
    # more ranks, more latency: every collective takes at least one message of 20 us
    assert all(r["communication"] > 20e-6 for r in chosen["rows"])


@pytest.mark.parametrize(("option", "start"), [("--markdown", "**operators"), ("--latex", "\\begin{table}")])
def test_other_formats(file, option, start):
    out = run("cost", f"{file}:tiny", "--pin", "tables.*=row_wise", option).stdout
    assert out.startswith(start)
    assert "tables.*.weight" in out.replace("\\", "")


def test_pins_are_followed_and_impossible_ones_are_one_line(file):
    data = json.loads(run("cost", f"{file}:tiny", "--pin", "tables.0.weight=row_wise", "--json").stdout)
    forms = [r["form"] for n, r in enumerate(data["sheets"][0]["rows"]) if n in data["sheets"][0]["chosen"]]
    assert "row_wise" in forms
    result = run("cost", f"{file}:tiny", "--pin", "tables.9.weight=row_wise", status=1)
    assert result.stderr.startswith("error: ") and "tables.9.weight" in result.stderr
    assert len(result.stderr.splitlines()) == 1


# --- explain, verify


def test_explain_one_operator(file):
    out = run("explain", f"{file}:tiny", "tables.2.weight", "--ranks", "4").stdout
    for form in ("replicate", "table_wise", "row_wise", "column_wise"):
        assert form in out
    assert "tables.2.weight" in run("explain", f"{file}:tiny").stdout
    assert "tables.0.weight" in run("explain", f"{file}:tiny", "nothing", status=1).stderr


def test_verify_a_file(file):
    out = run("verify", f"{file}:tiny", "--steps", "1").stdout
    assert "1 cases on 2 ranks" in out


# --- plan files


def test_plan_write_show_diff(file, tmp_path):
    on = ("--ranks", "4", "--cluster", "ethernet-25g")
    first, second = str(tmp_path / "a.json"), str(tmp_path / "b.json")
    assert "wrote" in run("plan", "write", f"{file}:large", *on, "--out", first).stdout
    run(
        "plan",
        "write",
        f"{file}:large",
        "--ranks",
        "4",
        "--forbid",
        "*=column_wise",
        "--pin",
        "*.1.weight=row_wise",
        "-o",
        second,
    )
    shown = json.loads(run("plan", "show", first, "--cluster", "ethernet-25g", "--json").stdout)
    priced = json.loads(run("cost", f"{file}:large", *on, "--json").stdout)
    for a, b in zip(shown["sheets"][1:], priced["sheets"][1:], strict=True):
        assert a == b
    out = run("plan", "diff", first, second).stdout
    assert "tables.1.weight" in out and "row_wise" in out
    assert "equal" in run("plan", "diff", first, first).stdout
    assert "no plan in" in run("plan", "show", str(tmp_path / "c.json"), status=1).stderr


# --- under torchrun


def test_calibrate_alone_says_how(tmp_path):
    result = run("calibrate", "--out", str(tmp_path / "c.json"), status=1)
    assert "torchrun" in result.stderr and len(result.stderr.splitlines()) == 1


@pytest.mark.slow
def test_calibrate_then_audit_on_two_ranks(file, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    cluster = str(tmp_path / "c.json")
    for arguments in (
        ["calibrate", "--out", cluster, "--repeats", "3", "--sizes", "1kB,64kB"],
        ["audit", f"{file}:tiny", "--steps", "2", "--cluster", cluster],
    ):
        done = subprocess.run(
            [*torchrun, "descompiler", *arguments, "--json"], capture_output=True, text=True, timeout=200
        )
        assert done.returncode == 0, done.stderr
        (sheet,) = json.loads(done.stdout)["sheets"]  # one rank prints
        assert sheet["rows"]
    assert "predicted exactly" in sheet["notes"][0]
    assert sheet["rows"][-1]["measured time"] > 0
    where = json.loads(run("cost", f"{file}:tiny", "--ranks", "2", "--cluster", cluster, "--json").stdout)
    (strategies,) = (s for s in where["sheets"] if s["title"].startswith("strategies"))
    assert strategies["rows"][0]["communication"] > 0


# --- help

EXAMPLES = [
    line.strip()
    for command in (*app.registered_commands, *plan_app.registered_commands)
    for line in (command.callback.__doc__ or "").splitlines()
    if line.strip().startswith(("descompiler ", "torchrun "))
]
PLANS = [e for e in EXAMPLES if re.search(r" (cost|explain|plan write) (lr|fm)", e)]
QUICK = [e for e in PLANS if "64" not in e]
SLOW = [e for e in EXAMPLES if e not in QUICK and "train.py" not in e and "torchrun" not in e]


def test_every_command_has_an_example():
    names = {c.name or c.callback.__name__ for c in app.registered_commands} | {"plan"}
    shown = {re.search(r"descompiler (\w+)", e)[1] for e in EXAMPLES}
    assert shown == names - {"version"}
    help_text = run("--help").stdout
    assert all(name in help_text for name in names)
    assert "descompiler cost lr" in run("cost", "--help").stdout


@pytest.mark.parametrize("example", QUICK)
def test_examples_of_the_help_run(example, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "cluster.json" in example:
        Cluster.builtin("ethernet-25g", 4).save("cluster.json")
    assert run(*shlex.split(example)[1:]).stdout


@pytest.mark.slow
@pytest.mark.parametrize("example", SLOW)
def test_the_other_examples_of_the_help_run(example, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for file in ("fm-64.json", "fm-64-edited.json"):
        if file in example and "write" not in example:
            run("plan", "write", "lr", "--ranks", "4", "--out", file)
    assert run(*shlex.split(example)[1:]).stdout


@pytest.mark.slow
@pytest.mark.parametrize("command", ["cost", "explain"])
def test_samples_of_the_docs_are_what_commands_print(command, request):
    """``pytest -m "" --update-golden`` writes them anew; read the difference before committing it."""
    text = DOCS.read_text()
    # the line with the command, whatever is said of it, and what follows it up to the next heading
    found = re.search(rf"^`descompiler ({command} [^`]*)`[^\n]*\n\n(.*?)(?=\n\n## )", text, re.M | re.S)
    printed = run(*shlex.split(found[1])).stdout.strip()
    if found[2].startswith("```text"):
        printed = "```text\n" + "\n".join(line.rstrip() for line in printed.splitlines()) + "\n```"
    if request.config.getoption("--update-golden"):
        DOCS.write_text(text[: found.start(2)] + printed + text[found.end(2) :])
    assert found[2] == printed


def test_memory_limits_are_followed_or_say_what_is_missing(file):
    arguments = ("cost", f"{file}:tiny", "--ranks", "4", "--memory")
    data = json.loads(run(*arguments, "1GB", "--optimizer", "adam", "--json").stdout)
    (sheet,) = (s for s in data["sheets"] if s["title"] == "memory per rank")
    assert "adam" in sheet["notes"][0] and "1.00 GB" in sheet["notes"][0]
    for row in sheet["rows"]:
        assert row["total"] == sum(row[x] for x in ("weights", "gradients", "optimiser state", "activations")) < 1e9
    assert "no plan fits 1,000 B a rank" in run(*arguments, "1kB", status=1).stderr


# --- errors


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("cost", "nothing.py:model"), "no such file"),
        (("cost", "deepfmm"), "FILE.py:factory"),
        (("cost", "no.such.package:model"), "can't import"),
        (("cost", "lr", "--ranks", "none"), "'none' is no number of ranks"),
        (("cost", "lr", "--bandwidth", "25"), "25Gbit"),
        (("cost", "lr", "--latency", "20us"), "--latency needs --bandwidth"),
        (("cost", "lr", "--cluster", "mine.json"), "ethernet-25g"),
        (("cost", "lr", "--cluster", "ethernet-25g", "--bandwidth", "1Gbit"), "not both"),
        (("cost", "lr", "--pin", "row_wise"), "TABLE=FORM"),
        (("nothing",), "No such command"),
    ],
)
def test_wrong_usage_is_status_2(arguments, text):
    result = run(*arguments, status=2)
    plain = " ".join(re.sub(r"[│╭╮╰╯─]", " ", result.stderr).split())
    assert text in plain


@pytest.mark.parametrize(
    ("factory", "text"),
    [
        ("fails", r"ZeroDivisionError: division by zero \(.*mine\.py:\d+\)"),
        ("half", "must return"),
        ("numbers", "the first is a int"),
    ],
)
def test_a_broken_factory_is_one_line_and_status_1(file, factory, text):
    result = run("cost", f"{file}:{factory}", status=1)
    assert re.search(text, result.stderr) and len(result.stderr.splitlines()) == 1


def test_as_a_process(file):
    command = [sys.executable, "-m", "descompiler", "cost", f"{file}:tiny", "--ranks", "2", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["model"] == f"{file}:tiny"
    assert done.stderr == ""  # progress is for terminals


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["cost", "lr", "--ranks", "1000000000"], "at most 262,144 ranks"),
        (["cost", "lr", "--ranks", "2:1000000000"], "at most 262,144 ranks"),
        (["cost", "lr", "--batch", "1" + "0" * 21], "at most 4,294,967,296 rows"),
        (["explain", "lr", "--ranks", "1000000000"], "262144"),
    ],
)
def test_counts_without_an_end_are_wrong_usage(arguments, says):
    result = run(*arguments, status=2)
    assert says in " ".join(re.sub(r"[│╭╮╰╯─]", " ", result.output).split())


@pytest.mark.long
def test_a_file_that_cannot_be_written(file, tmp_path):
    tiny = f"{file}:tiny"
    for arguments in (["plan", "write", tiny, "--ranks", "2", "--out"], ["report", tiny, "--ranks", "2", "--html"]):
        result = run(*arguments, str(tmp_path / "none" / "x"), status=1)
        assert result.stderr.startswith("error: ") and "No such file" in result.stderr
