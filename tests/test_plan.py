"""Plans: files, edits, pins, fingerprints, and what is refused."""

import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import descompiler as des
from descompiler.layout.fetches import Fetch
from descompiler.passes import FORMS
from descompiler.passes.forms.row_wise import RowWise
from descompiler.tables import aliases
from examples.models import MODELS, make_inputs
from tests.harness.models import IDS, Recommender, Recurrent, batch_of

INPUTS = make_inputs("deepfm", "fields", 8)


def make(**options):
    return MODELS["deepfm"]("fields", **options)


class InPart(Recommender):
    """Its loss is captured in part: ids go through lists."""

    def calculate_loss(self, batch):
        return super().calculate_loss({**batch, "ids": torch.tensor(batch["ids"].tolist())})


class EveryForm(nn.Module):
    """A table for each form; the last is also used whole."""

    def __init__(self):
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(30 + n, 4, sparse=n == 1) for n in range(8))

    def forward(self, ids):
        found = torch.cat([table(ids[:, n]) for n, table in enumerate(self.tables)], 1)
        return found.sum(1) + self.tables[7].weight.logsumexp(0).sum()


def test_a_plan_survives_a_file(tmp_path):
    plan = des.plan(
        make(), INPUTS, ranks=5, batch=64, pins={"*.2": "row_wise", "*.5": "column_wise", "*.0": "table_wise"}
    )
    plan.save(tmp_path / "plan.json")
    again = des.Plan.load(tmp_path / "plan.json")
    assert again == plan and again.to_json() == plan.to_json()
    assert [again.traffic(r) for r in range(5)] == [plan.traffic(r) for r in range(5)]
    assert not again.changes and not plan.diff(again)


def test_a_file_that_is_no_plan(tmp_path):
    for text in ("", "[]", '{"version": 2}', '{"version": 1}'):
        (tmp_path / "plan.json").write_text(text)
        with pytest.raises(des.PlanError, match=r"no plan file|version"):
            des.Plan.load(tmp_path / "plan.json")
    data = json.loads(des.plan(make(), INPUTS, ranks=2, batch=64).to_json())
    (tmp_path / "plan.json").write_text(json.dumps({**data, "version": data["version"] + 1}))
    with pytest.raises(des.PlanError, match=r"has version \d+, this is version \d+: plan again"):
        des.Plan.load(tmp_path / "plan.json")
    with pytest.raises(des.PlanError, match="no plan in"):
        des.Plan.load(tmp_path / "none.json")


def test_editing_prices_anew_and_leaves_the_other_tables():
    plan = des.plan(make(), INPUTS, ranks=4, batch=64)
    table = plan.tables[2].name
    other = "row_wise" if plan.forms[table] != "row_wise" else "column_wise"
    edited = plan.edit({table: other})
    assert edited.forms == {**plan.forms, table: other}
    assert edited.price_bytes == plan.price_bytes or "busiest rank" in plan.diff(edited)
    assert f"{table}: {plan.splits[table]} -> {edited.splits[table]}" in plan.diff(edited)


def _compile_edited(rank, ranks, path):
    module = des.compile(make(), INPUTS, plan=path)
    module(*INPUTS).sum().backward()
    return module.plan.forms, module.plan.traffic(rank, 8, unique=module.unique()) == module.traffic(), module.plan.rows


def test_a_form_edited_in_the_file_is_compiled_and_priced(on_ranks, tmp_path):
    plan = des.plan(make(), INPUTS, ranks=2, batch=64)
    data = json.loads(plan.to_json())
    name = plan.tables[0].name
    data["forms"][name] = "column_wise" if plan.forms[name] != "column_wise" else "row_wise"
    (tmp_path / "plan.json").write_text(json.dumps(data))
    for forms, as_predicted, rows in on_ranks(_compile_edited, 2, str(tmp_path / "plan.json")):
        assert forms == data["forms"] and as_predicted and rows == 64


def test_names_of_forms_and_tables():
    plan = des.plan(make(), INPUTS, ranks=2, pins={"*": "rows", "embeddings.tables.0": "table", "tables.5": "columns"})
    first = {t.name: plan.forms[t.name] for t in plan.tables}
    assert first["embeddings.tables.0.weight"] == "table_wise" and first["embeddings.tables.5.weight"] == "column_wise"
    assert first["embeddings.tables.1.weight"] == "row_wise"


def test_names_that_forms_had_are_understood_with_a_note():
    """Once for each name in a process."""
    aliases._note.cache_clear()
    with pytest.warns(UserWarning, match=r"the form 'pull' is named 'unique_rows' now") as notes:
        for _ in range(2):
            plan = des.plan(make(), INPUTS, ranks=2, pins={"*": "pull"}, forbid={"*": ["row"]})
    assert set(plan.forms.values()) == {"unique_rows"} and len(notes) == 2
    with pytest.raises(des.PlanError, match=r"is named 'row', which means the form 'row_wise'; rename it"):
        FORMS.add(RowWise("row"), "theirs")


def test_a_file_with_the_names_that_forms_had_is_the_same_plan():
    """Written by a version in which forms were called field, row, column, pull, gather and hot."""
    file = Path(__file__).parent / "plans" / "version_2_names.json"
    aliases._note.cache_clear()
    with pytest.warns(UserWarning, match="is named") as notes:
        loaded = des.Plan.load(file)
    assert len(notes) == 6 and not loaded.changes
    names = ["hot_rows", "sparse_all_gather", "table_wise", "row_wise", "column_wise"]
    names += ["unique_rows", "hot_rows", "fsdp"]
    ids = torch.arange(48).reshape(6, 8) % 30
    pins = {f"tables.{n}": form for n, form in enumerate(names) if n}
    later = [form.name for form in FORMS if form.name not in ("replicate", *names)]
    terms = {"ranks": 3, "batch": 32, "samples": [(ids,)], "memory_bytes": 19_700, "forbid": {"*": later}}
    terms["cluster"] = "bytes"
    plan = des.plan(EveryForm(), (ids,), pins=pins, **terms)
    assert [plan.forms[f"tables.{n}.weight"] for n in range(8)] == names

    def data(x: des.Plan) -> dict:
        """Without the user's lines, reasons, which say names of forms, and refusals of forms that came later.

        Ids are cheaper than they were then: without prices, and which rows are hot by them.
        """
        found = json.loads(re.sub(r'[^\s"(]*\.py:\d+', "model.py:1", x.to_json()))
        for priced in ("price", "bound", "price_bytes", "prices", "missing", "memories"):
            found.pop(priced)
        for held in ("splits", "pieces"):
            found[held] = {n: p for n, p in found[held].items() if x.forms.get(n) != "hot_rows"}
        found["layout"]["transfers"] = [t for t in found["layout"]["transfers"] if t["is"] != "Fetch"]
        return {**found, "tables": [{**t, "refusals": sorted({*t["refusals"]} - {*later})} for t in found["tables"]]}

    one, other = data(loaded), data(plan)
    assert one.pop("unique") == pytest.approx(other.pop("unique"))  # processors round differently
    assert one == other
    for r in range(3):
        mine, its = (p.traffic(r).calls_by_collective for p in (plan, loaded))
        assert its == {**mine, Fetch.SUM_SHARED: 1}  # no row is hot any more
    assert set(loaded.explain().split()) >= {"hot_rows:", "unique_rows:", "sparse_all_gather:", "table_wise:"}
    again = des.plan(EveryForm(), (ids,), plan=loaded, **{**terms, "ranks": None})
    assert again.forms == loaded.forms and again.pieces == plan.pieces


def test_a_file_with_the_name_that_the_header_had_is_the_same_plan():
    plan = des.plan(make(), INPUTS, ranks=2)
    assert des.Plan.from_json(plan.to_json().replace('"StepHeader"', '"Header"')) == des.Plan.from_json(plan.to_json())


def test_forbidden_forms():
    plan = des.plan(make(), INPUTS, ranks=2, forbid={"*": ["replicate"]})
    assert "replicate" not in plan.forms.values()
    with pytest.raises(des.PlanError, match=r"embeddings.tables.0.weight.*left without a form"):
        des.plan(make(), INPUTS, ranks=2, forbid={"embeddings.tables.0": [f.name for f in FORMS]})


@pytest.mark.parametrize("pins", [{"nobody": "row_wise"}, {"*": "diagonal"}])
def test_pins_that_name_nothing(pins):
    with pytest.raises(des.PlanError, match=r"no table of the model|no form 'diagonal'"):
        des.plan(make(), INPUTS, ranks=2, pins=pins)


def printed(model, inputs, ranks=2):
    """The fingerprint, without a search for the best plan."""
    return des.plan(model, inputs, ranks=ranks, pins={"*": "replicate"}).fingerprint


def test_a_fingerprint_is_the_models_alone():
    """Neither the training flags nor the batch size nor what batch norms have counted."""
    options = {"batch_norm": True, "dropout": 0.3}
    model = make(**options)
    prints = {printed(make(**options), make_inputs("deepfm", "fields", n)) for n in (1, 70)}
    prints.add(printed(make(**options).eval(), INPUTS, ranks=3))
    model(*INPUTS)
    prints.add(printed(model, INPUTS))
    assert len(prints) == 1
    assert printed(make(**options, dim=5), INPUTS) not in prints
    assert printed(make(batch_norm=False), INPUTS) not in prints
    recurrent = Recurrent()
    trained = printed(recurrent, (IDS,))
    assert printed(recurrent.eval(), (IDS,)) == trained


def test_offsets_count_in_a_fingerprint():
    a, b = (MODELS["fm"]("offsets", vocab_sizes=v) for v in ([3, 5, 4], [5, 3, 4]))
    ids = torch.zeros(4, 3, dtype=torch.int64)
    inputs = (torch.randn(4, 3), ids)
    assert des.plan(a, inputs, ranks=2).fingerprint != des.plan(b, inputs, ranks=2).fingerprint


def test_a_plan_of_another_model_is_refused_by_name():
    plan = des.plan(make(), INPUTS, ranks=1)
    with pytest.raises(des.PlanError, match=r"another model.*embeddings.tables.0.weight.*\[17, 4\].*\[17, 5\]"):
        des.compile(make(dim=5), INPUTS, plan=plan)
    with pytest.raises(des.PlanError, match=r"tables.0.weight' has 4 bytes an element in the plan, 8 in"):
        des.compile(make().double(), tuple(x.double() if x.is_floating_point() else x for x in INPUTS), plan=plan)


@pytest.mark.parametrize("cls", [Recommender, InPart])
def test_the_plan_of_a_method(cls):
    batch = (batch_of(slice(0, 8)),)
    plan = des.plan(cls().double(), batch, ranks=1, method="calculate_loss")
    model = des.compile(cls().double(), batch, plan=plan, method="calculate_loss", in_place=True)
    assert des.module_of(model).coverage().rung == ("partial" if cls is InPart else "export")
    with pytest.raises(des.PlanError, match="another model"):
        des.compile(Recommender().double(), batch, plan=plan)


def test_forms_in_place_of_a_plan_are_told_where_they_go():
    with pytest.raises(des.PlanError, match=r"'row_wise'.*given as pins= here"):
        des.plan(nn.Embedding(5, 2), (torch.arange(4),), ranks=2, plan={"*": "row_wise"})
