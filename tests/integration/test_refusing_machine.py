"""A machine that refuses: no space, nothing that may be read or written. One line, status 2, and nothing lost.

In processes of their own, restricted as a disk quota or another user's files would restrict them.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from blockpruner.durable import write_durably
from flows.reporter import LOADING
from tests.integration.command_line import Outcome, as_anybody, blockpruner, in_a_process, with_files_of
from tests.tiny_models import tiny_rows


@pytest.fixture
def folder(tmp_path: Path, tiny_folder: Callable[[str], Path]) -> Path:
    """A folder with a model, a text, and a folder `locked`."""
    shutil.copytree(tiny_folder("llama"), tmp_path / "model")
    (tmp_path / "cal.txt").write_text("\n".join(tiny_rows(40)))
    (tmp_path / "locked").mkdir()
    (tmp_path / "locked" / "r.yaml").write_text("model: x\nnum_blocks: 1\n")
    return tmp_path


def search_in(folder: Path) -> list[object]:
    text = ["--calibration", folder / "cal.txt", "--sequence-length", 16, "--num-samples", "all"]
    return ["search", "--model", folder / "model", *text, "--num-blocks", 1]


def error_of(outcome: Outcome) -> str:
    """The one line that says what is wrong; warnings may go before it."""
    *before, last = outcome.stderr.splitlines()
    assert outcome.status == 2, outcome
    assert outcome.stdout == ""
    assert last.startswith("Error: "), outcome.stderr
    assert all(line.startswith(("Warning: ", "calibrate ", "search ", LOADING)) for line in before), outcome.stderr
    return last


# --- no space ---------------------------------------------------------------------------------------------------------


def test_a_disk_without_space_for_the_runs_record(folder: Path) -> None:
    said = error_of(in_a_process(*search_in(folder), "--workspace", folder / "ws", before=with_files_of(100)))
    assert f"{folder}/ws/runs/" in said
    assert "free some space and give the same command again" in said


def test_a_disk_that_fills_up_closes_the_run_and_the_same_command_goes_on(folder: Path) -> None:
    workspace = ["--workspace", folder / "ws"]
    outcome = in_a_process(*search_in(folder), *workspace, before=with_files_of(4000))
    said = error_of(outcome)
    assert said.startswith(f"Error: stage calibrate: {folder}/ws cannot be written (")
    assert "File too large" in said
    (run,) = blockpruner("runs", *workspace, "--json").json
    assert (run["status"], f"Error: {run['error']}") == ("failed", said)
    assert blockpruner(*search_in(folder), *workspace).status == 0
    assert len(blockpruner("sql", "FROM runs", *workspace, "--json").json) == 2


def test_a_record_that_cannot_be_closed_is_no_second_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Path] = []

    def filling_up(path: Path, content: bytes, temporary: Path) -> None:
        written.append(path)
        if len(written) > 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write_durably(path, content, temporary)

    monkeypatch.setattr("stages.runs.write_durably", filling_up)
    outcome = blockpruner(*search_in(folder), "--workspace", folder / "ws")
    said = error_of(outcome)
    assert f"{written[0]}: No space left on device; free some space" in said
    assert "Warning: the record of run" in outcome.stderr
    assert "cannot be written (No space left on device); a later command closes it" in outcome.stderr


def test_a_database_without_space_is_no_half_one(folder: Path) -> None:
    workspace = ["--workspace", folder / "ws"]
    outcome = in_a_process(*search_in(folder), *workspace, before=with_files_of(20000))
    assert outcome.status == 0
    assert "they wait in the artifacts" in outcome.stderr
    assert "another version" not in outcome.stderr
    assert len(blockpruner("sql", "FROM runs", *workspace, "--json").json) == 1


@pytest.mark.slow
def test_a_disk_without_space_for_prefects_database(folder: Path) -> None:
    """Prefect starts its server anew as long as it is told to wait, three minutes."""
    fresh = {"PREFECT_HOME": str(folder / "prefect")}
    command = ["run", *search_in(folder)[1:], "--workspace", folder / "ws"]
    outcome = in_a_process(*command, before=with_files_of(300_000), **fresh)
    assert outcome.status == 2
    said = [line for line in outcome.stderr.splitlines() if line not in (f"{LOADING} ...", "starting Prefect ...")]
    assert [line.startswith("Error: Prefect's temporary server cannot be started (ended 3 times") for line in said] == [
        True
    ]
    assert f"see that {folder}/prefect can be written and has space" in said[0]


def test_a_full_standard_output_is_an_error(folder: Path) -> None:
    blockpruner(*search_in(folder), "--workspace", folder / "ws")
    for command in (["runs"], ["show", "latest", "--json"], ["--version"]):
        workspace = [] if command == ["--version"] else ["--workspace", folder / "ws"]
        with Path("/dev/full").open("wb") as full:
            said = error_of(in_a_process(*command, *workspace, stdout=full))
        assert said.startswith("Error: standard output")
        assert "No space left on device" in said


# --- what may not be read or written ----------------------------------------------------------------------------------


@contextmanager
def locked(path: Path, mode: int = 0) -> Iterator[None]:
    before = path.stat().st_mode & 0o777
    path.chmod(mode)
    try:
        yield
    finally:
        path.chmod(before)


@pytest.mark.parametrize("name", ["model/model.safetensors", "model/config.json", "model/tokenizer.json", "model"])
def test_a_model_that_may_not_be_read(name: str, folder: Path) -> None:
    with locked(folder / name):
        outcome = in_a_process(*search_in(folder), "--workspace", folder / "ws", before=as_anybody)
    said = error_of(outcome)
    assert str(folder / name) in said
    assert "Permission denied" in said
    record = json.loads(next((folder / "ws" / "runs").glob("*.json")).read_text())
    assert (record["status"], f"Error: {record['error']}") == ("failed", said)


@pytest.mark.parametrize(
    "command",
    [
        ["run", "locked/r.yaml"],
        ["runs", "--workspace", "locked/ws"],
        ["sql", "SELECT 1", "--workspace", "locked/ws"],
        ["run", "--model", "locked/model", "--num-blocks", "1", "--workspace", "ws"],
        ["export", "latest", "--output", "locked/out", "--workspace", "ws"],
    ],
    ids=str,
)
def test_what_lies_in_a_locked_folder(command: list[str], folder: Path) -> None:
    found = [str(folder / word) if word.startswith(("locked", "ws")) else word for word in command]
    with locked(folder / "locked"):
        said = error_of(in_a_process(*found, before=as_anybody))
    assert str(folder / "locked") in said
    assert "Permission denied" in said


def test_a_workspace_that_may_only_be_read_says_that_its_database_is_not_there(folder: Path) -> None:
    workspace = folder / "ws"
    blockpruner(*search_in(folder), "--workspace", workspace)
    (workspace / "results.duckdb").unlink()
    shutil.rmtree(workspace / "locks")
    with locked(workspace, 0o555):
        said = error_of(in_a_process("sql", "FROM runs", "--workspace", workspace, before=as_anybody))
    assert "results.duckdb is missing, and cannot be made here from the run records (Permission denied)" in said


def test_an_output_folder_that_may_not_be_written_is_refused_before_the_work(folder: Path) -> None:
    blockpruner(*search_in(folder), "--workspace", folder / "ws")
    with locked(folder / "locked", 0o555):
        output = ["--output", folder / "locked" / "out"]
        outcome = in_a_process("export", "latest", *output, "--workspace", folder / "ws", before=as_anybody)
    assert "cannot be made" in error_of(outcome)
    assert not list(folder.glob("ws/artifacts/export/*"))
