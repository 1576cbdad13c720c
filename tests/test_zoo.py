"""Models of public libraries, unmodified, trained as the original with every split forced.

A representative part runs always; ``make test-all`` runs all that docs/zoo.md lists as verified, and ``make zoo`` the
sweep that writes that page.
"""

import importlib.util

import pytest

from tests.harness.cases import cases
from tests.harness.loops import trained_by_library
from tests.harness.sweep import PLANS, examine
from tests.harness.zoo import LEFT_OUT, LIBRARIES, LOOPS, ZOO, library_classes
from tests.harness.zoo_page import FILE, RANKS, Finding, Page, verified_in

missing = [name for name in LIBRARIES if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.zoo,
    pytest.mark.skipif(bool(missing), reason=f"{missing} missing: `make test` installs them"),
]

ALWAYS = ("torchfm.FactorizationMachineModel",)


@pytest.mark.parametrize("name", cases(ZOO, ALWAYS))
def test_two_ranks(on_ranks, name):
    listed = name in verified_in(FILE.read_text())
    if not listed and name not in ALWAYS:
        pytest.skip("docs/zoo.md says why it is not verified")
    found = on_ranks(examine, RANKS, name, timeout_s=240)[0]
    assert found.status == "verified", found.reason
    assert found.cases == (len(PLANS) if found.tables else 1)
    assert found.worst <= 1e-10


LOOPS_ALWAYS = ("higher.innerloop_ctx, batch",)
FLOAT32_LOSSES = ("transformers.GPT2LMHeadModel", "transformers.LlamaForCausalLM")
"""Whose loss the library computes of logits that it casts to float32."""


@pytest.mark.parametrize("name", cases(LOOPS, LOOPS_ALWAYS))
def test_in_the_librarys_own_loop(on_ranks, name):
    for differs in on_ranks(trained_by_library, 2, LOOPS[name], timeout_s=240):
        assert differs["loss"] <= (1e-6 if name in FLOAT32_LOSSES else 1e-10)
        assert differs["weight"] <= 1e-10


def test_every_class_of_the_libraries_is_there():
    classes = set(library_classes())
    assert len(classes) > 150
    assert classes - set(ZOO) == {n for n in LEFT_OUT if not n.startswith("torch_geometric")}


def test_the_page_lists_every_model_and_a_reason_for_each_that_is_not_verified():
    text = FILE.read_text()
    verified = verified_in(text)
    assert set(ALWAYS) <= verified
    for name in ZOO:
        assert f"| `{name}` | " in text
        assert name in verified or f"- `{name}`: " in text


def test_a_part_of_the_page_is_renewed():
    first = Page.of([Finding("a.B", "refused", "why"), Finding("a.C", "verified", worst=1e-16, growth=1e9)])
    assert Page.read(first.text()) == first
    text = first.renewed(Page.of([Finding("a.B", "verified", worst=2e-16), Finding("a.D", "random", "draws")])).text()
    assert verified_in(text) == {"a.B", "a.C"}
    assert "3 models: 2 verified, 0 refused by name, 1 random" in text and "error: 2.0e-16" in text
    assert "why" not in text.replace("and why", "") and "- `a.C`: weights grow" in text
