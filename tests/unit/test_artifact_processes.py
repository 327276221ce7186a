"""The artifact store with real processes that compete, and that are killed."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path

import pytest

from stages.artifacts import Artifact, ArtifactStore
from tests.unit.child_processes import child, kill, succeed, wait_for
from tests.unit.echo_stage import ECHO, Bench, EchoConfig, EchoManifest


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def ask(folder: str) -> None:
    """In a child process: ask for the artifact, and print how it came."""
    bench = Bench(Path(folder))

    def say(line: str) -> None:
        (bench.inputs.folder / "said").write_text(line)

    bench.store = ArtifactStore(bench.workspace, say)
    artifact = bench.get()
    sys.stdout.write(json.dumps({"cached": artifact.cached, "length": artifact.manifest.length}))


# --- competition and crashes ------------------------------------------------------------------------------------------


def test_threads_compute_once(bench: Bench) -> None:
    results: list[Artifact[EchoManifest]] = []
    threads = [threading.Thread(target=lambda: results.append(bench.get())) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert bench.inputs.calls() == 1
    assert sorted(artifact.cached for artifact in results) == [False, True, True, True, True, True]


def test_two_processes_compute_once_and_the_second_says_that_it_waits(bench: Bench, tmp_path: Path) -> None:
    hold = bench.hold()
    with child(ask, tmp_path) as first:
        wait_for(lambda: bench.inputs.calls() == 1)
        with child(ask, tmp_path) as second:
            wait_for((tmp_path / "said").exists)
            hold.unlink()
            answers = [json.loads(succeed(process)) for process in (first, second)]
    assert bench.inputs.calls() == 1
    assert [answer["cached"] for answer in answers] == [False, True]
    assert [answer["length"] for answer in answers] == [15, 15]
    assert "is being computed by another process: waiting" in (tmp_path / "said").read_text()


def test_a_killed_holder_frees_the_lock(bench: Bench, tmp_path: Path) -> None:
    hold = bench.hold()
    with child(ask, tmp_path) as first:
        wait_for(lambda: bench.inputs.calls() == 1)
        with child(ask, tmp_path) as second:
            wait_for((tmp_path / "said").exists)
            kill(first)
            wait_for(lambda: bench.inputs.calls() == 2)
            hold.unlink()
            assert json.loads(succeed(second))["cached"] is False
    assert bench.get().cached
    assert bench.unfinished() == []


def test_killed_in_the_middle_leaves_no_artifact_and_no_folder_stays(bench: Bench, tmp_path: Path) -> None:
    hold = bench.hold()
    with child(ask, tmp_path) as process:
        wait_for(lambda: len(list(bench.workspace.glob("artifacts/echo/.tmp-*/deep/er/bytes"))) == 1)
        kill(process)
    hold.unlink()
    fingerprint = ECHO.fingerprint(EchoConfig(), bench.inputs)
    assert len(bench.unfinished()) == 1
    assert not bench.store.has("echo", fingerprint)
    assert bench.store.lookup(ECHO, fingerprint) is None
    bench.get(word="something else")  # any next call cleans up
    assert bench.unfinished() == []
    assert not bench.get().cached
    assert bench.said == []


def test_the_folder_of_a_living_process_is_not_stale(bench: Bench, tmp_path: Path) -> None:
    hold = bench.hold()
    with child(ask, tmp_path) as process:
        wait_for(lambda: bench.inputs.calls() == 1)
        bench.store.remove_stale()
        assert len(bench.unfinished()) == 1
        hold.unlink()
        assert json.loads(succeed(process))["cached"] is False
