"""The rows of the results database against ones written by hand, and queries that may only read."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from blockpruner.errors import StoreError
from stages import store, store_schema
from stages.runs import StageRun
from tests.unit.store_lab import EXPORT, TABLES, Lab


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path / "workspace")


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """One run, for tests that change nothing."""
    lab = Lab(tmp_path_factory.mktemp("filled"))
    lab.results.ingest(lab.run())
    return lab


# --- rows -------------------------------------------------------------------------------------------------------------


def test_tables_have_the_contracts_columns(filled: Lab) -> None:
    for table, columns in TABLES.items():
        found = filled.results.query(f"DESCRIBE {table}").rows
        assert [name for name, *_ in found][: len(columns)] == columns
    assert {name: kind for name, kind, *_ in filled.results.query("DESCRIBE runs").rows}["config"] == "JSON"


def test_row_types_are_the_tables_columns() -> None:
    rows = {row._fields for row in vars(store_schema).values() if hasattr(row, "_fields")}
    assert rows == {tuple(columns) for columns in store_schema.TABLES.values()}


@pytest.mark.parametrize(
    ("query", "columns"),
    [
        ("SELECT 1 AS a, 2 AS a, 3 AS a", ["a", "a_1", "a_2"]),
        ("SELECT 1 AS a, 2 AS a, 3 AS a_1", ["a", "a_2", "a_1"]),
        ("SELECT run_id, s.run_id FROM runs JOIN search_steps s USING (run_id)", ["run_id", "run_id_1"]),
    ],
)
def test_no_column_hides_another(query: str, columns: list[str], filled: Lab) -> None:
    assert filled.results.query(query).columns == columns


def test_every_number_of_a_run_is_there(lab: Lab) -> None:
    run = lab.run()
    assert lab.results.ingest(run)
    assert lab.said == []
    assert lab.rows("search_steps", run) == [
        (1, 1, "mha", 6.0, 6.0, 150, 0.15, 0.5),
        (2, 0, "mlp", 7.0, 7.0, 300, 0.3, 0.5),
    ]
    nan, inf = pytest.approx(math.nan, nan_ok=True), math.inf
    assert lab.rows("block_scores", run) == [
        (1, 0, "mha", 9.5, 9.5, 3, False),
        (1, 0, "mlp", 8.0, 8.0, 2, False),
        (1, 1, "mha", 6.0, 6.0, 1, True),
        (1, 1, "mlp", nan, nan, 4, False),
        (2, 0, "mha", inf, inf, 3, False),
        (2, 0, "mlp", 7.0, 7.0, 1, True),
        (2, 1, "mlp", 7.5, 7.5, 2, False),
    ]
    assert lab.rows("perplexities", run) == [
        ("dense", "calibration", 0, 512, 5.0),
        ("dense", "wikitext2", 0, 900, 5.47),
        ("pruned", "calibration", 2, 512, 7.0),
        ("pruned", "wikitext2", 2, 900, inf),
    ]
    assert lab.rows("evaluations", run) == [
        ("dense", "piqa", "acc", 0.78, 0.01, 0, 100),
        ("pruned", "piqa", "acc", nan, None, None, 100),
    ]
    path = str(lab.workspace / str(run.stages[2].artifact_path) / "model")
    assert lab.rows("exports", run) == [("stock", path, 2, 700, 2800, True, 0.0)]


def test_the_run_and_its_stages_are_there(lab: Lab) -> None:
    run = lab.run()
    failed = StageRun(stage="export", label="export", role="export", status="failed", error="no\nroom", seconds=2.5)
    run.stages.append(failed)
    lab.runs.finish(run, "failed", "it's no good")
    assert lab.results.ingest(run)
    (row,) = lab.rows("runs", run)
    values = dict(zip(TABLES["runs"][1:], row, strict=True))
    assert {"name": "night", "status": "failed", "model": "a model", "seed": 42, "error": "it's no good"}.items() <= (
        values.items()
    )
    assert json.loads(values["config"]) == {"k": [2]}
    assert values["created_at"] == run.created_at.astimezone(UTC).replace(tzinfo=None)
    assert values["num_sequences"] is None
    stages = lab.rows("stage_runs", run)
    assert len(stages) == 6
    expected = ("export", None, False, failed.started_at.replace(tzinfo=None), 2.5, "failed", None, "no\nroom")
    assert expected in stages
    assert {stage[6] for stage in stages} == {None, *(s.artifact_path for s in run.stages if s.artifact_path)}


@pytest.mark.parametrize(
    ("roles", "expected"),
    [
        ("s", [("dense", "calibration", 0, None, 5.0), ("pruned", "calibration", 2, None, 7.0)]),
        ("b", [("dense", "calibration", 0, 512, 5.0), ("dense", "wikitext2", 0, 900, 5.47)]),
        ("p", [("pruned", "wikitext2", None, 900, math.inf)]),
        ("d", []),
        ("", []),
    ],
)
def test_a_single_stage_gives_what_it_knows(lab: Lab, roles: str, expected: list[tuple[Any, ...]]) -> None:
    run = lab.run(roles=roles)
    assert lab.results.ingest(run)
    assert lab.rows("perplexities", run) == expected


def test_the_searchs_perplexity_is_that_of_the_exported_number_of_blocks(lab: Lab) -> None:
    run = lab.run(roles="s")
    run.stages.append(lab.artifact("export", {**EXPORT, "num_blocks_removed": 1}, "one"))
    lab.results.ingest(run)
    assert ("pruned", "calibration", 1, None, 6.0) in lab.rows("perplexities", run)


def test_an_evaluated_calibration_set_goes_before_the_searchs(lab: Lab) -> None:
    run = lab.run(roles="sx")
    text = {"text": "calibration", "num_tokens": 512, "perplexity": 7.25}
    run.stages.append(lab.artifact("evaluate:pruned", {"texts": [text]}, "own"))
    lab.results.ingest(run)
    assert lab.rows("perplexities", run)[1:] == [("pruned", "calibration", 2, 512, 7.25)]


def test_ingest_replaces_the_runs_own_rows_only(lab: Lab) -> None:
    first, second = lab.run("first"), lab.run("second", roles="b")
    lab.results.ingest(first)
    lab.results.ingest(second)
    before = lab.dump()
    lab.results.ingest(first)
    lab.results.ingest(second)
    assert lab.dump() == before
    first.stages.pop()
    lab.results.ingest(first)
    assert len(lab.rows("evaluations", first)) == 1
    assert len(lab.rows("perplexities", second)) == 2


# --- artifacts that cannot be read ------------------------------------------------------------------------------------


def change_trace(folder: Path) -> None:
    path = folder / "trace.jsonl"
    path.write_text(path.read_text().replace("7.5", "7.4"))


def tear_trace(folder: Path) -> None:
    os.truncate(folder / "trace.jsonl", 100)


def lose_trace(folder: Path) -> None:
    (folder / "trace.jsonl").unlink()


def lose_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


@pytest.mark.parametrize("damage", [change_trace, tear_trace, lose_trace, lose_manifest, shutil.rmtree])
def test_a_damaged_artifact_is_said_and_the_rest_is_stored(lab: Lab, damage: Callable[[Path], None]) -> None:
    run = lab.run()
    search = run.stage("search")
    assert search is not None
    damage(lab.workspace / str(search.artifact_path))
    assert lab.results.ingest(run)
    (said,) = lab.said
    assert f"{search.artifact_path}" in said
    assert said.endswith("its rows are left out")
    assert lab.rows("search_steps", run) == []
    assert len(lab.rows("evaluations", run)) == 2
    assert len(lab.rows("exports", run)) == 1


def test_an_artifact_of_another_shape_is_said(lab: Lab) -> None:
    run = lab.run(roles="b")
    run.stages.append(lab.artifact("export", {"format": "stock"}, "odd"))
    assert lab.results.ingest(run)
    assert "does not fit" in lab.said[0]
    assert len(lab.rows("perplexities", run)) == 2


def test_a_record_cannot_point_out_of_the_workspace(lab: Lab, tmp_path: Path) -> None:
    outside = Lab(tmp_path / "outside").run()
    run = lab.run(roles="b")
    escape = f"../outside/{outside.stages[1].artifact_path}"
    run.stages.append(outside.stages[1].model_copy(update={"artifact_path": escape}))
    assert lab.results.ingest(run)
    assert lab.rows("search_steps", run) == []
    assert "leads out of the workspace" in lab.said[0]


# --- reading only -----------------------------------------------------------------------------------------------------


def test_a_query_gives_columns_and_rows(filled: Lab) -> None:
    columns, rows = filled.results.query("SELECT name, 1 + 1 AS two, created_at FROM runs")
    assert columns == ["name", "two", "created_at"]
    assert rows[0][:2] == ("night", 2)
    assert isinstance(rows[0][2], datetime)


@pytest.mark.parametrize(
    "sql",
    [
        "FROM runs",
        "WITH a AS (SELECT 1) SELECT * FROM a",
        "SHOW TABLES",
        "DESCRIBE runs",
        "SUMMARIZE search_steps",
        "EXPLAIN SELECT 1",
        "VALUES (1)",
        "SELECT config->>'k' FROM runs;",
        "PIVOT block_scores ON block_kind USING avg(score)",
        "-- a comment\nSELECT 1",
    ],
)
def test_what_reads_is_answered(filled: Lab, sql: str) -> None:
    assert filled.results.query(sql).rows


@pytest.mark.parametrize(
    "sql",
    [
        "INSERT INTO runs SELECT * FROM runs",
        "DELETE FROM runs",
        "UPDATE runs SET name = 'x'",
        "DROP TABLE runs",
        "CREATE TABLE x (a INT)",
        "CREATE TEMP TABLE x (a INT)",
        "ALTER TABLE runs ADD COLUMN x INT",
        "EXPLAIN ANALYZE DELETE FROM runs",
        "COPY runs TO '{out}'",
        "COPY (SELECT 1) TO '{out}'",
        "COPY runs FROM '{secret}'",
        "IMPORT DATABASE '{out}'",
        "FROM read_duckdb('{secret}')",
        "FROM read_csv_auto('{secret}')",
        "FROM parquet_metadata('{secret}')",
        "FROM query('FROM ''{secret}'' ')",
        "FROM duckdb_extensions()",
        "SELECT getenv('HOME')",
        "FROM lab",
        "PRAGMA enable_profiling",
        "FORCE INSTALL json",
        "EXPLAIN ANALYZE COPY runs TO '{out}'",
        "EXPORT DATABASE '{out}'",
        "ATTACH '{out}'",
        "ATTACH ':memory:' AS x",
        "DETACH results",
        "USE memory",
        "SELECT * FROM read_csv('{secret}')",
        "SELECT * FROM read_text('{secret}')",
        "SELECT * FROM read_blob('{secret}')",
        "SELECT * FROM read_json('{secret}')",
        "SELECT * FROM read_parquet('{secret}')",
        "SELECT * FROM sniff_csv('{secret}')",
        "SELECT * FROM glob('{secret}')",
        "SELECT * FROM '{secret}'",
        "SELECT * FROM query('COPY runs TO ''{out}''')",
        "FROM enable_logging(storage='file', storage_path='{out}')",
        "CALL enable_logging(storage='file', storage_path='{out}')",
        "PRAGMA database_list",
        "PRAGMA threads=1",
        "SET threads = 1",
        "SET enable_external_access = true",
        "RESET lock_configuration",
        "INSTALL httpfs",
        "LOAD httpfs",
        "CREATE SECRET s (TYPE s3)",
        "BEGIN",
        "VACUUM",
        "CHECKPOINT",
        "PREPARE p AS SELECT 1",
        "SELECT 1; SELECT 2",
        "SELECT 1; DROP TABLE runs",
        "",
        ";",
        "-- nothing",
    ],
)
def test_what_does_not_only_read_is_refused(filled: Lab, tmp_path: Path, sql: str) -> None:
    secret, out = tmp_path / "secret.csv", tmp_path / "out"
    secret.write_text("a,b\n1,2\n")
    before = filled.results.path.read_bytes()
    with pytest.raises(StoreError) as caught:
        filled.results.query(sql.format(secret=secret, out=out))
    assert "\n" not in str(caught.value)
    assert not out.exists()
    assert filled.results.path.read_bytes() == before


def test_what_reads_is_locked_in(filled: Lab) -> None:
    names = "'temp_directory', 'lock_configuration', 'enable_external_access'"
    query = f"SELECT name, value FROM duckdb_settings() WHERE name IN ({names})"
    assert dict(filled.results.query(query).rows) == {
        "temp_directory": "",
        "lock_configuration": "true",
        "enable_external_access": "false",
    }


def test_a_query_larger_than_the_memory_is_one_line_and_fills_no_disk(filled: Lab, monkeypatch: Any) -> None:
    monkeypatch.setitem(store._CONFIG, "memory_limit", "50MB")
    before = set(filled.workspace.iterdir())
    with pytest.raises(StoreError, match="more memory than there is; ask for less"):
        filled.results.query("SELECT count(*) FROM (SELECT DISTINCT md5(range::VARCHAR) FROM range(5_000_000))")
    assert set(filled.workspace.iterdir()) == before


def test_ctrl_c_ends_a_query(filled: Lab) -> None:
    threading.Timer(0.5, os.kill, [os.getpid(), signal.SIGINT]).start()
    long = "SELECT count(*) FROM range(1000000000) a, range(1000000) b WHERE a.range * b.range % 7 = 3"
    with pytest.raises(KeyboardInterrupt):
        filled.results.query(long)
    assert filled.results.query("SELECT 1").rows == [(1,)]


@pytest.mark.parametrize(
    ("sql", "words"),
    [
        ("SELEC 1", 'syntax error at or near "SELEC"'),
        ("SELECT nme FROM runs", 'Referenced column "nme" not found'),
        ("SELECT * FROM rnus", "Table with name rnus does not exist"),
        ("SELECT ?", "parameter"),
        ("SELECT error('Corrupt database file')", "Corrupt database file"),
    ],
)
def test_a_wrong_query_is_one_line(filled: Lab, sql: str, words: str) -> None:
    with pytest.raises(StoreError, match=words) as caught:
        filled.results.query(sql)
    assert "\n" not in str(caught.value)
    assert filled.said == []


def test_no_results_yet(lab: Lab) -> None:
    with pytest.raises(StoreError, match=r"no results in .* yet; `blockpruner demo`"):
        lab.results.query("FROM runs")
    assert not lab.workspace.exists()
