"""Rules, forms, passes, baselines and clusters from outside: installed, or given to one call."""

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
from descompiler.cost_models.baselines import BASELINES
from descompiler.graph.rewrite import Pass
from descompiler.passes import FORMS, RULES
from descompiler.plugins import Kit
from descompiler.registry import Registry
from examples.custom_form import LastRank
from examples.custom_rule import Flip, Palindrome
from examples.models import MODELS, make_inputs

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
            flip = "their_custom_rule:RULES"
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


def test_what_is_installed_is_used(site):
    done = run(
        site,
        """
        import torch, descompiler as des
        from descompiler.planning.cluster import Cluster
        from their_custom_rule import Palindrome

        plan = des.plan(Palindrome(), (torch.zeros(8, 5, dtype=torch.long),), ranks=2, pins={"items": "column"})
        print(plan.traffic(0).total, plan.priced()[-1].name)
        print(des.plan(Palindrome(), (torch.zeros(8, 5, dtype=torch.long),), ranks=2, pins={"*": "last_rank"}).forms)
        print(Cluster.builtin("their-lab", 8).ranks)
        from descompiler.captured import Captured
        print(Captured.of(Palindrome(), (torch.zeros(8, 5, dtype=torch.long),)).program.journal[-1])
        """,
    )
    assert not done.returncode, done.stderr
    first, forms, ranks, journal = done.stdout.splitlines()
    without = des.plan(Palindrome(), (torch.zeros(8, 5, dtype=torch.long),), ranks=2, pins={"items": "column"})
    assert int(first.split()[0]) < without.traffic(0).total / 2
    assert first.endswith("half precision gradients")
    assert (forms, ranks, journal) == ("{'items.weight': 'last_rank'}", "8", "their pass ran")


def test_what_is_given_to_a_call_trains_as_the_original(on_ranks):
    des.verify(Palindrome(), HISTORY, plans=[{"*": "column"}, {"*": "row"}], rules=[Flip()], launch=on_ranks)
    des.verify(MODELS["fm"](), make_inputs("fm"), plans=[{"*": "last_rank"}], forms=[LastRank()], launch=on_ranks)


def test_a_rule_is_the_calls_alone():
    plans = [
        des.plan(Palindrome(), HISTORY, ranks=2, batch=512, pins={"*": "column"}, rules=rules)
        for rules in ((), (Flip(),), ())
    ]
    sent = [p.traffic(0).total for p in plans]
    assert sent[0] == sent[2] > 2 * sent[1]


@dataclass(frozen=True)
class Other:
    name: str = "linear"
    targets = frozenset({nn.Linear})

    def place(self, node, at): ...

    def emit(self, node, part): ...


@dataclass(frozen=True)
class Row(LastRank):
    name: str = "row"


@pytest.mark.parametrize(
    ("options", "both"),
    [
        ({"rules": [Other()]}, "two rules are named 'linear': Linear of descompiler and Other of compile(rules=...)"),
        ({"rules": [Flip(), Other("flip")]}, "two rules are named 'flip': Flip of compile"),
        ({"forms": [Row()]}, "two forms are named 'row': Row of descompiler and Row of compile(forms=...)"),
        ({"rules": [LastRank()]}, "is no rule: it has no targets, place"),
        ({"forms": [Flip()]}, "is no form: it has no refuses, split"),
    ],
)
def test_a_clash_names_both(options, both):
    with pytest.raises(des.PlanError) as error:
        des.compile(Palindrome(), HISTORY, **options)
    assert both in str(error.value)


@pytest.mark.parametrize(
    ("group", "value", "message"),
    [
        (plugins.PASSES, "no_such_module:x", "plug-in 'theirs' of an unknown distribution (no_such_module:x) can't be"),
        (plugins.PASSES, "examples.custom_rule:Palindrome", "is no plug-in of descompiler.passes"),
        (plugins.COST_MODELS, "examples.custom_rule:Palindrome", "give a Baseline or Cluster"),
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
        names.add(replace(Flip(), name="owner"), "theirs")


def test_what_is_equal_is_no_clash():
    """As a call's form, which is made anew for each call."""
    names = Registry("rule", RULES)
    names.add(Flip(), "theirs")
    names.add(Flip(), "theirs")
    assert names.names == (*RULES.names, "flip") and names.origin("flip") == "theirs"


def test_built_in_passes_come_first():
    @dataclass(frozen=True)
    class Last:
        name: str = "last"

        def __call__(self, program): ...

    mine: Pass = Last()
    built_in = Kit.of().passes
    plugins.add_to_passes(mine, "theirs")
    assert Kit.of().passes == (*built_in, mine)
