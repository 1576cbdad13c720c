"""Models of public libraries, unmodified, trained as the original with every split forced.

A representative part runs always; ``make test-all`` runs all that docs/zoo.md lists as verified, and ``make zoo`` the
sweep that writes that page.
"""

import importlib.util

import pytest

from tests.harness.sweep import FILE, PLANS, RANKS, examine, markdown, verified_in
from tests.harness.zoo import LEFT_OUT, LIBRARIES, ZOO, library_classes

missing = [name for name in LIBRARIES if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.zoo,
    pytest.mark.skipif(bool(missing), reason=f"{missing} missing: `make test` installs them"),
]

ALWAYS = (
    "torchfm.FactorizationMachineModel",
    "torchfm.ExtremeDeepFactorizationMachineModel",
    "torchfm.ProductNeuralNetworkModel",
    "deepctr_torch.DeepFM",
    "deepctr_torch.DIN",
    "torch_rechub.DCN",
)


def cases():
    for name in ZOO:
        yield pytest.param(name, marks=() if name in ALWAYS else pytest.mark.slow)


@pytest.mark.parametrize("name", list(cases()))
def test_two_ranks(on_ranks, name):
    listed = name in verified_in(FILE.read_text())
    if not listed and name not in ALWAYS:
        pytest.skip("docs/zoo.md says why it is not verified")
    found = on_ranks(examine, RANKS, name, timeout_s=240)[0]
    assert found.status == "verified", found.reason
    assert found.cases == (len(PLANS) if found.tables else 1)
    assert found.worst <= 1e-10


def test_every_class_of_the_libraries_is_there():
    classes = set(library_classes())
    assert len(classes) > 150
    assert classes - set(ZOO) == set(LEFT_OUT)


def test_the_page_lists_every_model_and_a_reason_for_each_that_is_not_verified():
    text = FILE.read_text()
    verified = verified_in(text)
    assert set(ALWAYS) <= verified
    for name in ZOO:
        assert f"| `{name}` | " in text
        assert name in verified or f"- `{name}`: " in text
    assert verified_in(markdown([])) == set()
