"""Every rule, in every placement of its operands, against the operator on the whole; in one process.

What a rule answers and emits is judged by numbers (`tests.harness`), so a rule that is wrong is found before a model
uses it so. docs/rules.md says what a rule owes, and lists what none offers.
"""

import pytest

from descompiler.passes import RULES
from descompiler.region.rule import Placed
from tests.harness import missing
from tests.harness.calls import site_of
from tests.harness.family import FAMILIES, family, placed_values
from tests.harness.keys import conflicts
from tests.harness.rules import answer, faults


@pytest.mark.parametrize("name", FAMILIES)
def test_every_answer_is_right(name):
    found = []
    for call in family(name):
        site = site_of(call)
        for at in placed_values(call):
            said, rule = answer(site, at)
            if isinstance(said, Placed):
                where = ", ".join(f"{x.name} {p}" for x, p in at.items())
                found += [f"{rule.name}: {call}, {where}: {x}" for x in faults(site, at, said, rule)]
    assert not found


def test_every_operator_that_a_rule_names_is_placed_by_it():
    named = {(rule.name, target) for rule in RULES for target in rule.targets or ()}
    for call in family():
        if all(target != call.target for _, target in named):
            continue
        for at in placed_values(call):
            said, rule = answer(site_of(call), at)
            if isinstance(said, Placed):
                named.discard((rule.name, call.target))
    assert not named


@pytest.mark.parametrize("levels", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_equal_keys_mean_equal_patterns(levels):
    found, compared = conflicts(levels)
    assert not found
    assert compared > 1000


@pytest.mark.slow
def test_the_page_lists_what_no_rule_offers():
    assert missing.FILE.read_text(encoding="utf-8") == missing.page(), "run `make rules`, and read what has changed"
