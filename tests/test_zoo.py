"""Models of public libraries, unmodified, trained as the original with every split forced."""

import importlib.util

import pytest
import torch

import descompiler as des
from tests.test_equivalence import SPLITS
from tests.zoo import ZOO

missing = [name for name in ("torchfm", "deepctr_torch") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.zoo,
    pytest.mark.skipif(bool(missing), reason=f"{missing} missing: pip install 'descompiler[zoo]'"),
]


@pytest.mark.parametrize("name", ZOO)
def test_two_ranks(name):
    torch.manual_seed(0)
    model, inputs = ZOO[name]()
    report = des.verify(model, inputs, ranks=2, plans=SPLITS)
    assert report.cases == len(SPLITS)
