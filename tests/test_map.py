"""The map in CONTRIBUTING.md, "where is the test of X?", names every file of tests and no other."""

import re
from pathlib import Path

TESTS = Path(__file__).resolve().parent


def test_the_map_names_every_file_of_tests():
    named = re.findall(r"`(test_\w+)`", (TESTS.parent / "CONTRIBUTING.md").read_text())
    assert sorted(set(named)) == sorted(f.stem for f in TESTS.glob("test_*.py"))
