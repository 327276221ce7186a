"""The results database: its rows against ones written by hand, and what it does when it is locked, torn or lost."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import duckdb
import pytest

from blockpruner.errors import StoreError
from stages import store_schema
from stages.artifacts import ArtifactStore
from stages.contract import Runtime, Stage, StageConfig, StageManifest
from stages.runs import RunDescription, RunRecord, RunStore, StageRun
from stages.store import ResultStore
from tests.unit.child_processes import child, succeed, wait_for

CONTRACT = """
runs(run_id, name, status, created_at, finished_at, model, model_fingerprint, num_layers, num_blocks_total,
  num_parameters, calibration, num_samples, num_sequences, sequence_length, seed, block_kinds, metric, strategy, device,
  dtype, package_version, config, error)
stage_runs(run_id, stage, fingerprint, cached, started_at, seconds, status, artifact_path, error)
search_steps(run_id, step, layer_index, block_kind, score, perplexity, num_parameters_removed, ratio, seconds)
block_scores(run_id, step, layer_index, block_kind, score, perplexity, rank, chosen)
perplexities(run_id, variant, text, num_blocks_removed, num_tokens, perplexity)
evaluations(run_id, variant, task, metric, value, stderr, num_fewshot, num_examples)
exports(run_id, format, path, num_blocks_removed, num_parameters, bytes, verified, max_logit_difference)
"""
TABLES = {name: re.findall(r"\w+", columns) for name, columns in re.findall(r"(\w+)\(([^)]*)\)", CONTRACT)}

# A search of two layers: MHA 1 goes first, then MLP 0, whose removal breaks the model. (score, perplexity) by block.
STEP_1 = {("mha", 0): (9.5, 9.5), ("mlp", 0): (8.0, 8.0), ("mha", 1): (6.0, 6.0), ("mlp", 1): ("NaN", "NaN")}
STEP_2 = {("mha", 0): ("Infinity", "Infinity"), ("mlp", 0): (7.0, 7.0), ("mlp", 1): (7.5, 7.5)}
BASELINE = {"texts": [{"text": "calibration", "num_tokens": 512, "perplexity": 5.0},
                      {"text": "wikitext2", "num_tokens": 900, "perplexity": 5.47}]}  # fmt: skip
SEARCH = {"dense_perplexity": 5.0, "num_layers": 2, "num_blocks_total": 4, "num_parameters": 1000, "num_steps": 2}
EXPORT = {"format": "stock", "num_blocks_removed": 2, "num_parameters": 700, "bytes": 2800, "kept": [], "dropped": [],
          "verified": True, "max_logit_difference": 0.0}  # fmt: skip
DENSE = {"texts": [], "metrics": [{"task": "piqa", "metric": "acc", "value": 0.78, "stderr": 0.01, "num_fewshot": 0,
                                   "num_examples": 100}]}  # fmt: skip
PRUNED = {"texts": [{"text": "wikitext2", "num_tokens": 900, "perplexity": "Infinity"}],
          "metrics": [{"task": "piqa", "metric": "acc", "value": "NaN", "stderr": None, "num_fewshot": None,
                       "num_examples": 100}]}  # fmt: skip


def trace_step(step: int, scores: Mapping[tuple[str, int], tuple[Any, Any]], chosen: tuple[str, int]) -> str:
    order = sorted(scores, key=lambda block: (isinstance(scores[block][0], str), scores[block][0]))
    candidates = [
        {"block": {"layer_index": layer, "block_kind": kind}, "score": score, "perplexity": perplexity,
         "rank": order.index((kind, layer)) + 1, "chosen": (kind, layer) == chosen}
        for (kind, layer), (score, perplexity) in scores.items()
    ]  # fmt: skip
    winner = next(candidate for candidate in candidates if candidate["chosen"])
    return json.dumps(
        {"step": step, "block": winner["block"], "score": winner["score"], "perplexity": winner["perplexity"],
         "num_parameters_removed": 150 * step, "ratio": 0.15 * step, "seconds": 0.5, "candidates": candidates}
    )  # fmt: skip


TRACE = trace_step(1, STEP_1, ("mha", 1)) + "\n" + trace_step(2, STEP_2, ("mlp", 0)) + "\n"


class AnyConfig(StageConfig):
    salt: str


@dataclass(frozen=True)
class NoInputs:
    def fingerprints(self) -> Mapping[str, str]:
        return {}


class AnyManifest(StageManifest):
    content: str = ""

    def model_dump_json(self, **_: Any) -> str:
        return self.content


class Lab:
    """A workspace with runs, artifacts and results, and what was said."""

    def __init__(self, workspace: Path, wait: float = 0.4) -> None:
        self.workspace = workspace.resolve()
        self.said: list[str] = []
        self.runs = RunStore(workspace, self.said.append)
        self.results = ResultStore(workspace / "results.duckdb", self.said.append, wait=wait)

    def artifact(self, role: str, manifest: dict[str, Any], salt: str, **files: str) -> StageRun:
        """Write a whole artifact of a fake stage, and say how a run used it."""
        name = role.split(":")[0]

        def run(config: AnyConfig, inputs: NoInputs, out_dir: Path, runtime: Runtime) -> AnyManifest:
            for file, text in files.items():
                (out_dir / file.replace("__", ".")).write_text(text)
            return AnyManifest.model_construct(content=json.dumps(manifest))

        stage = Stage(name, 1, AnyManifest, run)
        made = ArtifactStore(self.workspace).get_or_run(stage, AnyConfig(salt=salt + role), NoInputs(), Runtime())
        path = made.path.relative_to(self.workspace).as_posix()
        return StageRun(
            stage=name, label=role, role=role, fingerprint=made.fingerprint, status="completed", artifact_path=path
        )

    def run(self, name: str = "night", status: str = "completed", roles: str = "bsxdp") -> RunRecord:
        """A saved run with the stages whose initials are given (x: export; d, p: evaluate)."""
        record = self.runs.create(RunDescription(name=name, model="a model", num_layers=2, seed=42, config={"k": [2]}))
        makers: dict[str, Callable[[], StageRun]] = {
            "b": lambda: self.artifact("baseline", BASELINE, name),
            "s": lambda: self.artifact("search", SEARCH, name, trace__jsonl=TRACE),
            "x": lambda: self.artifact("export", EXPORT, name),
            "d": lambda: self.artifact("evaluate:dense", DENSE, name),
            "p": lambda: self.artifact("evaluate:pruned", PRUNED, name),
        }
        record.stages = [makers[role]() for role in roles]
        if status == "running":
            self.runs.save(record)
        else:
            self.runs.finish(record, status)  # type: ignore[arg-type]
        return record

    def dump(self) -> dict[str, list[tuple[Any, ...]]]:
        """Every table's rows, comparable: sorted, and NaN equal to itself."""
        return {
            table: sorted(tuple(map(repr, row)) for row in self.results.query(f"FROM {table}").rows) for table in TABLES
        }

    def rows(self, table: str, run: RunRecord) -> list[tuple[Any, ...]]:
        """One run's rows of a table with the contract's columns, less run_id."""
        columns = ", ".join(TABLES[table][1:])
        return self.results.query(f"SELECT {columns} FROM {table} WHERE run_id = '{run.run_id}' ORDER BY ALL").rows

    def names(self) -> set[str]:
        return {name for (name,) in self.results.query("SELECT name FROM runs").rows}


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


# --- rows --------------------------------------------------------------------------------------------------------------


def test_tables_have_the_contracts_columns(lab: Lab) -> None:
    lab.results.ingest(lab.run())
    for table, columns in TABLES.items():
        found = lab.results.query(f"DESCRIBE {table}").rows
        assert [name for name, *_ in found][: len(columns)] == columns
    assert dict((name, kind) for name, kind, *_ in lab.results.query("DESCRIBE runs").rows)["config"] == "JSON"


def test_row_types_are_the_tables_columns() -> None:
    rows = {row._fields for row in vars(store_schema).values() if hasattr(row, "_fields")}
    assert rows == {tuple(columns) for columns in store_schema.TABLES.values()}


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


# --- artifacts that cannot be read -------------------------------------------------------------------------------------


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


# --- others have it ----------------------------------------------------------------------------------------------------


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


# --- reading only ------------------------------------------------------------------------------------------------------


def test_a_query_gives_columns_and_rows(lab: Lab) -> None:
    lab.results.ingest(lab.run())
    columns, rows = lab.results.query("SELECT name, 1 + 1 AS two, created_at FROM runs")
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
def test_what_reads_is_answered(lab: Lab, sql: str) -> None:
    lab.results.ingest(lab.run())
    assert lab.results.query(sql).rows


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
def test_what_does_not_only_read_is_refused(lab: Lab, tmp_path: Path, sql: str) -> None:
    lab.results.ingest(lab.run())
    secret, out = tmp_path / "secret.csv", tmp_path / "out"
    secret.write_text("a,b\n1,2\n")
    before = lab.results.path.read_bytes()
    with pytest.raises(StoreError) as caught:
        lab.results.query(sql.format(secret=secret, out=out))
    assert "\n" not in str(caught.value)
    assert not out.exists()
    assert lab.results.path.read_bytes() == before


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
def test_a_wrong_query_is_one_line(lab: Lab, sql: str, words: str) -> None:
    lab.results.ingest(lab.run())
    with pytest.raises(StoreError, match=words) as caught:
        lab.results.query(sql)
    assert "\n" not in str(caught.value)
    assert lab.said == []


def test_no_results_yet(lab: Lab) -> None:
    with pytest.raises(StoreError, match=r"no results in .* yet; `blockpruner demo`"):
        lab.results.query("FROM runs")
    assert not lab.workspace.exists()


# --- lost and found ----------------------------------------------------------------------------------------------------


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


def test_what_a_killed_rebuild_left_is_removed(lab: Lab) -> None:
    three_runs(lab)
    (lab.workspace / "results.duckdb.tmp-99").write_text("half")
    (lab.workspace / "results.duckdb.tmp-99.wal").write_text("half")
    lab.results.rebuild()
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
