"""The command `resume`: goes on with a run that did not come to its end, from the settings that its record holds."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from blockpruner.errors import ConfigurationError
from flows import cli_options as options
from flows.cli_results import open_runs
from stages.consent import CODE_SETTINGS

if TYPE_CHECKING:
    from flows.summary import RunSummary
    from stages.runs import RunRecord


@options.of_recipe(*CODE_SETTINGS)
def resume(
    context: typer.Context,
    run: options.Run,
    workspace: options.WorkspaceFolder = options.DEFAULT_WORKSPACE,
    as_json: options.Json = False,
) -> None:
    """Go on with a run that was stopped, failed or crashed.

    With the settings that it was begun with, wherever it was begun, but for those that let code of others run: these
    are to be given again. What it finished is taken as it is.
    """
    from flows.cli_output import print_result

    record = open_runs(workspace).resolve(run)
    if record.status == "running":
        raise ConfigurationError(
            f"run {record.run_id} is under way (pid {record.pid} on {record.host}); wait for its end, or stop it first"
        )
    if record.status == "completed":
        typer.echo(f"run {record.run_id} is completed: there is nothing left to go on with", err=True)
        summary = _as_it_is(record, workspace)
    else:
        summary = _on(record, workspace, options.given_settings(context))
    print_result(summary, as_json=as_json)


def _as_it_is(record: RunRecord, workspace: Path) -> RunSummary:
    from flows.reporter import Reporter
    from flows.summary import RunSummary
    from stages.workspace import Workspace

    return RunSummary.of(record, Workspace(workspace), Reporter().warn)


def _on(record: RunRecord, workspace: Path, given: Mapping[str, Any]) -> RunSummary:
    """Carry out what the record asks for: as a flow if it was one, else in this process."""
    from flows.cli_pipeline import run_flow
    from flows.consent import Consent, recipe_of
    from flows.goals import known_goal
    from flows.grid import External
    from flows.reporter import Reporter

    goal = known_goal(record.goal)
    if goal is None:
        raise ConfigurationError(
            f"the record of run {record.run_id} does not say how far it was to go, for another version of BlockPruner "
            "wrote it; give its command again, which takes what it finished"
        )
    recipe, consent = recipe_of(record, given), Consent.of(record, given)
    with redirect_stdout(sys.stderr):  # whoever else prints does not mean it as a result
        reporter = Reporter()
        with reporter.loading():
            from flows.runner import Runner

        external = External(path=record.external, label=record.strategy or "external") if record.external else None
        runner = Runner(workspace, reporter)
        execute = consent.checked(runner, recipe, goal, external)
        if record.flow_run_id is None or consent.is_guarded:
            run = runner.run(recipe, goal, execute, comparison=record.comparison, external=external)
            return _as_it_is(run, workspace)
    return run_flow(recipe, workspace)
