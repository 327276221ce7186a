"""An order to end that comes while native code computes, which makes another error of it: the run was cancelled."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import duckdb
import pytest

from flows import reporter
from stages import store
from tests.integration.command_line import blockpruner
from tests.integration.command_line import start as start_process
from tests.integration.loaded_processes import Command, commands
from tests.tiny_models import tiny_rows
from tests.unit.child_processes import child, succeed, wait_for
from tests.unit.store_lab import Lab

_LONG_QUERY = "SELECT sum(a.range * b.range) FROM range(1000000) a, range(1000000) b"
"""Hours. With one thread DuckDB heeds signals meanwhile, with several only at times."""


@pytest.fixture
def search(tmp_path: Path, tiny_folder: Callable[[str], Path]) -> Sequence[object]:
    (tmp_path / "cal.txt").write_text("\n".join(tiny_rows(40)))
    text = ["--calibration", tmp_path / "cal.txt", "--sequence-length", 16, "--num-samples", "all"]
    return ["search", "--model", tiny_folder("llama"), *text, "--num-blocks", 1, "--workspace", tmp_path / "ws"]


@pytest.fixture
def start() -> Iterator[Callable[[Command], Command]]:
    with commands() as noted:
        yield noted


def compute_long(marker: str) -> None:
    """In a process about to become a command: its first writing of rows takes DuckDB hours."""
    replace = store._replace_rows

    def slowly(connection: duckdb.DuckDBPyConnection, rows: Any) -> None:
        if not Path(marker).exists():
            Path(marker).touch()
            connection.execute(_LONG_QUERY)
        replace(connection, rows)

    store._replace_rows, store._CONFIG = slowly, {**store._CONFIG, "threads": 1}


def fail_when_interrupted(marker: str) -> None:
    """In a process about to become a command: native code that loses the interruption, and fails for it."""
    replace = store._replace_rows

    def lose(connection: duckdb.DuckDBPyConnection, rows: Any) -> None:
        if Path(marker).exists():
            return replace(connection, rows)
        Path(marker).touch()
        with contextlib.suppress(KeyboardInterrupt):
            time.sleep(60)
        raise RuntimeError("the schema could not be built")

    store._replace_rows = lose


def check_cancelled(command: Command, status: int, search: Sequence[object], workspace: Path) -> None:
    outcome = command.outcome(30)
    assert outcome.status == status, outcome
    said, resume, _ = outcome.stderr.splitlines()[-1].split("`")
    assert said.endswith("give the same command again, or ")
    assert "Traceback" not in outcome.stderr
    (run,) = blockpruner("runs", "--workspace", workspace, "--json").json
    assert run["status"] == "cancelled"
    assert run["error"].startswith("cancelled; give the same command again")
    assert shlex.split(resume) == ["blockpruner", "resume", run["run_id"], "--workspace", str(workspace)]
    assert blockpruner(*shlex.split(resume)[1:]).status == 0
    assert blockpruner(*search).status == 0
    rows = blockpruner("sql", "SELECT status FROM runs ORDER BY created_at", "--workspace", workspace, "--json")
    assert [row["status"] for row in rows.json] == ["cancelled", "completed", "completed"]


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_an_order_to_end_while_duckdb_computes_cancels_the_run(
    sent: signal.Signals,
    status: int,
    search: Sequence[object],
    start: Callable[[Command], Command],
    tmp_path: Path,
) -> None:
    marker = tmp_path / "computing"
    command = start(Command(search, tmp_path / "said", [(compute_long, [marker])]))
    wait_for(marker.exists)
    time.sleep(0.3)  # from the marker to the query; too early a signal is an easier one
    command.send(sent)
    check_cancelled(command, status, search, tmp_path / "ws")


def test_an_order_to_end_that_becomes_another_error_cancels_the_run(
    search: Sequence[object], start: Callable[[Command], Command], tmp_path: Path
) -> None:
    marker = tmp_path / "computing"
    command = start(Command(search, tmp_path / "said", [(fail_when_interrupted, [marker])]))
    wait_for(marker.exists)
    time.sleep(0.1)
    command.send(signal.SIGTERM)
    check_cancelled(command, 143, search, tmp_path / "ws")


def swallow_it(marker: str) -> None:
    """In a process about to become a command: a library that is told to end while it reports, and goes on."""
    progress = reporter._LineProgress.__call__

    def swallow(self: Any, report: Any) -> None:
        progress(self, report)
        if not Path(marker).exists():
            with contextlib.suppress(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGTERM)
            Path(marker).touch()

    reporter._LineProgress.__call__ = swallow  # type: ignore[method-assign]


def test_an_order_to_end_that_a_library_swallows_is_heeded(
    search: Sequence[object], start: Callable[[Command], Command], tmp_path: Path
) -> None:
    command = start(Command(search, tmp_path / "said", [(swallow_it, [tmp_path / "swallowed"])]))
    check_cancelled(command, 143, search, tmp_path / "ws")


def ingest_long(workspace: str) -> None:
    """In a child process: store a run's rows, which takes DuckDB hours."""
    lab = Lab(Path(workspace))
    compute_long(str(Path(workspace, "computing")))
    try:
        lab.results.ingest(lab.run())
    except KeyboardInterrupt:
        sys.stdout.write("interrupted")


def test_the_store_gives_an_interruption_back_as_what_it_is(tmp_path: Path) -> None:
    """For whoever has handlers of his own, as Prefect's worker has."""
    with child(ingest_long, tmp_path / "ws") as process:
        wait_for((tmp_path / "ws" / "computing").exists)
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        assert succeed(process) == "interrupted"


def test_a_run_whose_words_find_no_reader_has_crashed_and_was_not_cancelled(
    search: Sequence[object], tmp_path: Path
) -> None:
    """As that of a worker of Prefect's that was killed: rich, which writes the lines, ends the process."""
    process = start_process(*search)
    assert process.stderr is not None
    assert process.stderr.readline().startswith("loading ")
    process.stderr.close()
    assert process.wait(120) == 1
    process.stdout.close() if process.stdout else None
    (run,) = blockpruner("runs", "--workspace", tmp_path / "ws", "--json").json
    assert run["status"] == "crashed"
    assert run["error"].startswith("nobody reads any more what the run says: ")
    assert f"`blockpruner resume {run['run_id']}` goes on with it" in run["error"]
    assert blockpruner("resume", run["run_id"], "--workspace", tmp_path / "ws").status == 0
