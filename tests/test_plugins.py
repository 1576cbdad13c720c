"""Rules, forms, passes, baselines and clusters from outside: installed, or given to one call."""

import json
import os
import subprocess
import sys
import textwrap
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from torch import nn

import descompiler as des
from descompiler import plugins
from descompiler.captured import Captured
from descompiler.cost_models.baselines import BASELINES
from descompiler.graph.rewrite import Pass
from descompiler.passes import FORMS, RULES
from descompiler.passes.forms.column_wise import ColumnWise
from descompiler.passes.forms.table_wise import TableWise
from descompiler.planning import summary
from descompiler.planning.cluster import Cluster
from descompiler.plugins import Kit
from descompiler.registry import Registry
from descompiler.report import page as report
from examples.custom_form import LastRank
from examples.custom_rule import Phrases, Windows
from examples.models import MODELS, make_inputs
from tests.harness.propagation import LightGCN
from tests.harness.propagation import inputs as graph_inputs

ROOT = Path(__file__).resolve().parent.parent
HISTORY = (torch.randint(20_000, (6, 5), generator=torch.Generator().manual_seed(0)),)


@pytest.fixture(autouse=True)
def _registries_as_before(monkeypatch):
    """What a test adds is gone after it."""
    for registry in (FORMS, RULES, BASELINES, plugins.ADDED, plugins.CLUSTERS):
        monkeypatch.setattr(registry, "_items", dict(registry._items))


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """A folder with an installed distribution: the examples' rule and form, a pass, a baseline and a cluster."""
    project, target = tmp_path_factory.mktemp("project"), tmp_path_factory.mktemp("site")
    for name in ("custom_rule", "custom_form"):
        (project / f"their_{name}.py").write_text((ROOT / "examples" / f"{name}.py").read_text())
    (project / "their_costs.py").write_text(
        textwrap.dedent(
            """
            from dataclasses import dataclass, replace
            from descompiler.cost_models.baselines import DDP_DENSE
            from descompiler.planning.cluster import Cluster

            HALF = replace(DDP_DENSE, name="half precision gradients", table=DDP_DENSE.table, source="theirs")
            LAB = replace(Cluster.builtin("ethernet-10g", 4), name="their-lab")

            @dataclass(frozen=True)
            class Nothing:
                name: str = "nothing"

                def __call__(self, program):
                    program.note("their pass ran")
                    return program

            PASSES = [Nothing()]
            """
        )
    )
    (project / "pyproject.toml").write_text(
        textwrap.dedent(
            """
            [build-system]
            requires = ["setuptools"]
            build-backend = "setuptools.build_meta"
            [project]
            name = "their-parts"
            version = "1.2"
            [tool.setuptools]
            py-modules = ["their_custom_rule", "their_custom_form", "their_costs"]
            [project.entry-points."descompiler.passes"]
            windows = "their_custom_rule:RULES"
            last_rank = "their_custom_form:FORMS"
            nothing = "their_costs:PASSES"
            [project.entry-points."descompiler.cost_models"]
            half = "their_costs:HALF"
            lab = "their_costs:LAB"
            """
        )
    )
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-build-isolation"]
    done = subprocess.run([*command, "--target", target, project], capture_output=True, text=True, timeout=120)
    assert not done.returncode, done.stderr
    return target


def run(site: Path, source: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": f"{site}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-c", textwrap.dedent(source)]
    return subprocess.run(command, env=environment, cwd=site, capture_output=True, text=True, timeout=120)


@pytest.mark.long
def test_what_is_installed_is_used(site):
    done = run(
        site,
        """
        import torch, descompiler as des
        from descompiler.planning.cluster import Cluster
        from their_custom_rule import Phrases

        plan = des.plan(Phrases(), (torch.zeros(8, 5, dtype=torch.long),), ranks=2, pins={"items": "column_wise"})
        print(plan.traffic(0).total, plan.priced()[-1].name)
        print(des.plan(Phrases(), (torch.zeros(8, 5, dtype=torch.long),), ranks=2, pins={"*": "last_rank"}).forms)
        print(Cluster.builtin("their-lab", 8).ranks)
        from descompiler.captured import Captured
        print(Captured.of(Phrases(), (torch.zeros(8, 5, dtype=torch.long),)).program.journal[-1])
        """,
    )
    assert not done.returncode, done.stderr
    first, forms, ranks, journal = done.stdout.splitlines()
    without = des.plan(Phrases(), (torch.zeros(8, 5, dtype=torch.long),), ranks=2, pins={"items": "column_wise"})
    assert int(first.split()[0]) < without.traffic(0).total / 2
    assert first.endswith("half precision gradients")
    assert (forms, ranks, journal) == ("{'items.weight': 'last_rank'}", "8", "their pass ran")


@pytest.mark.long
def test_what_is_given_to_a_call_trains_as_the_original(on_ranks):
    des.verify(Phrases(), HISTORY, plans=[{"*": "column_wise"}, {"*": "row_wise"}], rules=[Windows()], launch=on_ranks)
    des.verify(MODELS["fm"](), make_inputs("fm"), plans=[{"*": "last_rank"}], forms=[LastRank()], launch=on_ranks)


@pytest.mark.slow  # the next one asks as much of one process
def test_what_is_installed_is_known_to_plan_files(site, tmp_path):
    plan = des.plan(MODELS["fm"](), make_inputs("fm"), ranks=2, pins={"*.1": "last_rank"}, forms=[LastRank()])
    plan.save(tmp_path / "plan.json")
    done = run(site, f"from descompiler.cli.app import app; app(['plan', 'show', {str(tmp_path / 'plan.json')!r}])")
    assert not done.returncode, done.stderr
    assert "last_rank" in done.stdout


@pytest.mark.long
def test_a_form_from_outside_is_in_plans_files_and_words(tmp_path):
    model, inputs = MODELS["fm"](), make_inputs("fm")
    plan = des.plan(model, inputs, ranks=4, batch=64, pins={"embeddings.tables.1": "last_rank"}, forms=[LastRank()])
    name = "embeddings.tables.1.weight"
    assert plan.forms[name] == "last_rank" and plan.splits[name].pieces.owners == (3,)
    plan.save(tmp_path / "plan.json")
    again = des.Plan.load(tmp_path / "plan.json")
    assert again == plan and again.to_json() == plan.to_json() and again.explain() == plan.explain()
    assert name in plan.explain("embeddings.tables.1") and "last_rank: E[" in plan.explain()
    free = "embeddings.tables.0.weight"
    assert "last_rank" in plan.prices[free] and "last_rank" in plan.explain(free)
    forbidden = des.plan(model, inputs, ranks=4, batch=64, forbid={"*": "last_rank"})
    assert "last_rank" not in {f for prices in forbidden.prices.values() for f in prices}
    data = json.loads(forbidden.to_json())
    data["forms"][free] = "last_rank"
    (tmp_path / "edited.json").write_text(json.dumps(data))
    edited = des.plan(model, inputs, plan=tmp_path / "edited.json")
    assert edited.forms == {**forbidden.forms, free: "last_rank"} and f"{free}: " in forbidden.diff(edited)
    FORMS._items.pop("last_rank")
    with pytest.raises(des.PlanError, match=r"no form 'last_rank'.*from outside has to be installed, or given"):
        des.plan(model, inputs, plan=tmp_path / "plan.json")


@pytest.mark.long
def test_a_form_from_outside_is_in_tables_and_on_the_page():
    torch.manual_seed(0)
    captured = Captured.of(MODELS["fm"](), make_inputs("fm"), kit=Kit.of(forms=[LastRank()]))
    plan = captured.plan(ranks=4, batch=64, pins={"embeddings.tables.1": "last_rank"})
    rows = [row for row in summary.candidates(plan).rows if row[4] == "last_rank"]
    assert "chosen" in {row[8] for row in rows} and all(row[5] is not None for row in rows)
    assert any("last_rank, " in row[1] for row in summary.thresholds(plan).rows)
    page = report.page(captured, plan, [plan], [plan], title="fm", cluster=Cluster.builtin("ethernet-25g", 4))
    count = list(plan.forms.values()).count("last_rank")
    assert "last_rank on 1 of 4 ranks" in page and f"{count} last_rank" in page


@dataclass(frozen=True)
class TheirColumns(ColumnWise):
    name: str = "their_columns"


@dataclass(frozen=True)
class TheirTables(TableWise):
    name: str = "their_tables"


def test_what_is_true_of_a_built_in_form_may_be_true_of_others(on_ranks):
    """Divided by columns together, in one form; given owners together."""
    model, inputs, forms = LightGCN(), graph_inputs(), [TheirColumns(), TheirTables()]
    both = {"user.weight": "their_columns", "item.weight": "their_columns"}
    assert des.plan(model, inputs, ranks=2, pins={"user": "their_columns"}, forms=forms).forms == both
    assert (
        des.plan(model, inputs, ranks=2, forbid={"*": ["column_wise", "replicate", "fsdp"]}, forms=forms).forms == both
    )
    with pytest.raises(des.PlanError, match="pin both"):
        des.plan(model, inputs, ranks=2, pins={"user": "their_columns", "item": "column_wise"}, forms=forms)
    assert des.plan(model, inputs, ranks=2, forms=forms).exact
    des.verify(model, inputs, plans=[{"*": "their_columns"}], forms=forms, launch=on_ranks)
    pins = {"*": "table_wise", "*.1": "their_tables", "*.2": "their_tables"}
    plan = des.plan(MODELS["lr"](), make_inputs("lr"), ranks=2, pins=pins, forms=forms)
    alone = des.plan(MODELS["lr"](), make_inputs("lr"), ranks=2, pins={"*": "table_wise"})
    assert {n: s.pieces for n, s in plan.splits.items()} == {n: s.pieces for n, s in alone.splits.items()}


def test_a_rule_is_the_calls_alone():
    plans = [
        des.plan(Phrases(), HISTORY, ranks=2, batch=512, pins={"*": "column_wise"}, rules=rules)
        for rules in ((), (Windows(),), ())
    ]
    sent = [p.traffic(0).total for p in plans]
    assert sent[0] == sent[2] > 2 * sent[1]


def test_a_form_is_the_calls_alone_and_may_be_given_anew():
    @dataclass(frozen=True)
    class Again(LastRank):
        """Defined once more, as by a cell of a notebook."""

    for form in (LastRank(), Again()):
        assert Kit.of(forms=[form]).forms[-1] is form
        assert FORMS.named("last_rank") is form and "last_rank" not in {f.name for f in Kit.of().forms}
    with pytest.raises(des.PlanError, match="two forms are named 'last_rank'"):
        Kit.of(forms=[LastRank(), Again()])
    assert isinstance(FORMS.named("last_rank"), Again)


@dataclass(frozen=True)
class Other:
    name: str = "linear"
    targets = frozenset({nn.Linear})

    def place(self, node, at): ...

    def emit(self, node, part): ...


@dataclass(frozen=True)
class Row(LastRank):
    name: str = "row_wise"


@pytest.mark.parametrize(
    ("options", "both"),
    [
        ({"rules": [Other()]}, "two rules are named 'linear': Linear of descompiler and Other of compile(rules=...)"),
        ({"rules": [Windows(), Other("windows")]}, "two rules are named 'windows': Windows of compile"),
        ({"forms": [Row()]}, "two forms are named 'row_wise': RowWise of descompiler and Row of compile(forms=...)"),
        ({"rules": [LastRank()]}, "is no rule: it has no targets, place"),
        ({"forms": [Windows()]}, "is no form: it has no refuses, split"),
    ],
)
def test_a_clash_names_both(options, both):
    with pytest.raises(des.PlanError) as error:
        des.compile(Phrases(), HISTORY, **options)
    assert both in str(error.value)


@pytest.mark.parametrize(
    ("group", "value", "message"),
    [
        (plugins.PASSES, "no_such_module:x", "plug-in 'theirs' of an unknown distribution (no_such_module:x) can't be"),
        (plugins.PASSES, "examples.custom_rule:Phrases", "is no plug-in of descompiler.passes"),
        (plugins.COST_MODELS, "examples.custom_rule:Phrases", "give a Baseline or Cluster"),
        (plugins.COST_MODELS, "descompiler.cost_models.baselines:MESH", None),  # the same again is no clash
    ],
)
def test_what_is_broken_is_reported(monkeypatch, group, value, message):
    point = EntryPoint("theirs", value, group)
    monkeypatch.setattr(plugins, "entry_points", lambda group: [point] if group == point.group else [])
    plugins.installed.cache_clear()
    try:
        if message is None:
            plugins.installed()
        else:
            with pytest.raises(des.PlanError) as error:
                plugins.installed()
            assert message in str(error.value)
    finally:
        plugins.installed.cache_clear()


def test_a_registry_keeps_an_order_and_says_what_there_is():
    names = Registry("rule", RULES)
    assert names.names == RULES.names and len(names) == len(RULES) and names[0] is RULES[0]
    with pytest.raises(des.PlanError, match=r"no rule 'none'; the rules are owner, pointwise"):
        names.named("none")
    with pytest.raises(des.PlanError, match=r"two rules are named 'owner'"):
        names.add(replace(Windows(), name="owner"), "theirs")


def test_what_is_equal_is_no_clash():
    """As a call's form, which is made anew for each call."""
    names = Registry("rule", RULES)
    names.add(Windows(), "theirs")
    names.add(Windows(), "theirs")
    assert names.names == (*RULES.names, "windows") and names.origin("windows") == "theirs"


def test_built_in_passes_come_first():
    @dataclass(frozen=True)
    class Last:
        name: str = "last"

        def __call__(self, program): ...

    mine: Pass = Last()
    built_in = Kit.of().passes
    plugins.add_to_passes(mine, "theirs")
    assert Kit.of().passes == (*built_in, mine)
