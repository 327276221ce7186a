"""`blockpruner resume`: a run that did not come to its end goes on with its own settings; another says why not."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stages.runs import RunRecord, RunStore
from tests.integration.command_line import Outcome, blockpruner, start
from tests.tiny_models import tiny_rows


@pytest.fixture
def folder(tmp_path: Path, tiny_folder: Callable[[str], Path]) -> Path:
    """A folder with a model, texts and nothing else."""
    shutil.copytree(tiny_folder("llama"), tmp_path / "model")
    (tmp_path / "cal.txt").write_text("\n".join(tiny_rows(60)))
    (tmp_path / "long.txt").write_text("\n".join(tiny_rows(800)))
    return tmp_path


def search(folder: Path, text: str = "cal.txt", *more: object) -> list[object]:
    asked = ["--calibration", folder / text, "--num-samples", "all", "--sequence-length", 16, "--num-blocks", 2, *more]
    return ["search", "--model", folder / "model", *asked, "--workspace", folder / "ws"]


def resume(folder: Path, run: str, *more: object) -> Outcome:
    return blockpruner("resume", run, "--workspace", folder / "ws", *more)


def records(folder: Path) -> list[RunRecord]:
    return RunStore(folder / "ws").list()


def changed(folder: Path, **fields: object) -> str:
    """The newest record with other fields; its id."""
    record = records(folder)[0]
    path = folder / "ws" / "runs" / f"{record.run_id}.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return record.run_id


def refusal(outcome: Outcome) -> str:
    (line,) = outcome.stderr.splitlines()
    assert (outcome.status, outcome.stdout) == (2, "")
    return line


def stopped_in_its_search(folder: Path, sent: signal.Signals) -> subprocess.Popen[str]:
    process = start(*search(folder, "long.txt", "--sequence-length", 64, "--num-blocks", 4, "--name", "night"))
    deadline = time.monotonic() + 90
    while not any(path.stat().st_size > 2000 for path in folder.glob("ws/state/search/*/*")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(sent)
    process.communicate(timeout=30)
    return process


def as_if_undisturbed(found: dict[str, Any], folder: Path) -> None:
    options = search(folder, "long.txt", "--sequence-length", 64, "--num-blocks", 4, "--json")
    options[options.index("--workspace") + 1] = folder / "undisturbed"
    expected = blockpruner(*options).json["pruning_order"]
    assert [(s["layer_index"], s["block_kind"], s["score"]) for s in found["pruning_order"]] == [
        (s["layer_index"], s["block_kind"], s["score"]) for s in expected
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sent", "status", "typed"),
    [(signal.SIGTERM, "cancelled", "start of its id"), (signal.SIGKILL, "crashed", "latest")],
)
def test_a_stopped_or_killed_search_goes_on_as_if_undisturbed(
    sent: signal.Signals, status: str, typed: str, folder: Path
) -> None:
    stopped_in_its_search(folder, sent)
    (before,) = records(folder)
    outcome = resume(folder, before.run_id[:-2] if typed == "start of its id" else "latest", "--json")
    after, closed = records(folder)
    assert (closed.run_id, closed.status, after.status) == (before.run_id, status, "completed")
    assert f"blockpruner resume {before.run_id}" in str(closed.error) + outcome.stderr
    assert after.config == before.config
    assert (after.goal, after.name) == ("search", "night")
    assert [stage["cached"] for stage in outcome.json["stages"]] == [True, False]
    as_if_undisturbed(outcome.json, folder)


def test_a_failed_run_goes_on_as_far_as_it_was_to_go(folder: Path) -> None:
    (folder / "cal.txt").rename(folder / "away.txt")
    options = search(folder)
    assert blockpruner("export", *options[1:]).status == 2
    failed = records(folder)[0]
    assert (failed.status, failed.goal) == ("failed", "export")
    gone = refusal(resume(folder, failed.run_id))
    assert "cal.txt" in gone
    (folder / "away.txt").rename(folder / "cal.txt")
    found = resume(folder, failed.run_id, "--json").json
    assert Path(found["export_path"], "config.json").is_file()


def test_a_completed_run_says_so(folder: Path) -> None:
    found = blockpruner(*search(folder), "--json").json
    outcome = resume(folder, "latest", "--json")
    assert outcome.stderr == f"run {found['run_id']} is completed: there is nothing left to go on with\n"
    assert outcome.json == blockpruner("show", "latest", "--workspace", folder / "ws", "--json").json
    assert len(records(folder)) == 1


@pytest.mark.parametrize("gone", ["model", "cal.txt"])
def test_a_model_or_text_that_is_gone_is_one_line(gone: str, folder: Path) -> None:
    blockpruner(*search(folder))
    run_id = changed(folder, status="cancelled")
    (folder / gone).rename(folder / "elsewhere")
    said = refusal(resume(folder, run_id))
    assert said.startswith("Error: ")
    assert str(folder / gone) in said


def test_what_nobody_can_go_on_with_is_one_line(folder: Path) -> None:
    blockpruner(*search(folder))
    assert "no run 'nope'" in refusal(resume(folder, "nope"))
    under_way = changed(folder, status="running")
    lock = RunStore(folder / "ws").workspace.lock(f"run-{under_way}")
    with lock:
        assert f"run {under_way} is under way" in refusal(resume(folder, "latest"))
    changed(folder, status="failed", goal=None)
    assert "does not say how far it was to go" in refusal(resume(folder, "latest"))
    changed(folder, goal="search", config={**records(folder)[0].config, "from_the_future": 1})
    assert "unknown recipe field 'from_the_future'" in refusal(resume(folder, "latest"))
    assert len(records(folder)) == 1


def test_a_cell_of_a_comparison_stays_one(folder: Path) -> None:
    blockpruner(*search(folder))
    run_id = changed(folder, status="cancelled", comparison="c")
    assert resume(folder, run_id).status == 0
    assert [record.comparison for record in records(folder)] == ["c", "c"]


def test_what_was_named_in_one_folder_is_found_from_another(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    relative = ["--model", "model", "--calibration", "cal.txt"]
    assert blockpruner(*search(folder), *relative).status == 0
    run_id = changed(folder, status="cancelled")
    monkeypatch.chdir("/")
    assert resume(folder, run_id).status == 0
