"""The hooks of the flows: an end that a run could not write itself is written, and no other is touched."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import UUID, uuid4

import pytest
from prefect import Flow, State, flow
from prefect.client.schemas.objects import FlowRun
from prefect.settings import PREFECT_LOGGING_TO_API_ENABLED, temporary_settings
from prefect.states import Cancelled, Cancelling, Crashed, Failed

from flows import compare_flow
from flows.compare_flow import compare
from flows.flow_hooks import close_cells, note_end
from flows.prune_flow import prune
from stages.runs import RunDescription, RunRecord, RunStore
from stages.store import ResultStore
from tests.unit.child_processes import child, kill, wait_for

_ID = UUID(int=7)


@pytest.fixture(autouse=True)
def _no_server() -> Iterator[None]:
    with temporary_settings({PREFECT_LOGGING_TO_API_ENABLED: False}):
        yield


@flow(name="prune")
def stand_in() -> None:
    """A flow that hooks are told of."""


def flow_run(workspace: Path, flow_run_id: UUID = _ID, **recipe: object) -> FlowRun:
    return FlowRun(id=flow_run_id, flow_id=uuid4(), parameters={"workspace": str(workspace), "recipe": recipe})


def begin_and_wait(workspace: str) -> None:
    """In a child process: a run that is under way."""
    RunStore(Path(workspace)).create(RunDescription(name="c: a"), goal="evaluate", flow_run_id=str(_ID))
    time.sleep(60)


def statuses(workspace: Path) -> list[str]:
    rows = ResultStore(workspace / "results.duckdb").query("SELECT status FROM runs")[1]
    return [row[0] for row in rows]


def the_record(workspace: Path) -> RunRecord:
    (record,) = RunStore(workspace).list()
    return record


@pytest.mark.parametrize(
    ("hook", "state", "status", "words"),
    [
        (
            note_end,
            Crashed(message="Process exited\nwith status code: -9"),
            "crashed",
            "Process exited with status code",
        ),
        (note_end, Cancelling(), "cancelled", "`blockpruner resume "),
        (close_cells, Crashed(), "crashed", "the process of this run"),
    ],
)
def test_the_end_of_a_killed_run_is_written(
    hook: Any, state: State[Any], status: str, words: str, tmp_path: Path
) -> None:
    with child(begin_and_wait, tmp_path / "ws") as process:
        wait_for(lambda: bool(RunStore(tmp_path / "ws").list()))
        hook(stand_in, flow_run(tmp_path / "ws"), state)
        assert the_record(tmp_path / "ws").status == "running"  # it is still there, and closes itself
        kill(process)
    hook(stand_in, flow_run(tmp_path / "ws"), state)
    record = the_record(tmp_path / "ws")
    assert record.status == status
    assert words in str(record.error)
    assert "\n" not in str(record.error)
    assert statuses(tmp_path / "ws") == [status]


@pytest.mark.parametrize(("state", "says"), [(Cancelling(), True), (Cancelled(), True), (Crashed(), False)])
def test_a_cancelled_comparison_says_how_to_go_on(
    state: State[Any], says: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    close_cells(stand_in, flow_run(tmp_path / "ws"), state)
    assert ("run the same comparison again to go on" in caplog.text) == says


def test_an_end_that_was_written_stays(tmp_path: Path) -> None:
    runs = RunStore(tmp_path)
    for status in ("completed", "failed", "cancelled"):
        record = runs.create(RunDescription(), flow_run_id=str(_ID))
        runs.finish(record, status, "as it was")
        note_end(stand_in, flow_run(tmp_path), Crashed(message="told later"))
        assert runs.load(record.run_id) == record
    assert len(runs.list()) == 3


def test_a_run_that_was_refused_before_it_began_has_a_record_as_well(tmp_path: Path) -> None:
    runs = RunStore(tmp_path)
    other = runs.create(RunDescription(), flow_run_id=str(UUID(int=8)))
    note_end(stand_in, flow_run(tmp_path, model="m", num_blocks=1, ratio=0.5), Failed(message="both\nare given"))
    record = runs.list()[0]
    assert (record.status, record.error, record.model) == ("failed", "both are given", "m")
    assert (record.goal, record.flow_run_id) == ("evaluate", str(_ID))
    assert record.was_refused
    assert runs.load(other.run_id).status == "running"


@pytest.mark.parametrize("recipe", [{"model": 3}, {}, {"name": ["x"]}])
def test_parameters_of_any_kind_are_no_second_error(recipe: dict[str, object], tmp_path: Path) -> None:
    note_end(stand_in, flow_run(tmp_path, **recipe), Failed(message="not valid"))
    assert (the_record(tmp_path).model, the_record(tmp_path).error) == (None, "not valid")


@pytest.mark.parametrize("workspace", ["~nobody-here/x", "\0", "x" * 5000, 5, None, ["data"], os.fsdecode(b"w\xff")])
@pytest.mark.parametrize("hook", [note_end, close_cells])
def test_a_workspace_that_is_no_path_is_said(
    hook: Any, workspace: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    hook(stand_in, FlowRun(flow_id=uuid4(), parameters={"workspace": workspace, "recipe": {}}), Failed(message="no"))
    assert "the end of this run is not in the workspace" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_a_workspace_that_cannot_be_written_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    note_end(stand_in, flow_run(tmp_path / "file"), Failed(message="no"))
    assert "the end of this run is not in the workspace" in caplog.text


@pytest.mark.parametrize(
    ("recipe", "name"),
    [
        ("ratios", "ratios"),
        ({"name": "night", "grid": []}, "night"),
        ({"grid": []}, "compare"),
        (SimpleNamespace(name="two\nlines"), "two lines"),
        (None, "compare"),
    ],
)
def test_a_comparisons_flow_run_has_its_name(recipe: object, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare_flow, "runtime_flow_run", SimpleNamespace(parameters={"recipe": recipe}))
    assert compare_flow._run_name() == name


@pytest.mark.parametrize(("each", "hook"), [(prune, note_end), (compare, close_cells)])
def test_the_flows_have_their_hooks(each: Flow[..., Any], hook: object) -> None:
    assert each.on_failure_hooks == each.on_crashed_hooks == each.on_cancellation_hooks == [hook]
