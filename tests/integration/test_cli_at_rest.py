"""The command line before there is anything to show: help, version, an empty workspace."""

from __future__ import annotations

import resource
from pathlib import Path

import blockpruner as package
from tests.integration.command_line import blockpruner, in_a_process


def test_an_empty_workspace_has_no_runs_and_one_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    assert blockpruner("runs", "--workspace", tmp_path, "--json").json == []
    assert "no runs" in blockpruner("runs", "--workspace", tmp_path).stderr
    assert list(tmp_path.iterdir()) == []
    for command in (["runs"], ["runs", "--json"], ["show", "latest"], ["sql", "SELECT 1"]):
        assert blockpruner(*command, "--workspace", tmp_path / "none").status == 2
    assert not (tmp_path / "none").exists()


def test_help_comes_at_once() -> None:
    """Measured as processor time, for two cores are often busy; the limit on the clock is half a second."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    tries = 3
    for _ in range(tries):
        assert in_a_process("--help").status == 0
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / tries < 0.5


def test_version_and_bare_call() -> None:
    assert blockpruner("--version").stdout == f"blockpruner {package.__version__}\n"
    bare = blockpruner()
    assert bare.status == 0
    assert "search" in bare.stdout
