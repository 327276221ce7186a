"""Run records: what is written is read, a run is found by what a user types, and a dead run is told from a live one."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from pydantic import ValidationError

from blockpruner.errors import ArtifactError
from stages.runs import RunDescription, RunRecord, RunStore, StageRun, process_start
from tests.unit.child_processes import child, kill, succeed, wait_for


class Runs:
    """A workspace's runs, and what was said."""

    def __init__(self, workspace: Path) -> None:
        self.workspace = workspace
        self.said: list[str] = []
        self.store = RunStore(workspace, self.said.append)

    def add(self, run_id: str, age_s: float = 0.0, **fields: object) -> RunRecord:
        """A finished run with this id, begun so many seconds ago."""
        created = datetime.now(UTC) - timedelta(seconds=age_s)
        values = {"status": "completed", "created_at": created, "pid": 1, "host": "elsewhere", **fields}
        record = RunRecord.model_validate({"run_id": run_id, **values})
        self.store.save(record)
        return record


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    return Runs(tmp_path / "workspace")


def begin_and_wait(workspace: str) -> None:
    """In a child process: begin a run with one finished and one running stage, and stay."""
    store = RunStore(Path(workspace))
    record = store.create(RunDescription(name="doomed"))
    record.stages.append(StageRun(stage="calibrate", label="calibrate", role="calibration", status="completed"))
    record.stages.append(StageRun(stage="search", label="search", role="search"))
    store.save(record)
    time.sleep(60)


def begin_and_leave(workspace: str) -> None:
    """In a child process: begin a run and leave without closing it."""
    sys.stdout.write(RunStore(Path(workspace)).create(RunDescription()).run_id)


# --- records ----------------------------------------------------------------------------------------------------------


def test_a_new_run_is_there_at_once(runs: Runs) -> None:
    record = runs.store.create(RunDescription(name="first", model="dir", num_samples=None, seed=42, config={"a": [1]}))
    found = runs.store.load(record.run_id)
    assert found == record
    assert (found.status, found.pid, found.finished_at) == ("running", os.getpid(), None)
    assert found.process_started == process_start(os.getpid())
    day, clock, rest = found.run_id.split("-")
    assert (len(day), len(clock), len(rest)) == (8, 6, 6)
    assert f"{found.created_at:%Y%m%d%H%M%S}" == day + clock
    assert json.loads((runs.workspace / "runs" / f"{record.run_id}.json").read_text())["config"] == {"a": [1]}


def test_changes_are_kept_and_checked(runs: Runs) -> None:
    record = runs.store.create(RunDescription())
    record.num_layers = 12
    record.stages.append(StageRun(stage="search", label="search", role="search", fingerprint="ab", seconds=1.5))
    runs.store.save(record)
    assert runs.store.load(record.run_id) == record
    with pytest.raises(ValidationError):
        record.status = "over"  # type: ignore[assignment]


def test_finish_closes_the_run_and_its_running_stages(runs: Runs) -> None:
    record = runs.store.create(RunDescription())
    done = StageRun(stage="calibrate", label="calibrate", role="calibration", status="completed", seconds=3)
    record.stages = [done, StageRun(stage="search", label="search", role="search")]
    runs.store.finish(record, "failed", "out of luck")
    found = runs.store.load(record.run_id)
    assert (found.status, found.error) == ("failed", "out of luck")
    assert found.finished_at is not None
    assert found.finished_at >= found.created_at
    assert [(stage.status, stage.error) for stage in found.stages] == [("completed", None), ("failed", "out of luck")]


def test_stage_gives_the_last_completed_of_a_role(runs: Runs) -> None:
    tries = [("failed", "a"), ("completed", "b"), ("completed", "c"), ("failed", "d")]
    stages = [
        StageRun.model_validate({"stage": "search", "label": "x", "role": "search", "status": status, "fingerprint": f})
        for status, f in tries
    ]
    record = runs.add("one", stages=stages)
    found = record.stage("search")
    assert found is not None
    assert found.fingerprint == "c"
    assert record.stage("export") is None


def test_unknown_fields_of_a_later_version_are_passed_over(runs: Runs) -> None:
    runs.add("one")
    path = runs.workspace / "runs" / "one.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "from_the_future": 1}))
    assert runs.store.load("one").run_id == "one"


@pytest.mark.parametrize("run_id", ["../x", "a/b", "", "A", "a b", "a\n"])
def test_a_run_id_cannot_escape(runs: Runs, run_id: str) -> None:
    with pytest.raises(ValidationError):
        runs.add(run_id)
    with pytest.raises(ArtifactError):
        runs.store.load(run_id)


def test_who_reads_a_record_while_it_is_written_reads_the_old_one_whole(runs: Runs) -> None:
    old = runs.add("one", config={"x": "y" * 10_000})
    with (runs.workspace / "runs" / "one.json").open("rb") as reader:
        beginning = reader.read(100)
        runs.add("one", config={"x": "z" * 20_000})
        assert RunRecord.model_validate_json(beginning + reader.read()) == old
    assert runs.store.load("one").config == {"x": "z" * 20_000}


def test_a_record_that_cannot_be_written_leaves_the_old_one(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    old = runs.add("one")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        runs.add("one", config={"x": 1})
    assert runs.store.load("one") == old
    assert [path.name for path in (runs.workspace / "runs").iterdir()] == ["one.json"]


# --- finding ----------------------------------------------------------------------------------------------------------


def test_list_is_newest_first_and_says_what_is_damaged(runs: Runs) -> None:
    assert runs.store.list() == []
    runs.add("b", age_s=5)
    runs.add("a", age_s=1)
    runs.add("c", age_s=9)
    runs.add("wrong")
    (runs.workspace / "runs" / "wrong.json").rename(runs.workspace / "runs" / "renamed.json")
    (runs.workspace / "runs" / "torn.json").write_text('{"run_id": "torn"')
    (runs.workspace / "runs" / ".tmp-x-1-1").write_text("{")
    assert [record.run_id for record in runs.store.list()] == ["a", "b", "c"]
    assert len(runs.said) == 2
    assert any("torn.json is damaged" in said for said in runs.said)


def test_resolve(runs: Runs) -> None:
    runs.add("20260101-000000-aaaaaa", age_s=30, name="night")
    runs.add("20260101-000000-aabbbb", age_s=20, name="night")
    runs.add("20260202-000000-cccccc", age_s=10, name="2026")
    runs.add("20260303-000000-dddddd", age_s=40)

    def found(text: str) -> str:
        return runs.store.resolve(text).run_id

    assert found("latest") == "20260202-000000-cccccc"
    assert found("20260101-000000-aaaaaa") == "20260101-000000-aaaaaa"
    assert found("20260101-000000-aab") == "20260101-000000-aabbbb"
    assert found("202603") == "20260303-000000-dddddd"
    assert found("night") == "20260101-000000-aabbbb"
    assert found("2026") == "20260202-000000-cccccc"  # a whole name before the start of an id


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("20260101", ["ambiguous", "20260101-000000-aaaaaa", "20260101-000000-aabbbb"]),
        ("nigth", ["no run 'nigth'", "did you mean 'night'", "latest"]),
        ("", ["no run is named", "latest"]),
        (" ", ["no run is named", "latest"]),
        ("../x", ["no run"]),
    ],
)
def test_resolve_refuses_with_one_line_that_helps(runs: Runs, text: str, words: list[str]) -> None:
    runs.add("20260101-000000-aaaaaa", name="night")
    runs.add("20260101-000000-aabbbb")
    with pytest.raises(ArtifactError) as caught:
        runs.store.resolve(text)
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words)


def test_resolve_lists_only_a_few_of_many(runs: Runs) -> None:
    for number in range(9):
        runs.add(f"run-{number}")
    with pytest.raises(ArtifactError, match="and 4 more"):
        runs.store.resolve("run-")


def test_latest_and_names_pass_over_what_was_refused(runs: Runs) -> None:
    stage = {"stage": "search", "label": "search", "role": "search", "status": "failed"}
    runs.add("refused-first", age_s=50, name="day", status="failed")
    assert runs.store.resolve("latest").run_id == "refused-first"  # better than nothing
    assert runs.store.resolve("day").run_id == "refused-first"
    runs.add("good", age_s=40, name="night")
    runs.add("failed-under-way", age_s=30, name="night", status="failed", stages=[stage])
    runs.add("refused", age_s=20, name="night", status="failed", error="no model folder")
    assert runs.store.resolve("latest").run_id == "failed-under-way"
    assert runs.store.resolve("night").run_id == "failed-under-way"
    assert runs.store.resolve("refused").error == "no model folder"
    runs.add("cancelled-at-once", age_s=10, status="cancelled")
    assert runs.store.resolve("latest").run_id == "cancelled-at-once"


def test_nobody_goes_on_from_what_failed_for_nothing(runs: Runs) -> None:
    searched = {"stage": "search", "label": "search", "role": "search", "status": "completed"}
    failed = {"stage": "export", "label": "export", "role": "export", "status": "failed"}

    def to_go_on(text: str) -> str:
        return runs.store.resolve(text, to_go_on=True).run_id

    runs.add("export-failed", age_s=60, status="failed", name="n", stages=[{**searched, "cached": True}, failed])
    assert to_go_on("latest") == "export-failed"  # better than nothing
    runs.add("good", age_s=50, name="n")
    runs.add("export-failed-again", age_s=40, status="failed", name="n", stages=[{**searched, "cached": True}, failed])
    assert (to_go_on("latest"), to_go_on("n")) == ("good", "good")
    assert to_go_on("export-failed-again") == "export-failed-again"  # by its id
    assert runs.store.resolve("latest").run_id == "export-failed-again"  # to look at
    runs.add("failed-after-its-search", age_s=30, status="failed", stages=[searched, failed])
    assert to_go_on("latest") == "failed-after-its-search"
    runs.add("crashed", age_s=20, status="crashed", stages=[{**searched, "status": "failed"}])
    assert to_go_on("latest") == "crashed"


def test_resolve_without_runs(runs: Runs) -> None:
    with pytest.raises(ArtifactError, match=r"no runs in the workspace .* yet"):
        runs.store.resolve("latest")
    assert not runs.workspace.exists()


# --- life and death ---------------------------------------------------------------------------------------------------


def test_a_killed_run_is_closed_as_crashed(runs: Runs) -> None:
    with child(begin_and_wait, runs.workspace) as process:
        wait_for(lambda: any(len(record.stages) == 2 for record in runs.store.list()))
        assert runs.store.close_dead() == []
        kill(process)
    (closed,) = runs.store.close_dead()
    assert closed == runs.store.load(closed.run_id)
    assert closed.status == "crashed"
    assert closed.error is not None
    assert str(process.pid) in closed.error
    assert closed.finished_at is not None
    assert closed.created_at <= closed.finished_at + timedelta(seconds=1)
    assert [stage.status for stage in closed.stages] == ["completed", "failed"]
    assert runs.store.close_dead() == []


def test_a_run_that_was_left_open_is_closed_after_its_process(runs: Runs) -> None:
    with child(begin_and_leave, runs.workspace) as process:
        run_id = succeed(process).strip()
    assert [record.run_id for record in runs.store.close_dead()] == [run_id]


def test_own_runs_under_way_are_left_alone(runs: Runs) -> None:
    record = runs.store.create(RunDescription())
    assert runs.store.close_dead() == RunStore(runs.workspace).close_dead() == []
    assert runs.store.load(record.run_id).status == "running"


def test_a_pid_that_was_given_away_again_does_not_keep_a_run_alive(runs: Runs) -> None:
    here = runs.store.create(RunDescription()).host
    runs.add("reused", status="running", pid=os.getpid(), host=here, process_started="another time")
    runs.add("alive", status="running", pid=os.getpid(), host=here, process_started=process_start(os.getpid()))
    assert [record.run_id for record in runs.store.close_dead()] == ["reused"]


def test_a_dead_run_of_another_host_is_known_by_its_free_lock(runs: Runs) -> None:
    runs.add("far", status="running")
    assert [record.run_id for record in runs.store.close_dead()] == ["far"]


def test_a_living_run_of_another_host_is_known_by_its_lock(runs: Runs) -> None:
    with child(begin_and_wait, runs.workspace):
        wait_for(lambda: any(len(record.stages) == 2 for record in runs.store.list()))
        (record,) = runs.store.list()
        record.host = "elsewhere"  # as another machine on a shared folder sees it
        runs.store.save(record)
        assert runs.store.close_dead() == []


def test_where_no_lock_can_be_had_nothing_is_closed(runs: Runs) -> None:
    runs.add("one", status="running")
    (runs.workspace / "locks").touch()  # a file where the folder should be
    assert runs.store.close_dead() == []
    assert runs.store.load("one").status == "running"
    assert "cannot be closed" in runs.said[0]


def test_what_a_killed_process_was_writing_is_removed(runs: Runs) -> None:
    running = runs.store.create(RunDescription()).run_id
    dead, alive = (runs.workspace / "runs" / f".tmp-{run_id}-9-9" for run_id in ("20260101-000000-aaaaaa", running))
    dead.touch()
    alive.touch()
    runs.store.close_dead()
    assert (dead.exists(), alive.exists()) == (False, True)


def test_process_start_tells_processes_apart() -> None:
    mine = process_start(os.getpid())
    assert mine is not None
    assert mine == process_start(os.getpid())
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        wait_for(lambda: process_start(other.pid) is not None)
        assert process_start(other.pid) != mine
        other.kill()
        wait_for(lambda: process_start(other.pid) is None)  # a zombie: nobody has waited for it yet
    assert process_start(other.pid) is None
