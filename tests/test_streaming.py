"""The stream of clicks and its example: AUC of both models, on any number of ranks, and exactly on after a stop."""

import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

import descompiler as des

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))  # as a script's imports are found

import streaming
from train_ctr import Ranks

SMALL = ["--smaller", "20", "--batch", "48", "--dim", "4", "--capacity", "128", "--every", "4", "--window", "12"]
SMALL += ["--save-every", "8", "--hashed-rows", "300"]


def histories(rank, ranks, folder, form, *stops):
    """The histories of runs that go on from each other, in float64."""
    torch.set_default_dtype(torch.float64)
    options = [*SMALL, "--folder", folder, *(["--form", form] if form else [])]
    runs = [streaming.arguments([*options, "--steps", str(stop)]) for stop in stops]
    return [streaming.run(args, Ranks(rank, ranks), Console(quiet=True), lambda: False) for args in runs]


def test_goes_on_exactly(on_ranks, tmp_path):
    (whole,) = on_ranks(histories, 2, str(tmp_path / "whole"), None, 24)[0]
    first, second = on_ranks(histories, 2, str(tmp_path / "parts"), None, 12, 24)[0]
    print(whole[-1])
    assert first == whole[:3]
    assert second == whole
