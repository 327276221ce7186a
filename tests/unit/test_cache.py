"""What a kept run needs stays, whoever asks to free it; what none needs goes, and nothing that is being written."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from blockpruner.errors import ArtifactError, ConfigurationError, StoreError
from flows.cli_storage import age, size_in_bytes
from stages import cache
from stages.artifacts import ArtifactStore, lock_name, state_lock_name
from stages.cache import ArtifactCache, CacheEntry, Freeing
from stages.contract import Runtime
from stages.runs import RunRecord, RunStore, StageRun
from tests.integration.command_line import blockpruner
from tests.unit.child_processes import child, wait_for
from tests.unit.echo_stage import ECHO, Bench, EchoConfig
from tests.unit.store_lab import Lab

NOW = datetime.now(UTC)


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path / "workspace")


def cached(lab: Lab) -> ArtifactCache:
    return ArtifactCache(lab.runs)


def run_of(lab: Lab, *stages: StageRun, days_ago: float = 0.0, status: str = "completed") -> RunRecord:
    """A run that ended some days ago and used these artifacts."""
    record = lab.run(roles="", status="running")
    record.stages = list(stages)
    if status == "running":
        lab.runs.save(record)
    else:
        lab.runs.finish(record, status, at=NOW - timedelta(days=days_ago))  # type: ignore[arg-type]
    return record


def made(lab: Lab, salt: str, num_bytes: int = 1000) -> StageRun:
    return lab.artifact("export", {}, salt, weights="x" * num_bytes)


def checkpoints(lab: Lab, name: str) -> Path:
    folder = lab.workspace / "state" / "search" / name
    folder.mkdir(parents=True)
    (folder / "step").write_text("x" * 50)
    return folder


def folder(lab: Lab, stage: StageRun) -> Path:
    return lab.workspace / str(stage.artifact_path)


def free(lab: Lab, plan: Freeing) -> Freeing:
    return cached(lab).free(plan, lab.results.forget)


def paths(entries: Sequence[CacheEntry]) -> set[Path]:
    return {entry.path for entry in entries}


# --- what is there ----------------------------------------------------------------------------------------------------


def test_entries_say_who_needs_them_and_how_large_they_are(lab: Lab) -> None:
    shared, own, orphan = made(lab, "shared", 3000), made(lab, "own", 2000), made(lab, "orphan", 4000)
    older = run_of(lab, shared, days_ago=9)
    newer = run_of(lab, shared, own, days_ago=-2)
    entries = cached(lab).entries()
    assert [entry.path for entry in entries] == [folder(lab, orphan), folder(lab, shared), folder(lab, own)]
    assert [entry.runs for entry in entries] == [(), (newer.run_id, older.run_id), (newer.run_id,)]
    by_hand = sum(path.stat().st_size for path in folder(lab, shared).rglob("*") if path.is_file())
    assert entries[1].bytes == by_hand > 3000
    assert entries[1].last_used == NOW + timedelta(days=2)
    assert abs(entries[0].last_used - datetime.now(UTC)) < timedelta(minutes=5)


def test_links_and_foreign_files_are_nothing_of_ours(lab: Lab, tmp_path: Path) -> None:
    made(lab, "own")
    outside = tmp_path / "outside"
    (outside / "abc").mkdir(parents=True)
    (lab.workspace / "artifacts" / "linked").symlink_to(outside)
    (lab.workspace / "artifacts" / "export" / "linked").symlink_to(outside / "abc")
    (lab.workspace / "artifacts" / "export" / "Notes of mine").mkdir()
    (lab.workspace / "artifacts" / "README").write_text("mine")
    plan = cached(lab).plan()
    assert len(plan.entries) == 1
    free(lab, plan)
    assert (outside / "abc").is_dir()
    assert (lab.workspace / "artifacts" / "export" / "Notes of mine").is_dir()


# --- what is kept -----------------------------------------------------------------------------------------------------


def test_a_bare_prune_frees_what_no_run_needs_and_nothing_else(lab: Lab) -> None:
    needed, orphan = made(lab, "needed"), made(lab, "orphan")
    by_status = [run_of(lab, made(lab, s), status=s, days_ago=400) for s in ("failed", "crashed", "cancelled")]
    run_of(lab, needed, days_ago=400)
    done = free(lab, cached(lab).plan())
    assert paths(done.entries) == {folder(lab, orphan)}
    assert not folder(lab, orphan).exists()
    assert all(folder(lab, stage).is_dir() for record in by_status for stage in record.stages)
    assert (folder(lab, needed) / "manifest.json").is_file()
    assert done.kept_bytes == sum(entry.bytes for entry in cached(lab).entries())
    assert cached(lab).plan().entries == []


def test_a_run_that_is_given_up_leaves_what_others_need(lab: Lab) -> None:
    shared, own = made(lab, "shared"), made(lab, "own")
    gone, kept = run_of(lab, shared, own), run_of(lab, shared)
    lab.results.ingest(gone)
    lab.results.ingest(kept)
    done = free(lab, cached(lab).plan([gone]))
    assert paths(done.entries) == {folder(lab, own)}
    assert [record.run_id for record in lab.runs.list()] == [kept.run_id]
    assert [row[0] for row in lab.results.query("SELECT run_id FROM runs").rows] == [kept.run_id]
    assert [row[0] for row in lab.results.query("SELECT DISTINCT run_id FROM stage_runs").rows] == [kept.run_id]


def test_age_is_that_of_the_run_and_not_of_the_artifact(lab: Lab) -> None:
    old_and_used, old = made(lab, "used"), made(lab, "old")
    ancient = run_of(lab, old_and_used, old, days_ago=31)
    run_of(lab, old_and_used, days_ago=29)
    plan = cached(lab).plan(ended_before=NOW - timedelta(days=30))
    assert [record.run_id for record in plan.runs] == [ancient.run_id]
    assert paths(plan.entries) == {folder(lab, old)}


def test_a_size_gives_up_the_oldest_until_it_is_reached(lab: Lab) -> None:
    stages = [made(lab, str(number), 10_000) for number in range(4)]
    shared = made(lab, "shared", 10_000)
    for number, stage in enumerate(stages):
        run_of(lab, stage, shared, days_ago=10 - number)
    nothing_to_give = run_of(lab, days_ago=100)
    plan = cached(lab).plan(most_bytes=38_000)
    assert paths(plan.entries) == {folder(lab, stage) for stage in stages[:2]}
    assert len(plan.runs) == 2
    assert plan.kept_bytes < 38_000 < plan.kept_bytes + 12_000
    assert nothing_to_give.run_id not in {record.run_id for record in plan.runs}
    assert cached(lab).plan(most_bytes=10**9).entries == []
    assert len(cached(lab).plan(most_bytes=1).entries) == 5


def test_a_run_under_way_keeps_everything(lab: Lab) -> None:
    used = made(lab, "used")
    record = run_of(lab, used, days_ago=99, status="running")
    for plan in (cached(lab).plan(ended_before=NOW + timedelta(days=1)), cached(lab).plan(most_bytes=1)):
        assert (plan.runs, plan.entries) == ([], [])
    with pytest.raises(ConfigurationError, match="is under way"):
        cached(lab).plan([record])


def test_checkpoints_belong_to_the_runs_that_may_go_on(lab: Lab) -> None:
    mine, others = checkpoints(lab, "aa"), checkpoints(lab, "bb")
    search = StageRun(stage="search", label="search", role="search", fingerprint="ff", checkpoints="aa")
    cancelled = run_of(lab, search, status="cancelled")
    done = free(lab, cached(lab).plan())
    assert paths(done.entries) == {others}
    assert mine.is_dir()
    free(lab, cached(lab).plan([cancelled]))
    assert not mine.exists()


def test_a_record_that_does_not_say_which_checkpoints_keeps_all(lab: Lab) -> None:
    checkpoints(lab, "aa")
    run_of(lab, StageRun(stage="search", label="search", role="search", fingerprint="ff"))
    assert cached(lab).plan().entries == []


def test_a_model_that_is_an_artifact_is_needed(lab: Lab) -> None:
    """Who prunes an exported model further has it as the model of the new run."""
    exported = made(lab, "exported")
    record = run_of(lab)
    record.config = {"model": str(folder(lab, exported) / "model"), "tasks": ["a"]}
    lab.runs.save(record)
    assert cached(lab).plan().entries == []


def test_a_damaged_record_stops_everything(lab: Lab) -> None:
    record = run_of(lab, made(lab, "own"))
    (lab.workspace / "runs" / f"{record.run_id}.json").write_text("{")
    with pytest.raises(ArtifactError, match="is damaged"):
        cached(lab).plan()


def test_where_the_rows_cannot_go_nothing_goes(lab: Lab) -> None:
    own = made(lab, "own")
    record = run_of(lab, own)

    def taken(run_ids: Sequence[str]) -> None:
        raise StoreError("taken")

    with pytest.raises(StoreError):
        cached(lab).free(cached(lab).plan([record]), taken)
    assert folder(lab, own).is_dir()
    assert len(lab.runs.list()) == 1


# --- what others do meanwhile -----------------------------------------------------------------------------------------


def write_slowly(home: str) -> None:
    """In a child process: an artifact that takes until `hold` is gone."""
    Bench(Path(home)).get()


def test_what_another_process_writes_is_left(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    hold = bench.hold()
    with child(write_slowly, tmp_path) as writer:
        wait_for(lambda: any(path.name.startswith(".tmp-") for path in bench.unfinished()))
        store = ArtifactCache(RunStore(bench.workspace))
        plan = store.plan()
        assert [entry.kind for entry in plan.entries] == ["unfinished"]
        done = store.free(plan, lambda _: None)
        assert done.entries == []
        assert len(done.left) == 1
        hold.unlink()
        assert writer.wait(30) == 0
    assert bench.get().cached


def test_what_a_killed_process_left_goes(lab: Lab) -> None:
    made(lab, "own")
    left = lab.workspace / "artifacts" / "export" / ".tmp-abc-99"
    left.mkdir()
    removed = lab.workspace / "state" / "search" / ".tmp-def-99"
    removed.mkdir(parents=True)
    aside = lab.workspace / "damaged" / "export-abc"
    aside.mkdir(parents=True)
    kinds = {entry.path: entry.kind for entry in cached(lab).plan().entries}
    assert (kinds[left], kinds[removed], kinds[aside]) == ("unfinished", "unfinished", "damaged")
    free(lab, cached(lab).plan())
    assert not any(path.exists() for path in (left, removed, aside))


@pytest.mark.parametrize("kind", ["artifact", "checkpoints"])
def test_a_lock_that_is_held_keeps_it(lab: Lab, kind: str) -> None:
    if kind == "artifact":
        path = folder(lab, made(lab, "own"))
        lock = lab.runs.workspace.lock(lock_name("export", path.name))
    else:
        path = checkpoints(lab, "aa")
        lock = lab.runs.workspace.lock(state_lock_name("search", "aa"))
    with lock:
        assert [entry.path for entry in free(lab, cached(lab).plan()).left] == [path]
    assert path.is_dir()
    free(lab, cached(lab).plan())
    assert not path.exists()


@pytest.mark.parametrize("moment", ["before it goes out of its place", "after"])
def test_a_run_that_begins_meanwhile_keeps_what_it_found(
    lab: Lab, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = made(lab, "own")
    plan = cached(lab).plan()
    if moment == "after":
        rename, aside = Path.rename, list[Path]()

        def and_then_a_run_begins(source: Path, target: Path) -> Path:
            moved = rename(source, target)
            if not aside:
                aside.append(moved)
                run_of(lab, own, status="running")
            return moved

        monkeypatch.setattr(Path, "rename", and_then_a_run_begins)
    else:
        run_of(lab, own, status="running")
    done = free(lab, plan)
    assert (paths(done.entries), paths(done.left)) == (set(), {folder(lab, own)})
    assert (folder(lab, own) / "manifest.json").is_file()
    assert not list(folder(lab, own).parent.glob(".tmp-*"))


def test_a_record_is_read_again_only_when_it_has_changed(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    run_of(lab, made(lab, "own"))
    entries = cached(lab).entries()
    read = list[str]()
    load = lab.runs.load
    monkeypatch.setattr(lab.runs, "load", lambda run_id: (read.append(run_id), load(run_id))[1])
    watch = cache._Watch(lab.runs)
    assert [watch.needs(entry) for entry in entries * 5] == [True] * 5
    assert len(read) == 1


def test_who_asks_while_another_frees_gets_it_whole(tmp_path: Path) -> None:
    bench, stop, freed = Bench(tmp_path), threading.Event(), list[int]()

    def prune() -> None:
        store = ArtifactCache(RunStore(bench.workspace))
        while not stop.is_set():
            freed.append(len(store.free(store.plan(), lambda _: None).entries))

    with ThreadPoolExecutor(max_workers=1) as pool:
        pruner = pool.submit(prune)
        try:
            for _ in range(20):
                fresh = ArtifactStore(bench.workspace, bench.said.append)
                artifact = fresh.get_or_run(ECHO, EchoConfig(), bench.inputs, Runtime())
                assert artifact.manifest.length == 15
        finally:
            stop.set()
        pruner.result(timeout=30)
    assert sum(freed) > 0


# --- the commands -----------------------------------------------------------------------------------------------------


@pytest.fixture
def two_runs(lab: Lab) -> tuple[Lab, RunRecord, StageRun]:
    own = made(lab, "own", 5000)
    record = run_of(lab, made(lab, "shared"), own, days_ago=40)
    run_of(lab, made(lab, "shared"))
    return lab, record, own


def test_list_for_people_and_programs(two_runs: tuple[Lab, RunRecord, StageRun]) -> None:
    lab, record, own = two_runs
    workspace = ["--workspace", lab.workspace]
    rows = blockpruner("cache", "list", *workspace, "--json").json
    assert rows[0]["path"] == own.artifact_path
    assert rows[0]["runs"] == [record.run_id]
    assert str(own.fingerprint)[:12] in blockpruner("cache", "ls", *workspace).stdout
    assert len(blockpruner("cache", "list", *workspace, "--csv").stdout.splitlines()) == 3
    narrow = [["--larger-than", "4kB"], ["--run", record.run_id, "--larger-than", "4kB"]]
    assert [blockpruner("cache", "list", *workspace, "--json", *given).json for given in narrow] == [rows[:1]] * 2
    for given in (["--unused"], ["--older-than", "1h"], ["--larger-than", "1GB"]):
        assert blockpruner("cache", "list", *workspace, "--json", *given).json == [], given


def test_a_dry_run_and_no_for_an_answer_remove_nothing(two_runs: tuple[Lab, RunRecord, StageRun]) -> None:
    lab, record, own = two_runs
    prune = ["cache", "prune", "--older-than", "30d", "--workspace", lab.workspace]
    said = blockpruner(*prune, "--dry-run")
    assert record.run_id in said.stdout
    assert "would free 5" in said.stdout.splitlines()[-1]
    unanswered = blockpruner(*prune)
    assert unanswered.status == 2
    assert "give --yes" in unanswered.stderr.splitlines()[-1]
    assert folder(lab, own).is_dir()
    dry = blockpruner(*prune, "--dry-run", "--json").json
    done = blockpruner(*prune, "--yes", "--json").json
    assert {**dry, "dry_run": False} == done
    assert done["runs"] == [record.run_id]
    assert [row["path"] for row in done["entries"]] == [own.artifact_path]
    assert not folder(lab, own).exists()
    assert "nothing was freed" in blockpruner(*prune, "--yes").stdout


@pytest.mark.parametrize(("answer", "stays"), [("n\n", True), ("y\n", False)])
def test_it_asks(two_runs: tuple[Lab, RunRecord, StageRun], answer: str, stays: bool) -> None:
    from typer.testing import CliRunner

    from flows.cli import app

    lab, record, own = two_runs
    given = ["cache", "prune", "--run", record.run_id, "--workspace", str(lab.workspace)]
    result = CliRunner().invoke(app, given, input=answer)
    assert result.exit_code == 0
    assert "and forget 1 run?" in result.stderr
    assert folder(lab, own).exists() == stays


@pytest.mark.parametrize(
    "given",
    [
        ["--older-than", "3x"], ["--older-than", ""], ["--older-than", "-1d"], ["--max-size", "5"],
        ["--max-size", "many"], ["--run", "nobody"], ["--run", ""],
    ],
)  # fmt: skip
def test_bad_input_is_one_line(two_runs: tuple[Lab, RunRecord, StageRun], given: list[str]) -> None:
    outcome = blockpruner("cache", "prune", *given, "--yes", "--workspace", two_runs[0].workspace)
    assert outcome.status == 2
    assert len(outcome.stderr.splitlines()) == 1


def test_a_workspace_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    for command in (["cache", "list"], ["cache", "prune", "--yes"], ["db", "rebuild"]):
        outcome = blockpruner(*command, "--workspace", tmp_path / "none")
        assert outcome.status == 2
        assert "is not there" in outcome.stderr
    assert not (tmp_path / "none").exists()


def test_ages_and_sizes() -> None:
    assert [age(text) for text in ("12h", "30d", " 2 W ")] == [timedelta(hours=12), timedelta(30), timedelta(14)]
    assert age("9999999w") == timedelta(36_500)
    assert [size_in_bytes(text) for text in ("1kB", "2GiB")] == [1000, 2**31]
