"""The results database, held open by another process or lost, while real pipelines run: no run waits long or fails.

What had to wait comes with the next run, or with `db rebuild`.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import duckdb
import pytest

from flows import runner
from flows.reporter import Reporter
from stages.runs import RunRecord
from stages.store import ResultStore
from tests.integration.command_line import Outcome, blockpruner
from tests.tiny_models import tiny_rows
from tests.unit.child_processes import child, succeed, wait_for

_PASSING_S, _END_S = 0.2, 1.0
"""How long a run waits for the database, after a stage and at its end, in place of a second and twenty."""
NUM_LOSSES = 12
TABLES = ("runs", "stage_runs", "search_steps", "block_scores", "perplexities")


@pytest.fixture
def search(tmp_path: Path, tiny_folder: Callable[[str], Path]) -> Callable[..., Outcome]:
    """Searches in this process, in the workspace `ws`."""
    (tmp_path / "cal.txt").write_text("\n".join(tiny_rows(40)))
    text = ["--calibration", tmp_path / "cal.txt", "--sequence-length", 16, "--num-samples", "all"]
    whole = ["--model", tiny_folder("llama"), *text, "--workspace", tmp_path / "ws", "--json"]
    return lambda num_blocks: blockpruner("search", *whole, "--num-blocks", num_blocks)


@pytest.fixture
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    begin = ResultStore.__init__

    def init(self: ResultStore, path: Path, *arguments: Any, wait: float = _END_S) -> None:
        begin(self, path, *arguments, wait=wait)

    monkeypatch.setattr(ResultStore, "__init__", init)
    monkeypatch.setattr(runner, "_BRIEF_WAIT_S", _PASSING_S)


@pytest.fixture
def hold(tmp_path: Path) -> Iterator[Callable[[bool], Callable[[], None]]]:
    """Has another process open the database; gives what ends that."""
    with ExitStack() as stack:

        def begin(read_only: bool) -> Callable[[], None]:
            until = tmp_path / "until"
            until.unlink(missing_ok=True)
            holder = stack.enter_context(child(hold_open, tmp_path / "ws" / "results.duckdb", read_only, until))
            wait_for((tmp_path / "ws" / "held").exists)

            def end() -> None:
                until.touch()
                succeed(holder)

            return end

        yield begin


def hold_open(path: str, read_only: str, until: str) -> None:
    """In a child process: keep the database open until a file is there."""
    connection = duckdb.connect(path, read_only=read_only == "True")
    Path(path).with_name("held").touch()
    while not Path(until).exists():
        time.sleep(0.02)
    connection.close()


def steps(tmp_path: Path) -> dict[str, int]:
    """Rows of each run's search, as SQL has them."""
    query = "SELECT run_id, count(step) AS steps FROM runs LEFT JOIN search_steps USING (run_id) GROUP BY ALL"
    rows = blockpruner("sql", query, "--workspace", tmp_path / "ws", "--json").json
    return {row["run_id"]: row["steps"] for row in rows}


def test_a_run_that_is_stopped_does_not_wait_for_the_database(
    search: Callable[..., Outcome],
    hold: Callable[[bool], Callable[[], None]],
    short_waits: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its rows come with the next run; whoever stops it (Prefect's worker, systemd) kills it after some seconds."""
    search(1)
    let_go = hold(False)
    waits: list[tuple[str, float]] = []
    ingest = ResultStore.ingest

    def noting(self: ResultStore, record: RunRecord) -> bool:
        waits.append((record.status, self._wait))
        return ingest(self, record)

    with monkeypatch.context() as patch:
        patch.setattr(ResultStore, "ingest", noting)
        patch.setattr(Reporter, "stage_ended", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
        stopped = search(2)
    assert stopped.status == 143
    assert stopped.stderr.count("they wait in the artifacts, and the next run") == 1
    assert waits[-1] == ("cancelled", _PASSING_S)
    let_go()
    search(2)
    rows = blockpruner("sql", "SELECT status FROM runs ORDER BY created_at", "--workspace", tmp_path / "ws", "--json")
    assert [row["status"] for row in rows.json] == ["completed", "cancelled", "completed"]


@pytest.mark.usefixtures("short_waits")
@pytest.mark.parametrize("read_only", [True, False], ids=["reading", "writing"])
def test_a_run_goes_on_while_another_has_the_database_and_db_rebuild_brings_its_rows(
    search: Callable[..., Outcome], hold: Callable[[bool], Callable[[], None]], read_only: bool, tmp_path: Path
) -> None:
    first = search(1).json["run_id"]
    end = hold(read_only)
    outcome = search(2)
    late = outcome.json["run_id"]
    assert len(outcome.json["pruning_order"]) == 2  # it has its results, and shows them without the database
    (said,) = [line for line in outcome.stderr.splitlines() if line.startswith("Warning: ")]
    assert f"the rows of run {late} are not in results.duckdb yet" in said
    assert "they wait in the artifacts, and the next run or `blockpruner db rebuild` brings them" in said
    refused = blockpruner("db", "rebuild", "--workspace", tmp_path / "ws")
    assert refused.status == 2
    assert "has the results database open" in refused.stderr
    end()
    assert steps(tmp_path) == {first: 1}
    assert blockpruner("db", "rebuild", "--workspace", tmp_path / "ws").status == 0
    assert steps(tmp_path) == {first: 1, late: 2}


@pytest.mark.usefixtures("short_waits")
def test_rows_that_waited_come_with_the_next_run(
    search: Callable[..., Outcome], hold: Callable[[bool], Callable[[], None]], tmp_path: Path
) -> None:
    first = search(1).json["run_id"]
    end = hold(False)
    late = search(2).json["run_id"]
    end()
    last = search(3).json["run_id"]
    assert steps(tmp_path) == {first: 1, late: 2, last: 3}


def test_rows_arrive_when_the_database_is_free_again(
    search: Callable[..., Outcome],
    hold: Callable[[bool], Callable[[], None]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Held from before the run's first stage until a second after its last: the wait at its end outlasts that."""
    first = search(1).json["run_id"]
    end = hold(False)
    monkeypatch.setattr(runner, "_BRIEF_WAIT_S", _PASSING_S)
    finish = runner.Runner._end

    def finish_while_it_ends(*arguments: Any) -> None:
        soon = threading.Timer(1.0, end)
        soon.start()
        finish(*arguments)
        soon.join()

    monkeypatch.setattr(runner.Runner, "_end", finish_while_it_ends)
    outcome = search(2)
    assert steps(tmp_path) == {first: 1, outcome.json["run_id"]: 2}


# --- lost -------------------------------------------------------------------------------------------------------------


def rows_of(workspace: Path, said: list[str]) -> dict[str, list[Any]]:
    results = ResultStore(workspace / "results.duckdb", said.append)
    return {table: sorted(map(repr, results.query(f"FROM {table}").rows)) for table in TABLES}


def test_a_database_torn_at_any_place_answers_as_before(search: Callable[..., Outcome], tmp_path: Path) -> None:
    """Cut off, or one byte changed: either that was in no row, or it is said, and made anew from the artifacts."""
    search(1)
    search(3)
    said: list[str] = []
    whole, file = rows_of(tmp_path / "ws", said), tmp_path / "ws" / "results.duckdb"
    content, draw = file.read_bytes(), random.Random(5)
    made_anew = 0
    for number in range(NUM_LOSSES):
        place = draw.randrange(len(content))
        torn = (
            content[:place] if number % 2 else content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :]
        )
        file.write_bytes(torn)
        said.clear()
        assert rows_of(tmp_path / "ws", said) == whole, (number, place, said)
        assert all(": made anew from 2 run records and their artifacts" in line for line in said)
        made_anew += bool(said)
    assert made_anew >= NUM_LOSSES // 2


@pytest.mark.parametrize("lose", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:9000])])
def test_a_pipeline_that_finds_its_database_lost_says_so_and_brings_all(
    search: Callable[..., Outcome], lose: Callable[[Path], object], tmp_path: Path
) -> None:
    first = search(1).json["run_id"]
    lose(tmp_path / "ws" / "results.duckdb")
    outcome = search(2)
    said = [line for line in outcome.stderr.splitlines() if line.startswith("Warning: ")]
    assert len(said) == 1, said
    assert "made anew from" in said[0]
    assert steps(tmp_path) == {first: 1, outcome.json["run_id"]: 2}
