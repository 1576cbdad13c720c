"""Files of plans and clusters that were edited, broken or made up: refused by name, or followed exactly."""

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import descompiler as des
from descompiler.captured import Captured
from descompiler.cost_models.table import Table
from descompiler.eager.planning import asked_in_part
from descompiler.eager.survey import survey
from descompiler.layout.pieces import Pieces
from descompiler.model.probe import CALL
from descompiler.passes import FORMS
from descompiler.passes.forms.hot_rows import hot_ranges
from descompiler.tables.form import Choice, split_as
from descompiler.tables.made import made_by_its_form
from descompiler.tables.tables import Operator
from examples.models import MODELS, make_inputs

IDS = torch.arange(24).reshape(8, 3) % 12
ODD: tuple[Any, ...] = (None, True, -1, 0, 1, 3, 2.5, 10**12, 10**30, float("nan"), float("inf"), "", "x", [], {}, [[]])


class Four(nn.Module):
    """Tables of four forms, a batch norm, a product with a table, and a weight that follows a table."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(12 + n, 4, sparse=n == 1) for n in range(4))
        self.norm, self.head = nn.BatchNorm1d(12), nn.Linear(12, 3)
        self.items, self.bias = nn.Embedding(12, 3), nn.Parameter(torch.zeros(12))

    def forward(self, ids):
        found = [table(ids[:, n % 3]) for n, table in enumerate(self.tables)]
        x = self.head(self.norm(torch.cat(found[:3], 1))) + found[3].sum(1, keepdim=True) + self.items(ids[:, 0])
        return x @ self.items.weight.T + self.bias


PINS = {"tables.0": "row_wise", "tables.1": "unique_rows", "tables.2": "column_wise", "items": "row_wise"}


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Plan files: of every kind of transfer, of an older version, and for a cluster."""
    old = (Path(__file__).parent / "plans" / "version_2_names.json").read_text()
    where = des.Cluster.builtin("ethernet-25g", 2)
    priced = des.plan(MODELS["fm"]("fields"), make_inputs("fm", "fields", 8), ranks=2, cluster=where)
    return [des.plan(Four(), (IDS,), ranks=3, pins=PINS).to_json(), priced.to_json(), old]


def mutated(text: str, draws: random.Random) -> str:
    """The text of a file in which one place is another."""
    if draws.random() < 0.2:
        at = draws.randrange(len(text))
        return text[:at] + draws.choice(["", "[", "}", '"', "9", "-", ",", text[at:], "[" * 3000]) + text[at + 1 :]
    data = json.loads(text)
    x: Any = data
    while True:
        keys = list(x) if isinstance(x, dict) else list(range(len(x)))
        key = draws.choice(keys)
        if not isinstance(x[key], dict | list) or not x[key] or draws.random() < 0.1:
            break
        x = x[key]
    match draws.randrange(4):
        case 0:
            del x[key]
        case 1 if isinstance(x[key], int):
            x[key] += draws.choice([-1, 1])
        case 2:
            x[key] = x[draws.choice(keys)]
        case _:
            x[key] = draws.choice(ODD)
    return json.dumps(data)


def _try_plans(texts: list[str], draws: random.Random, times: int) -> tuple[int, int]:
    """How many mutations were read, and refused; what is read can be explained, written and priced."""
    read = refused = 0
    for _ in range(times):
        text = mutated(draws.choice(texts), draws)
        try:
            plan = des.Plan.from_json(text)
        except des.PlanError as error:
            refused += 1
            assert len(str(error)) < 2000
            continue
        read += 1
        assert des.Plan.from_json(plan.to_json()) == plan
        assert plan.traffic(0).total >= 0
        try:
            assert plan.explain()
        except des.PlanError as error:  # of a form that this process may yet be given
            assert "one from outside has to be installed" in str(error)
    return read, refused


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:descompiler. the form")
def test_mutated_plans_are_refused_or_whole(texts, draws):
    read, refused = _try_plans(texts, draws, 50)
    assert refused > read


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:descompiler. the form")
def test_thousands_of_mutated_plans(texts, draws):
    _try_plans(texts, draws, 4000)


def edited(text: str, change: Any) -> str:
    data = json.loads(text)
    change(data)
    return json.dumps(data)


def _other_rows(data: dict) -> None:
    """Of a table, consistently: a rank's range begins elsewhere, and goes to the wrong one."""
    turned = {"runs": [[6, 1, 1], [3, 0, 1], [3, 2, 1]]}
    for x in (data["splits"]["tables.0.weight"]["pieces"], data["pieces"]["tables.0.weight"]):
        x["division"] = turned


def _one_piece(data: dict) -> None:
    data["pieces"]["tables.0.weight"]["division"] = {"runs": [[12, 1, 1]]}


def _cut_weight(data: dict) -> None:
    data["pieces"]["norm.weight"]["division"] = {"runs": [[4, 0, 3]]}


def _whole_bias(data: dict) -> None:
    data["pieces"]["bias"]["division"] = {"runs": [[12, -1, 1]]}


def _another_form(data: dict) -> None:
    data["splits"]["tables.0.weight"]["form"] = data["forms"]["tables.0.weight"] = "fsdp"


def _gathered(data: dict) -> None:
    data["splits"]["tables.3.weight"]["gathered"] ^= True


def _nothing_sent(data: dict) -> None:
    data["layout"]["transfers"], data["crossings"] = [{"is": "StepHeader"}], []


def _wider(data: dict) -> None:
    (exits,) = (t["exits"] for t in data["layout"]["transfers"] if t["is"] == "ValuesOut")
    exits[0]["tails"][0][2][-1] += 1


def _another_shape(data: dict) -> None:
    data["pieces"]["head.bias"] |= {"shape": [4], "division": {"runs": [[4, -1, 1]]}}


def _no_piece(data: dict) -> None:
    del data["pieces"]["head.bias"]


def _ranks(number: Any) -> Any:
    def change(data: dict) -> None:
        data["ranks"] = number

    return change


def _endless(data: dict) -> None:
    data["unique"]["tables.1.weight"] = math.inf


def _long_objective(data: dict) -> None:
    data["objective"] = "bytes" * 1000


EDITS = {
    "rows of another rank": _other_rows,
    "pieces that are not the split's": _one_piece,
    "a weight cut": _cut_weight,
    "a bias whole": _whole_bias,
    "another form": _another_form,
    "gathered": _gathered,
    "nothing sent": _nothing_sent,
    "wider": _wider,
    "another shape": _another_shape,
    "no piece": _no_piece,
    "ranks of 2.5": _ranks(2.5),
    "many ranks": _ranks(10**12),
    "no end of unique ids": _endless,
    "an objective of thousands of letters": _long_objective,
}


def test_edits_beside_the_forms_are_refused(texts):
    build = Captured.of(Four(), (IDS,)).build
    build.follow(des.Plan.from_json(texts[0]))
    for change in EDITS.values():
        with pytest.raises(des.PlanError, match=r"plan again|no plan file") as caught:
            build.follow(des.Plan.from_json(edited(texts[0], change)))
        assert len(str(caught.value)) < 2000


def test_all_ranks_refuse_an_edited_plan(texts, on_ranks):
    text = edited(texts[0], EDITS["rows of another rank"])
    assert all("that form 'row_wise' makes" in error for error in on_ranks(_error, 3, text))


def test_edits_are_refused_where_the_users_forward_runs():
    text = des.plan(InPart(), (IDS,), ranks=2, pins={"large": "unique_rows"}).to_json()
    model = InPart()
    seen = survey(model, (IDS,), CALL)

    def turned(data: dict) -> None:
        for x in (data["splits"]["large.weight"]["pieces"], data["pieces"]["large.weight"]):
            x["division"] = {"runs": [[1000, 1, 1], [1000, 0, 1]]}

    def cut(data: dict) -> None:
        data["pieces"]["head.weight"]["division"] = {"runs": [[1, 0, 1]]}

    def columns(data: dict) -> None:
        for x in (data["splits"]["large.weight"]["pieces"], data["pieces"]["large.weight"]):
            x |= {"dim": 1, "division": {"runs": [[4, 0, 2]]}}

    plan = des.Plan.from_json(text)
    asked = asked_in_part(model, seen, 2)
    assert asked.read(plan, 2) is plan
    asked.check(plan)
    for change in (turned, cut, columns):
        with pytest.raises(des.PlanError, match=r"the plan's pieces of .* are none that its form makes"):
            asked.check(des.Plan.from_json(edited(text, change)))


class InPart(nn.Module):
    """Captured in part: ids go through lists."""

    def __init__(self) -> None:
        super().__init__()
        self.large, self.head = nn.Embedding(2000, 8), nn.Linear(8, 1)

    def forward(self, ids):
        return self.head(self.large(torch.tensor(ids.tolist())).sum(1))


def _error(rank: int, ranks: int, text: str) -> str:
    """With which a plan's file is refused; empty if it is not."""
    try:
        des.compile(Four(), (IDS,), plan=des.Plan.from_json(text))
    except des.PlanError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("training", [True, False])
def test_a_plan_is_followed_in_any_training_flags(training, texts, on_ranks, tmp_path):
    (tmp_path / "plan.json").write_text(texts[0])
    assert all(on_ranks(_followed, 3, str(tmp_path / "plan.json"), training))


def _followed(rank: int, ranks: int, path: str, training: bool) -> bool:
    module = des.compile(Four().train(training), (IDS,), plan=path)
    return module.plan == des.Plan.load(path)


def test_a_table_of_any_size_takes_no_memory(texts):
    """One that is said to be large in all places."""
    text = texts[0].replace('"rows": 12,', '"rows": 1000000000000,')
    with pytest.raises(des.PlanError, match="has 1,000,000,000,000 rows"):
        des.Plan.from_json(text)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"[" * 100_000, b'{"version": 4, "x": ' + b"[" * 9000, b"null", b"1"])
def test_files_that_are_no_files_of_ours(content, tmp_path):
    (tmp_path / "x.json").write_bytes(content)
    for kind in (des.Plan, des.Cluster):
        with pytest.raises(des.PlanError, match=r"no (plan|cluster)"):
            kind.load(tmp_path / "x.json")
        for missing in (tmp_path, tmp_path / "none.json", "a\0b"):
            with pytest.raises(des.PlanError, match=r"no (plan|cluster) in"):
                kind.load(missing)


def test_mutated_clusters_are_refused_or_whole(draws):
    text = des.Cluster.builtin("nvlink-h100", 16).to_json()
    for _ in range(300):
        try:
            cluster = des.Cluster.from_json(mutated(text, draws))
        except des.PlanError:
            continue
        assert des.Cluster.from_json(cluster.to_json()) == cluster
        assert cluster.seconds_of("all_to_all", 1e6) >= 0 and cluster.with_ranks(3).ranks == 3


def test_what_forms_make_is_recognised(draws):
    """Of any choice; the same ranges dealt out from the last rank to the first are made by none."""
    for _ in range(200):
        rows, ranks = draws.randint(1, 12), draws.randint(1, 5)
        cuts = sorted(draws.randint(0, rows) for _ in range(ranks - 1))
        sizes = tuple(b - a for a, b in zip([0, *cuts], [*cuts, rows], strict=True))
        some = np.array([row for row in range(rows) if draws.random() < 0.4], dtype=int)
        choice = Choice(draws.randrange(ranks), None, sizes, hot_ranges(some))
        o = Operator(Table("users", rows, draws.randint(1, 4)), ())
        for form in [f.name for f in FORMS]:
            split = split_as(o, form, ranks, choice)
            assert made_by_its_form(o, split), (form, choice)
            if len(split.pieces.owners) > 1 and not split.pieces.shared_size():
                turned = [(r.size, ranks - 1 - r.owner) for r in split.pieces.division]
                other = replace(split, pieces=Pieces.of(o.shape, split.pieces.dim, turned, ranks))
                assert not made_by_its_form(o, other), (form, choice)
