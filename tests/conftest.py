"""Settings and options for all tests."""

import os
import random
import secrets
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

from tests.harness.pool import RankPools, collect_rarely, serve_ready_ranks
from tests.harness.traces import remember_traces

# deepctr-torch asks a package index for its newest version whenever it is imported. Tests touch no network: a
# proxy that nobody serves refuses the question at once, in this process and in the ranks that it starts.
os.environ["HTTP_PROXY"] = os.environ["HTTPS_PROXY"] = "http://127.0.0.1:9"
os.environ["http_proxy"] = os.environ["https_proxy"] = "http://127.0.0.1:9"


# A test that took long on a busy machine has not failed.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden",
        action="store_true",
        help="write tests/golden, tests/normalise and samples of docs/cli.md anew",
    )
    parser.addoption("--seed", type=int, default=secrets.randbelow(1 << 32), help="of tests that draw their examples")
    parser.addoption("--trace-anew", action="store_true", help="capture equal models again: see tests/harness/traces")


TRACES = pytest.StashKey[Path]()
"""The folder of this process and its ranks."""


def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("--trace-anew"):
        folder = tempfile.TemporaryDirectory()
        config.add_cleanup(folder.cleanup)
        config.stash[TRACES] = Path(folder.name)
        remember_traces(config.stash[TRACES])
    serve_ready_ranks()


def pytest_collection_finish() -> None:
    collect_rarely()


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    """A test that leaves autograd's anomaly mode on makes those after it slow: importing some models turns it on."""
    yield
    left = torch.is_anomaly_enabled()
    torch.autograd.set_detect_anomaly(False)
    assert not left, "anomaly mode is on"


FEW_BUT_LONG = (
    "thorough",
    "shutdown",
    "checkpoint",
    "zoo",
    "leaks",
    "examples",
    "plugins",
    "planner",
    "plan",
    "cli",
    "random_models",
    "idioms",
)
"""Files whose tests take long for their number, ``tests/test_*.py``."""


@pytest.hookimpl(tryfirst=True)  # before ``-m`` chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first, so that the workers of a parallel run end together (with ``--no-loadscope-reorder``).

    The first cases of a test that is ``long(but=1)`` are not.
    """
    of_test: Counter[object] = Counter()
    for item in items:
        mark = item.get_closest_marker("long")
        test = item.path, getattr(item, "originalname", item.name)
        if mark is not None and of_test[test] < mark.kwargs.get("but", 0):
            item.own_markers.remove(mark)
        of_test[test] += 1
    tests = Counter(item.path for item in items)
    long = {f"test_{name}.py" for name in FEW_BUT_LONG}
    items.sort(key=lambda item: (item.path.name not in long, -tests[item.path]))


@pytest.fixture(scope="session")
def on_ranks(request: pytest.FixtureRequest):
    """As `descompiler.check.processes.on_ranks`, on processes that stay for all tests: starting some takes seconds.

    For ``des.verify(..., launch=on_ranks)`` too. Tests of how processes start, end and time out take fresh ones.
    """
    with RankPools(traces=request.config.stash.get(TRACES, None)) as pools:
        yield pools


@pytest.fixture
def draws(request: pytest.FixtureRequest) -> random.Random:
    """Random numbers that are others in each run; a test that fails shows the seed, which draws the same again."""
    seed = request.config.getoption("--seed")
    print(f"drawn with --seed={seed}")
    return random.Random(f"{seed} {request.node.name}")
