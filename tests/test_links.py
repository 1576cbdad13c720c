"""The benchmark on shaped links: when it skips, and bytes of two ranks against the kernel's counters."""

import os
import shutil
import subprocess

import pytest

from benchmarks import links


def test_it_says_why_it_can_not_run(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert links.why_not() == "network namespaces need root"
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(shutil, "which", lambda tool: None if tool == "tc" else f"/sbin/{tool}")
    assert "tc not found" in links.why_not() and "iproute2" in links.why_not()


@pytest.mark.slow
def test_interface_counters_of_two_ranks():
    if reason := links.why_not():
        pytest.skip(reason)
    task = {"model": "fm", "rows": 2048, "steps": 4, "plan": {"*": "table_wise"}, "audit": 0}
    with links.network(2, 1000) as names:
        answers = links.on_namespaces(names, task)
    assert not set(names) & set(subprocess.run(["ip", "netns"], capture_output=True, text=True).stdout.split())
    for a in answers:
        assert a["predicted_bytes"] == a["sent_bytes"]
        assert a["predicted_bytes"] == pytest.approx(a["interface_bytes"], rel=0.05)
