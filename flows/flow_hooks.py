"""What Prefect calls when a flow run fails, crashes or is cancelled: the end goes into the workspace as well.

A run that ends in order has closed its record by then. These are for one that could not: killed, by a worker that was
told to cancel it or by the machine, or refused before it began. Prefect calls them in the run's own process or, where
that is gone, in another one of the worker's. Computes nothing, opens no model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from prefect import Flow, State
from prefect.client.schemas.objects import FlowRun
from prefect.logging.loggers import flow_run_logger

from blockpruner.errors import BlockPrunerError, ConfigurationError
from blockpruner.paths import user_path
from flows.recipe import make_recipe
from flows.wording import COMPARISON_CANCELLED, cancelled, in_plain_words, one_line
from stages.runs import RunDescription, RunRecord, RunStatus, RunStore
from stages.store import ResultStore

_DEFAULT_WORKSPACE = "data"
_GOAL = "evaluate"
"""How far `prune` goes."""


def note_end(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """Write the end of a run of `prune` into its record and the database, where it is not written yet."""
    _in_workspace(flow, flow_run, lambda runs: _closed_run(runs, flow_run, state))


def close_cells(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """Close the runs that a comparison left behind; one whose process is still there closes itself."""
    _in_workspace(flow, flow_run, RunStore.close_dead)
    if state.is_cancelled() or state.is_cancelling():
        flow_run_logger(flow_run, flow).warning("%s", COMPARISON_CANCELLED)


def _in_workspace(flow: Flow[..., Any], flow_run: FlowRun, close: Callable[[RunStore], list[RunRecord]]) -> None:
    """Close runs in the workspace of a flow run, and bring their rows up to date. What cannot be done is said."""
    warn = flow_run_logger(flow_run, flow).warning
    try:
        runs = RunStore(_workspace(flow_run.parameters), lambda line: warn("%s", line))
        for record in close(runs):
            ResultStore(runs.workspace.database, lambda line: warn("%s", line)).ingest(record)
    except (BlockPrunerError, OSError) as error:
        warn("the end of this run is not in the workspace: %s", in_plain_words(error) or one_line(str(error)))


def _workspace(parameters: Mapping[str, Any]) -> Path:
    """The workspace that a flow's parameters name, which may be what the run was refused for."""
    given = parameters.get("workspace", _DEFAULT_WORKSPACE)
    if not isinstance(given, str):
        raise ConfigurationError(f"the parameter workspace is {given!r}; give the path of a folder")
    return user_path(given)


def _closed_run(runs: RunStore, flow_run: FlowRun, state: State[Any]) -> list[RunRecord]:
    """The record of a flow run, if this closed it; one that has none was refused before it began, and gets one."""
    status = _status(state)
    own = [record for record in runs.list() if record.flow_run_id == str(flow_run.id)]
    if not own:
        own = [runs.create(_description(flow_run.parameters), goal=_GOAL, flow_run_id=str(flow_run.id))]
        runs.finish(own[0], status, _reason(own[0], status, state))
        return own
    return [runs.load(own[0].run_id)] if runs.close(own[0], status, _reason(own[0], status, state)) else []


def _status(state: State[Any]) -> RunStatus:
    if state.is_failed():
        return "failed"
    return "crashed" if state.is_crashed() else "cancelled"


def _reason(record: RunRecord, status: RunStatus, state: State[Any]) -> str:
    return cancelled(record.resume_command) if status == "cancelled" else one_line(state.message or status)


def _description(parameters: Mapping[str, Any]) -> RunDescription:
    """What is known of a run from the flow's parameters, which may be what it was refused for."""
    given = parameters.get("recipe")
    values = dict(given) if isinstance(given, Mapping) else {}
    try:
        recipe = make_recipe(values).anchored()
    except BlockPrunerError:
        named = {name: values[name] for name in ("model", "name") if isinstance(values.get(name), str)}
        return RunDescription(**named, config=values)
    return RunDescription(name=recipe.name, model=recipe.model, config=recipe.model_dump(mode="json"))
