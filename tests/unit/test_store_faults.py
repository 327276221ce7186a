"""What the results database does when others have it open, when a writer is killed, and when it is torn or lost."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import pytest

from blockpruner.errors import ArtifactError, StoreError
from tests.unit.child_processes import child, succeed, wait_for
from tests.unit.store_lab import Lab


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path / "workspace")


def hold_open(path: str, read_only: str, seconds: str) -> None:
    """In a child process: keep the database open."""
    connection = duckdb.connect(path, read_only=read_only == "True")
    Path(path).with_name("held").touch()
    time.sleep(float(seconds))
    connection.close()


def ingest_one(workspace: str, name: str) -> None:
    """In a child process: a run of its own, ingested thrice."""
    lab = Lab(Path(workspace), wait=30)
    record = lab.run(name, status="running")
    assert lab.results.ingest(record)
    assert lab.results.ingest(record)
    lab.runs.finish(record, "completed")
    assert lab.results.ingest(record)


def die_while_writing(workspace: str) -> None:
    """In a child process: be killed in the middle of a transaction, with a log of changes on disk."""
    connection = duckdb.connect(Path(workspace) / "results.duckdb")
    connection.execute("DELETE FROM exports")
    connection.execute("BEGIN; DELETE FROM runs")
    os.kill(os.getpid(), 9)


# --- others have it ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("read_only", [True, False])
def test_rows_wait_while_another_process_has_the_database(lab: Lab, read_only: bool) -> None:
    lab.results.ingest(lab.run("before"))
    late = lab.run("late")
    with child(hold_open, lab.results.path, read_only, 60) as holder:
        wait_for((lab.workspace / "held").exists)
        started = time.monotonic()
        assert not lab.results.ingest(late)
        assert 0.3 < time.monotonic() - started < 5
        (said,) = lab.said
        assert late.run_id in said
        assert f"process {holder.pid} has the results database open" in said
        assert "\n" not in said
    assert lab.names() == {"before"}
    after = lab.run("after", roles="b")
    assert lab.results.ingest(after)
    assert lab.names() == {"before", "late", "after"}  # the next ingest brings what had to wait
    assert len(lab.rows("search_steps", late)) == 2


def test_an_ingest_outlasts_a_short_hold(lab: Lab) -> None:
    lab.results.ingest(lab.run("before"))
    with child(hold_open, lab.results.path, False, 0.6) as holder:
        wait_for((lab.workspace / "held").exists)
        assert Lab(lab.workspace, wait=20).results.ingest(lab.run("after"))
        succeed(holder)
    assert lab.names() == {"before", "after"}


def test_a_query_outlasts_a_writer_or_says_who_it_is(lab: Lab) -> None:
    lab.results.ingest(lab.run())
    with child(hold_open, lab.results.path, False, 1.5) as holder:
        wait_for((lab.workspace / "held").exists)
        with pytest.raises(StoreError, match=rf"process {holder.pid} has .* try again later"):
            lab.results.query("FROM runs", wait=0.2)
        assert lab.results.query("SELECT name FROM runs", wait=20).rows == [("night",)]


def test_a_query_works_beside_another_reader(lab: Lab) -> None:
    lab.results.ingest(lab.run())
    with child(hold_open, lab.results.path, True, 60):
        wait_for((lab.workspace / "held").exists)
        assert lab.names() == {"night"}


def test_a_rebuild_does_not_pull_the_file_from_under_a_writer(lab: Lab) -> None:
    lab.results.ingest(lab.run())
    inode = lab.results.path.stat().st_ino
    with child(hold_open, lab.results.path, False, 60):
        wait_for((lab.workspace / "held").exists)
        with pytest.raises(StoreError, match="open"):
            lab.results.rebuild()
    assert lab.results.path.stat().st_ino == inode


def test_many_processes_store_their_runs_at_once(lab: Lab) -> None:
    names = [f"run{number}" for number in range(4)]
    children = [child(ingest_one, lab.workspace, name) for name in names]
    processes = [each.__enter__() for each in children]
    try:
        for process in processes:
            succeed(process)
    finally:
        for each in children:
            each.__exit__(None, None, None)
    found = lab.results.query("SELECT name, count(*) FROM runs JOIN search_steps USING (run_id) GROUP BY ALL").rows
    assert sorted(found) == [(name, 2) for name in names]


def test_killed_while_writing(lab: Lab) -> None:
    lab.results.ingest(lab.run("first"))
    with child(die_while_writing, lab.workspace) as process:
        process.wait(30)
    assert lab.names() == {"first"}
    assert lab.results.ingest(lab.run("second"))
    assert lab.names() == {"first", "second"}


# --- lost and found ---------------------------------------------------------------------------------------------------


def three_runs(lab: Lab) -> dict[str, list[tuple[Any, ...]]]:
    for name, status, roles in (("a", "completed", "bsxdp"), ("b", "failed", "bs"), ("c", "running", "b")):
        lab.results.ingest(lab.run(name, status, roles))
    return lab.dump()


def test_rebuild_equals_ingest(lab: Lab) -> None:
    before = three_runs(lab)
    assert len(before["runs"]) == 3
    assert lab.results.rebuild() == 3
    assert lab.dump() == before
    lab.results.path.unlink()
    assert lab.results.rebuild(lab.runs.list()) == 3
    assert lab.dump() == before
    assert lab.said == ["results.duckdb is missing"]
    assert [path.name for path in lab.workspace.glob("*results*")] == ["results.duckdb"]


def tear(path: Path) -> None:
    os.truncate(path, 5000)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def overwrite(path: Path) -> None:
    path.write_bytes(b"not a database" * 1000)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[12300] ^= 0xFF
    path.write_bytes(content)


def foreign_log(path: Path) -> None:
    """A log of changes of another database, as is left where the file was deleted and made anew by hand."""
    other = path.with_name("other.duckdb")
    with child(make_log, other) as process:
        process.wait(30)
    other.with_name("other.duckdb.wal").rename(path.with_name(path.name + ".wal"))


def make_log(path: str) -> None:
    connection = duckdb.connect(path)
    connection.execute("CREATE TABLE other (a INT)")
    os.kill(os.getpid(), 9)


def other_tables(path: Path) -> None:
    path.unlink()
    with duckdb.connect(path) as connection:
        connection.execute("CREATE TABLE runs (run_id INT)")


def other_version(path: Path) -> None:
    with duckdb.connect(path) as connection:
        connection.execute("UPDATE schema_info SET schema_digest = 'older'")


LOSSES = [tear, empty, overwrite, flip, foreign_log, other_tables, other_version, Path.unlink]


@pytest.mark.parametrize("lose", LOSSES)
def test_a_lost_database_is_said_and_made_anew_for_a_query(lab: Lab, lose: Callable[[Path], None]) -> None:
    before = three_runs(lab)
    lose(lab.results.path)
    assert lab.dump() == before
    (said,) = lab.said
    assert re.match(r"results.duckdb (is missing|is damaged|has the tables of another version): made anew from 3", said)


@pytest.mark.parametrize("lose", [tear, Path.unlink])
def test_a_lost_database_is_said_and_made_anew_for_an_ingest(lab: Lab, lose: Callable[[Path], None]) -> None:
    three_runs(lab)
    lose(lab.results.path)
    assert lab.results.ingest(lab.run("d"))
    assert lab.names() == {"a", "b", "c", "d"}
    assert len(lab.said) == 1


@pytest.mark.parametrize("write", [lambda lab: lab.results.rebuild(), lambda lab: lab.results.ingest(lab.run("d"))])
def test_what_a_killed_rebuild_left_is_removed_by_whoever_writes_next(lab: Lab, write: Callable[[Lab], object]) -> None:
    three_runs(lab)
    (lab.workspace / "results.duckdb.tmp-99").write_text("half")
    (lab.workspace / "results.duckdb.tmp-99.wal").write_text("half")
    write(lab)
    assert [path.name for path in lab.workspace.glob("*results*")] == ["results.duckdb"]


def test_a_database_that_cannot_be_written_does_not_stop_a_run(lab: Lab) -> None:
    run = lab.run()
    lab.results.path.mkdir()
    assert not lab.results.ingest(run)
    assert "they wait in the artifacts" in lab.said[-1]
    with pytest.raises(StoreError):
        lab.results.rebuild()
    lab.results.path.rmdir()
    assert lab.results.rebuild() == 1
    assert lab.names() == {"night"}


def test_a_crashed_run_is_a_row_too(lab: Lab) -> None:
    run = lab.run(status="running")
    lab.results.ingest(run)
    lab.runs.finish(run, "crashed", "gone")
    assert lab.results.ingest(lab.run("next"))  # brings it, though nobody ingested it
    assert lab.results.query("SELECT status, error FROM runs WHERE name = 'night'").rows == [("crashed", "gone")]


# --- a record that no column can hold ---------------------------------------------------------------------------------


def spoil(lab: Lab, name: str, **fields: object) -> str:
    """A finished run whose record holds what the tables cannot, as a version without bounds could write it."""
    record = lab.run(name, roles="b")
    path = lab.workspace / "runs" / f"{record.run_id}.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return record.run_id


@pytest.mark.parametrize(
    "fields",
    [
        {"num_samples": 10**23},
        {"sequence_length": 2**63},
        {"seed": 10**400},
        {"created_at": "0001-01-01T00:00:00+14:00"},
    ],
    ids=str,
)
def test_a_record_that_cannot_be_stored_is_named_once_and_stops_no_other(lab: Lab, fields: dict[str, object]) -> None:
    lab.results.ingest(lab.run("before"))
    spoiled = spoil(lab, "spoiled", **fields)
    assert lab.results.ingest(lab.run("after"))
    (said,) = lab.said
    assert f"run {spoiled} is left out of results.duckdb" in said
    assert "\n" not in said
    assert lab.names() == {"before", "after"}
    lab.said.clear()
    assert lab.results.ingest(lab.run("later"))
    assert lab.said == []  # known, and not tried again
    assert lab.results.rebuild() == 4
    assert [spoiled in line for line in lab.said] == [True]
    assert lab.names() == {"before", "after", "later"}


def test_a_record_that_was_mended_is_stored(lab: Lab) -> None:
    spoiled = spoil(lab, "spoiled", num_samples=10**23)
    lab.results.ingest(lab.run("first"))
    path = lab.workspace / "runs" / f"{spoiled}.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_samples": 3}))
    lab.results.ingest(lab.run("second"))
    assert lab.names() == {"spoiled", "first", "second"}
    assert lab.results.query("FROM skipped_runs").rows == []


def test_the_run_itself_may_be_the_one_that_cannot_be_stored(lab: Lab) -> None:
    record = lab.runs.load(spoil(lab, "spoiled", num_samples=10**23))
    lab.results.ingest(record)
    assert [record.run_id in line for line in lab.said] == [True]
    lab.results.ingest(lab.run("after"))
    assert lab.names() == {"after"}


# --- somebody else made it --------------------------------------------------------------------------------------------


def forged(lab: Lab, *statements: str) -> None:
    with duckdb.connect(lab.results.path) as connection:
        views = connection.execute("SELECT view_name FROM duckdb_views() WHERE NOT internal").fetchall()
        for statement in [*(f"DROP VIEW IF EXISTS {view} CASCADE" for (view,) in views), *statements]:
            connection.execute(statement)


@pytest.mark.parametrize(
    "statements",
    [
        ("ALTER TABLE skipped_runs RENAME TO kept", "CREATE VIEW skipped_runs AS FROM kept"),
        ("ALTER TABLE runs RENAME TO kept", "CREATE VIEW runs AS FROM kept"),
        ("ALTER TABLE exports DROP COLUMN verified",),
        ("ALTER TABLE exports ALTER COLUMN bytes TYPE VARCHAR",),
        ("ALTER TABLE exports ALTER COLUMN verified_with SET DEFAULT 'x'",),
        ("ALTER TABLE runs RENAME TO kept", "CREATE SCHEMA other", "CREATE TABLE other.runs AS FROM kept"),
    ],
)
@pytest.mark.parametrize("reads", [True, False])
def test_tables_that_are_not_ours_are_made_anew(statements: tuple[str, ...], reads: bool, lab: Lab) -> None:
    before, late = lab.run("before"), lab.run("late")
    lab.results.rebuild()
    expected = lab.dump()
    lab.results.rebuild([before])
    forged(lab, *statements)
    lab.said.clear()
    if not reads:
        assert lab.results.ingest(late)
    assert lab.dump() == expected
    (said,) = lab.said
    assert said.startswith("results.duckdb has other tables than BlockPruner makes: made anew from ")


def test_nothing_but_the_database_is_within_reach_of_any_connection(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a view, a macro or a default of somebody else's asks for."""
    run = lab.run()
    (lab.workspace / "secret").write_text("s")
    connect, reached = duckdb.connect, list[str]()

    class Probing:
        """What is connected, tried out before it closes."""

        def __init__(self, connection: duckdb.DuckDBPyConnection) -> None:
            self.connection = connection

        def __getattr__(self, name: str) -> Any:
            return getattr(self.connection, name)

        def execute(self, *asked: Any) -> Any:
            found = self.connection.execute(*asked)
            return self if found is self.connection else found

        def close(self) -> None:
            for attempt in (
                f"FROM read_text('{lab.workspace / 'secret'}')",
                f"COPY (SELECT 1) TO '{lab.workspace / 'copy'}'",
                f"ATTACH '{lab.workspace / 'other'}'",
                "INSTALL httpfs",
                "LOAD httpfs",
                "SET enable_external_access = true",
                "SET autoload_known_extensions = true",
                "SET threads = 1",
            ):
                try:
                    self.connection.execute(attempt)
                except (duckdb.PermissionException, duckdb.InvalidInputException):
                    continue
                except duckdb.Error as error:
                    reached.append(f"{attempt}: {error}")
                else:
                    reached.append(attempt)
            self.connection.close()

    made = list[object]()

    def probed(*given: Any, **named: Any) -> Any:
        made.append(given)
        return Probing(connect(*given, **named))

    monkeypatch.setattr(duckdb, "connect", probed)
    assert lab.results.ingest(run)
    assert lab.names() == {"night"}
    lab.results.forget([run.run_id])
    lab.results.rebuild()
    assert len(made) >= 5
    assert reached == []


def test_a_path_that_the_database_cannot_have_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="is not UTF-8"):
        Lab(tmp_path / os.fsdecode(b"w\xff"))
