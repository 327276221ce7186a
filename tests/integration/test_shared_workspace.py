"""Several real processes on one workspace: of one machine, and of two whose clocks and names differ.

Each stage is computed once, nobody is taken for dead who lives, and every run's rows are there.
"""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from flows.goals import Goal
from stages import artifacts, cache, runs, search
from stages.runs import RunRecord, RunStore
from stages.workspace import Workspace
from tests.integration.command_line import blockpruner
from tests.integration.loaded_processes import Command, commands, pipeline
from tests.tiny_models import save_tiny_model, tiny_rows
from tests.unit.child_processes import wait_for

Start = Callable[..., Command]
NUM_TOGETHER = 8


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Models, texts, and room for a workspace."""
    (tmp_path / "cal.txt").write_text("\n".join(tiny_rows(40)))
    (tmp_path / "eval.txt").write_text("\n".join(tiny_rows(30, seed=1)))
    save_tiny_model(tmp_path / "llama")
    save_tiny_model(tmp_path / "other", seed=1)
    return tmp_path


@pytest.fixture
def start(folder: Path) -> Iterator[Start]:
    """Starts a pipeline in a process of its own: model, blocks, what to do before."""
    with commands() as noted:
        number = iter(range(100))

        def begin(
            model: str,
            num_blocks: int,
            *before: tuple[Callable[..., None], Sequence[object]],
            goal: Goal = "search",
        ) -> Command:
            texts = {"calibration": str(folder / "cal.txt"), "eval_text": str(folder / "eval.txt")}
            fields = {"model": str(folder / model), "num_blocks": num_blocks, "num_samples": 30, "sequence_length": 16}
            said = folder / "said" / str(next(number))
            return noted(Command([folder / "ws", goal, fields | texts], said, before, program=pipeline))

        yield begin


def records_of(folder: Path) -> list[RunRecord]:
    return RunStore(folder / "ws").list()


def check_all_is_there(folder: Path) -> None:
    """Every run's rows, each artifact computed by exactly one run, and nothing unfinished."""
    records = records_of(folder)
    assert {record.status for record in records} <= {"completed", "crashed"}
    done = [record for record in records if record.status == "completed"]
    stages = [stage for record in records for stage in record.stages if stage.status == "completed"]
    computed = Counter(stage.fingerprint for stage in stages if not stage.cached)
    used = {stage.fingerprint for stage in stages}
    assert computed == dict.fromkeys(used, 1)
    present = [path.name for path in folder.glob("ws/artifacts/*/*")]
    assert sorted(present) == sorted(map(str, used))  # no unfinished folder either
    query = "SELECT run_id, max(step) AS steps FROM search_steps GROUP BY ALL"
    steps = {row["run_id"]: row["steps"] for row in rows_of(folder, query)}
    assert steps == {record.run_id: record.config["num_blocks"] for record in done}


def rows_of(folder: Path, query: str) -> Any:
    return blockpruner("sql", query, "--workspace", folder / "ws", "--json").json


def pruning_orders(folder: Path) -> list[tuple[str, list[tuple[int, str]]]]:
    query = "SELECT s.*, model FROM search_steps s JOIN runs USING (run_id) ORDER BY run_id, step"
    orders: dict[tuple[str, str], list[tuple[int, str]]] = {}
    for row in rows_of(folder, query):
        orders.setdefault((row["run_id"], row["model"]), []).append((row["layer_index"], row["block_kind"]))
    return [(Path(model).name, order) for (_, model), order in orders.items()]


# --- one machine ------------------------------------------------------------------------------------------------------


def wait_for_the_others(go: str) -> None:
    """In a process about to begin."""
    Path(f"{go}-{os.getpid()}").touch()
    while not Path(go).exists():
        time.sleep(0.01)


def test_eight_pipelines_at_once_compute_each_stage_once(start: Start, folder: Path) -> None:
    go = folder / "go"
    wanted = [("llama", 2)] * 4 + [("other", 2)] * 2 + [("llama", 3)] * 2  # the last share the first's checkpoints
    started = [start(model, num_blocks, (wait_for_the_others, [go]), goal="evaluate") for model, num_blocks in wanted]
    wait_for(lambda: len(list(folder.glob("go-*"))) == NUM_TOGETHER)
    go.touch()
    outcomes = [command.outcome() for command in started]
    assert [outcome.status for outcome in outcomes] == [0] * NUM_TOGETHER, outcomes
    check_all_is_there(folder)
    texts = (
        "SELECT run_id, count(*) AS texts FROM perplexities GROUP BY ALL"  # two of the dense model, two of the pruned
    )
    assert rows_of(folder, f"SELECT DISTINCT texts FROM ({texts})") == [{"texts": 4}]
    orders = pruning_orders(folder)
    assert len(orders) == NUM_TOGETHER
    for model in ("llama", "other"):
        (longest, *_) = sorted((order for name, order in orders if name == model), key=len, reverse=True)
        assert all(order == longest[: len(order)] for name, order in orders if name == model)


# --- two machines -----------------------------------------------------------------------------------------------------


def live_elsewhere(host: str, hours: str) -> None:
    """In a process about to begin: another machine, whose clock is that much ahead (or behind)."""
    ahead = timedelta(hours=float(hours))
    true_time = time.time

    class ShiftedDatetime(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> ShiftedDatetime:
            return super().now(tz) + ahead

    time.time = lambda: true_time() + ahead.total_seconds()
    for module in (runs, artifacts, cache):
        module.datetime = ShiftedDatetime  # type: ignore[attr-defined]
    socket.gethostname = lambda: host


def hold_the_search(folder: str) -> None:
    """In a process about to begin: a search notes that it computes, and is not over before `release` is there."""
    write = search.write_trace

    def held(*arguments: Any) -> None:
        with Path(folder, "computing").open("a") as file:
            file.write(f"{os.getpid()}\n")
        while not Path(folder, "release").exists():
            time.sleep(0.01)
        write(*arguments)

    search.write_trace = held


def searching(folder: Path) -> list[int]:
    """The pids of the processes that have computed the search, in order."""
    path = folder / "computing"
    return [int(line) for line in path.read_text().split()] if path.exists() else []


@pytest.mark.parametrize("hours", [100.0, -100.0])
def test_machines_with_clocks_apart_wait_for_each_other(start: Start, folder: Path, hours: float) -> None:
    hold = (hold_the_search, [str(folder)])
    first = start("llama", 2, hold, (live_elsewhere, ["far", hours]))
    wait_for(lambda: len(searching(folder)) == 1)
    second = start("llama", 2, hold, (live_elsewhere, ["near", -hours]))
    wait_for(lambda: "is being computed by another process: waiting for it" in second.stderr)
    assert {record.status for record in records_of(folder)} == {"running"}
    assert blockpruner("runs", "--workspace", folder / "ws").status == 0  # closes the runs that died
    (folder / "release").touch()
    assert [command.outcome().status for command in (first, second)] == [0, 0]
    assert searching(folder) == [first.pid]
    check_all_is_there(folder)
    assert "had died" not in first.stderr + second.stderr
    by_host = {record.host: record for record in records_of(folder)}
    assert abs(by_host["far"].created_at - by_host["near"].created_at) > timedelta(hours=190)
    assert [stage.cached for stage in by_host["near"].stages if stage.role == "search"] == [True]
    # The newest is the one that began last, whatever the clocks say.
    assert [record.host for record in records_of(folder)] == ["near", "far"]
    (shown,) = blockpruner("show", "latest", "--workspace", folder / "ws", "--json").stdout.splitlines()
    assert by_host["near"].run_id in shown


def test_a_machine_that_died_frees_what_it_held(start: Start, folder: Path) -> None:
    hold = (hold_the_search, [str(folder)])
    doomed = start("llama", 2, hold, (live_elsewhere, ["far", 100.0]))
    wait_for(lambda: len(searching(folder)) == 1)
    other = start("llama", 2, hold)
    wait_for(lambda: "waiting for it" in other.stderr)
    doomed.send(signal.SIGKILL)
    wait_for(lambda: searching(folder) == [doomed.pid, other.pid])
    (folder / "release").touch()
    assert other.outcome().status == 0
    listed = blockpruner("runs", "--workspace", folder / "ws", "--json").json
    assert [run["status"] for run in listed] == ["completed", "crashed"]
    crashed = records_of(folder)[-1]
    assert crashed.host == "far"
    assert crashed.finished_at is not None
    assert crashed.finished_at >= crashed.created_at > datetime.now(UTC) + timedelta(hours=90)
    assert all(stage.seconds >= 0 for stage in crashed.stages)
    check_all_is_there(folder)


def test_a_file_system_without_locks_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise OSError(38, os.strerror(38))

    monkeypatch.setattr(fcntl, "flock", none)
    text = ["--calibration", folder / "cal.txt", "--sequence-length", 16, "--num-samples", "all", "--num-blocks", 1]
    outcome = blockpruner("search", "--model", folder / "llama", *text, "--workspace", folder / "ws")
    assert outcome.status == 2
    (said,) = outcome.stderr.splitlines()
    assert f"the workspace {folder / 'ws'} lies on a file system without locks" in said
    with pytest.raises(OSError, match="Function not implemented"):  # and no lock is made of a file that stays
        Workspace(folder / "ws").lock("any").acquire(timeout=0)
