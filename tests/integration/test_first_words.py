"""A command that takes long to load says so before it does; one that only looks says nothing of the kind."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flows.recipe import make_recipe
from flows.reporter import LOADING, Reporter
from flows.terminal import Terminal
from stages.runs import RunDescription, RunStore
from tests.integration.command_line import ROOT

_UP_TO_THE_FIRST_HEAVY_IMPORT = """
import os, sys

class Guard:
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "transformers", "prefect", "lm_eval"):
            sys.stderr.flush()
            os._exit(77)

sys.meta_path.insert(0, Guard())
from flows.cli import app
app(sys.argv[1:], prog_name="blockpruner")
"""


def up_to_the_first_heavy_import(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The command line, which ends with status 77 when it is about to import what takes long."""
    return subprocess.run(
        [sys.executable, "-c", _UP_TO_THE_FIRST_HEAVY_IMPORT, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        timeout=60,
    )


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """With a run that was stopped in a flow, and one that was stopped in a single stage."""
    store = RunStore(tmp_path / "ws")
    config = make_recipe({"model": "a/b", "num_blocks": 1}).model_dump(mode="json")
    for name, flow_run_id in (("flow", "f"), ("stage", None)):
        begun = store.create(RunDescription(name=name, config=config), goal="search", flow_run_id=flow_run_id)
        store.finish(begun, "cancelled", "stopped")
    return tmp_path / "ws"


@pytest.mark.parametrize(
    "command",
    [
        "demo",
        "run demo",
        "calibrate --model a/b",
        "search demo",
        "evaluate --model a/b --eval-text wikitext2",
        "export flow",
        "resume flow",
        "resume stage",
        "compare demo-compare",
    ],
)
def test_before_anything_heavy_is_imported_it_is_said(command: str, workspace: Path) -> None:
    done = up_to_the_first_heavy_import(*command.split(), "--workspace", workspace)
    assert (done.returncode, done.stdout, done.stderr) == (77, "", f"{LOADING} ...\n")


@pytest.mark.parametrize(("chosen", "reports"), [({}, False), ({"DO_NOT_TRACK": "0"}, True)])
def test_prefect_reports_to_nobody_unless_that_is_chosen(chosen: dict[str, str], reports: bool) -> None:
    """Its client says on a terminal that it would, the first time that it is imported there."""
    clean = {name: os.environ[name] for name in ("PATH", "HOME", "PREFECT_HOME") if name in os.environ}
    code = (
        "import flows.prefect_settings; from prefect._internal.analytics.enabled import is_telemetry_enabled; "
        "print(is_telemetry_enabled())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={**clean, **chosen}, capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout == f"{reports}\n"


@pytest.mark.parametrize("command", [["--help"], ["runs"], ["show", "flow"], ["sql", "FROM runs"]], ids=" ".join)
def test_a_command_that_looks_loads_nothing_and_says_nothing_of_it(command: list[str], workspace: Path) -> None:
    done = up_to_the_first_heavy_import(*command, *(["--workspace", workspace] if command != ["--help"] else []))
    assert done.returncode == 0
    assert "loading" not in done.stderr


def test_what_is_waited_for_goes_away_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    screen = io.StringIO()
    with Reporter(Terminal(screen, force_terminal=True, width=60)).waiting("loading"):
        assert "loading ..." in screen.getvalue()
        assert "\n" not in screen.getvalue()
    one_line_up_and_erased = "\x1b[1A\x1b[2K"
    assert screen.getvalue().endswith(one_line_up_and_erased)
    assert screen.getvalue().count("\n") == screen.getvalue().count("\x1b[1A") == 1


@pytest.mark.parametrize("term", ["dumb", "xterm"])
def test_what_is_waited_for_is_a_line_where_nothing_can_be_taken_back(
    term: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", term)
    lines = io.StringIO()
    with Reporter(Terminal(lines, force_terminal=term == "dumb")).waiting("loading"):
        assert lines.getvalue() == "loading ...\n"
    assert lines.getvalue() == "loading ...\n"
