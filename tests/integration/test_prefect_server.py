"""The deployments on a real Prefect server with two workers: runs, schedules, cancelling, and what dies in mid-run.

One server for all tests here, which takes half a minute to start. They follow one another: the last one kills it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from flows.settings_text import SETTINGS
from stages.runs import RunRecord, RunStore
from tests.integration.command_line import Outcome, blockpruner, start
from tests.integration.prefect_lab import PrefectLab, wait_until
from tests.tiny_models import save_tiny_model, tiny_rows

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

_STAGES = {"calibrate", "baseline", "search", "export", "evaluate pruned"}
_SOON_S = 75.0
"""A schedule is due at a full minute, which is at most this far ahead and at least a minute less."""


@dataclass
class Works:
    """A server with everything deployed, two workers, and two runs that both have finished."""

    lab: PrefectLab
    folder: Path
    workers: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)
    """The flow runs by what they prune."""

    @property
    def workspace(self) -> Path:
        return self.folder / "ws"

    def recipe(self, **changes: object) -> dict[str, object]:
        return recipe_of(self.folder, **changes)

    def long_search(self, num_samples: int) -> dict[str, object]:
        """One that takes minutes."""
        text = {"calibration": str(self.folder / "long.txt"), "num_samples": num_samples, "sequence_length": 64}
        return self.recipe(model=str(self.folder / "deep-model"), **text, num_blocks=20)

    def begin(self, deployment: str, recipe: dict[str, object]) -> str:
        return self.lab.begin(deployment, recipe=recipe, workspace=str(self.workspace))

    def by_command(self, deployment: str, **parameters: object) -> str:
        """Have a deployment run, as a user does it in a terminal."""
        given = ["--params", json.dumps(parameters)] if parameters else []
        return self.lab.prefect("deployment", "run", deployment, *given).partition("UUID: ")[2].split()[0]

    def record(self, flow_run_id: str) -> RunRecord:
        (record,) = [each for each in RunStore(self.workspace).list() if each.flow_run_id == flow_run_id]
        return record

    def searching(self, flow_run_id: str) -> RunRecord:
        """The record of a flow run, once its search has scored something."""

        def has_begun() -> bool:
            own = [each for each in RunStore(self.workspace).list() if each.flow_run_id == flow_run_id]
            stages = own[0].stages if own else []
            return bool(stages) and self._has_checkpoint(stages[-1].checkpoints)

        wait_until(has_begun, 120)
        return self.record(flow_run_id)

    def _has_checkpoint(self, fingerprint: str | None) -> bool:
        return any(path.stat().st_size > 2000 for path in self.workspace.glob(f"state/search/{fingerprint}/*"))

    def sql(self, query: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = blockpruner("sql", query, "--workspace", self.workspace, "--json").json
        return found


def recipe_of(folder: Path, **changes: object) -> dict[str, object]:
    given: dict[str, object] = {
        "model": str(folder / "model"),
        "calibration": str(folder / "cal.txt"),
        "num_samples": "all",
        "sequence_length": 16,
        "num_blocks": 2,
    }
    return {**given, **changes}


@pytest.fixture(scope="module")
def works(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Works]:
    folder = tmp_path_factory.mktemp("prefect-lab")
    save_tiny_model(folder / "model", "llama")
    save_tiny_model(folder / "other-model", "qwen2")
    save_tiny_model(folder / "deep-model", "llama", num_hidden_layers=16)
    for name, rows in (("cal", 60), ("long", 3000)):
        (folder / f"{name}.txt").write_text("\n".join(tiny_rows(rows)))
    lab = PrefectLab(folder / "lab")
    try:
        lab.start_server()
        lab.deploy()
        works = Works(lab, folder)
        works.workers = {name: lab.start_worker(name) for name in ("one", "two")}
        works.first = {"model": run_from_the_command_line(works), "other": other_run(works)}
        for flow_run_id in works.first.values():
            lab.state_becomes(flow_run_id, "Completed")
        yield works
    finally:
        lab.close()
        shutil.rmtree(folder, ignore_errors=True)


def run_from_the_command_line(works: Works) -> str:
    return works.by_command("prune/local", recipe=works.recipe(), workspace=str(works.workspace))


def other_run(works: Works) -> str:
    return works.begin("prune/nightly", works.recipe(model=str(works.folder / "other-model")))


def test_everything_is_deployed_with_a_form_and_a_slot(works: Works) -> None:
    deployed = {name: works.lab.deployment(name) for name in ("prune/local", "prune/nightly", "compare/weekly")}
    for deployment in deployed.values():
        assert deployment["global_concurrency_limit"]["limit"] == 1
        assert deployment["concurrency_options"]["collision_strategy"] == "ENQUEUE"
        described = deployment["parameter_openapi_schema"]
        assert all(found["description"] for found in described["properties"].values())
        assert all(f["description"] for d in described["definitions"].values() for f in d["properties"].values())
    form = deployed["prune/local"]["parameter_openapi_schema"]["definitions"]["Recipe"]["properties"]
    assert {name: form[name]["description"] for name in form} == SETTINGS
    crons = {name: [each["schedule"]["cron"] for each in found["schedules"]] for name, found in deployed.items()}
    assert crons["compare/weekly"] == ["0 3 * * 0"]
    assert crons["prune/local"] == []


def test_the_server_refuses_parameters_that_the_form_does_not_allow(works: Works) -> None:
    with pytest.raises(httpx.HTTPStatusError, match="409"):
        works.begin("prune/local", works.recipe(sequence_length="many"))


def test_two_workers_share_two_runs_in_one_workspace(works: Works) -> None:
    who = {  # the workers whose output has the run's own; both may have asked for it
        what: [name for name in works.workers if f"/flow-run/{flow_run_id}" in works.lab.log(name)]
        for what, flow_run_id in works.first.items()
    }
    assert sorted([*who["model"], *who["other"]]) == ["one", "two"]
    assert len({os.getpgid(pid) for pid in works.workers.values()}) == 2
    for what, flow_run_id in works.first.items():
        record = works.record(flow_run_id)
        assert (record.status, record.goal) == ("completed", "evaluate")
        assert set(works.lab.task_states(flow_run_id)) == _STAGES
        assert {"prune-summary", "pruning-order", "measurements"} <= works.lab.artifact_keys(flow_run_id)
        exported = blockpruner("show", record.run_id, "--workspace", works.workspace, "--json").json["export_path"]
        assert (Path(exported) / "config.json").is_file(), what
    rows = works.sql("SELECT run_id, count(*) AS steps FROM search_steps GROUP BY run_id")
    assert {row["run_id"]: row["steps"] for row in rows} == {
        works.record(flow_run_id).run_id: 2 for flow_run_id in works.first.values()
    }


@pytest.mark.usefixtures("due")  # it comes meanwhile, for whoever is free then
def test_killed_cancelled_queued_and_from_the_cache(works: Works) -> None:
    """One run dies, one holds the only slot of its deployment until it is cancelled, and one waits for that."""
    lab = works.lab
    dying, holding = (
        works.begin("prune/nightly", works.long_search(1900)),
        works.begin("prune/local", works.long_search(2000)),
    )
    doomed, held = works.searching(dying), works.searching(holding)

    os.kill(doomed.pid, signal.SIGKILL)
    lab.state_becomes(dying, "Crashed")
    wait_until(lambda: works.record(dying).status != "running", 60)
    crashed = works.record(dying)
    assert crashed.status == "crashed"
    assert "-9" in str(crashed.error)
    assert works.sql(f"SELECT status FROM runs WHERE run_id = '{crashed.run_id}'") == [{"status": "crashed"}]

    again = works.begin("prune/local", works.recipe())
    lab.state_becomes(again, "AwaitingConcurrencySlot")
    lab.cancel(holding)
    asked_at = time.monotonic()
    wait_until(lambda: works.record(holding).status != "running", 30)
    assert time.monotonic() - asked_at < 15
    stopped = works.record(holding)
    assert stopped.status == "cancelled"
    assert f"`blockpruner resume {held.run_id}`" in str(stopped.error)
    lab.state_becomes(holding, "Cancelled")
    assert any(f"`blockpruner resume {held.run_id} --workspace" in line for line in lab.messages(holding))
    assert works.sql(f"SELECT status FROM runs WHERE run_id = '{held.run_id}'") == [{"status": "cancelled"}]

    lab.state_becomes(again, "Completed")
    wait_until(lambda: lab.task_states(again).keys() == _STAGES, 30)
    assert set(lab.task_states(again).values()) == {"Cached"}
    assert all(stage.cached for stage in works.record(again).stages)


def test_a_comparison_takes_what_is_in_the_workspace(works: Works) -> None:
    """`compare/weekly`, with two cells: one has been run by `prune/local`, and both share its search."""
    base = {name: value for name, value in works.recipe().items() if name != "num_blocks"}
    asked = {"name": "small", "base": base, "grid": [{"num_blocks": [1, 2]}]}
    page = works.folder / "page.html"
    flow_run_id = works.lab.begin("compare/weekly", recipe=asked, workspace=str(works.workspace), report=str(page))
    works.lab.state_becomes(flow_run_id, "Completed")
    records = {each.name: each for each in RunStore(works.workspace).list() if str(each.name).startswith("small: ")}
    assert {name: record.status for name, record in records.items()} == {
        "small: num_blocks=1": "completed",
        "small: num_blocks=2": "completed",
    }
    cached = {name: {stage.stage for stage in record.stages if stage.cached} for name, record in records.items()}
    assert cached["small: num_blocks=2"] == {stage.stage for stage in records["small: num_blocks=2"].stages}
    assert cached["small: num_blocks=1"] == {"calibrate", "baseline"}  # its search reads the other's checkpoints
    rows = works.sql("SELECT name, status, num_blocks_removed AS removed FROM runs WHERE name LIKE 'small: %'")
    assert {(row["name"], row["status"], row["removed"]) for row in rows} == {
        (f"small: num_blocks={number}", "completed", number) for number in (1, 2)
    }
    wait_until(lambda: works.lab.task_states(flow_run_id).keys() == {"num_blocks=1", "num_blocks=2"}, 30)
    assert set(works.lab.task_states(flow_run_id).values()) == {"Completed"}
    assert {"comparison", "comparison-numbers"} <= works.lab.artifact_keys(flow_run_id)
    assert "num_blocks=1" in page.read_text()


def test_without_parameters_it_is_the_demo(works: Works) -> None:
    """By README's own command, twice: the second takes everything from the cache, as does the demo's recipe here."""
    first, second = (works.by_command("prune/local") for _ in range(2))
    for flow_run_id in (first, second):
        works.lab.state_becomes(flow_run_id, "Completed", 300)
    workspace = works.lab.repository / "data"
    runs = {each.flow_run_id: each for each in RunStore(workspace).list()}
    assert [runs[each].status for each in (first, second)] == ["completed", "completed"]
    labels = [stage.label for stage in runs[first].stages]
    wait_until(lambda: works.lab.task_states(second).keys() == {*labels}, 30)
    assert set(works.lab.task_states(first).values()) == {"Completed"}
    assert set(works.lab.task_states(second).values()) == {"Cached"}
    found = blockpruner("search", "demo", "--workspace", workspace, "--json").json
    assert [stage["cached"] for stage in found["stages"]] == [True, True]
    query = "SELECT DISTINCT run_id, variant FROM evaluations WHERE task = 'demo_facts'"
    stored = {
        (row["run_id"], row["variant"]) for row in blockpruner("sql", query, "--workspace", workspace, "--json").json
    }
    assert stored == {(runs[each].run_id, variant) for each in (first, second) for variant in ("dense", "pruned")}


def test_a_run_that_cannot_begin_leaves_a_record(works: Works) -> None:
    """Both targets: the form allows either, and the two together are refused where the flow begins."""
    refused = works.begin("prune/local", works.recipe(ratio=0.5))
    works.lab.state_becomes(refused, "Failed")
    wait_until(lambda: "failed" in [e.status for e in RunStore(works.workspace).list() if e.flow_run_id == refused], 30)
    record = works.record(refused)
    assert record.status == "failed"
    assert "both num_blocks and ratio are given" in str(record.error)
    assert "\n" not in str(record.error)
    assert record.model == str(works.folder / "model")


@pytest.fixture(scope="module")
def due(works: Works) -> datetime:
    """When the nightly deployment is due."""
    nightly = {"recipe": works.recipe(num_blocks=1), "workspace": str(works.folder / "nightly")}
    return works.lab.schedule("nightly", nightly, _SOON_S)


def test_a_schedule_that_is_a_minute_ahead_fires(works: Works, due: datetime) -> None:
    def own() -> list[dict[str, Any]]:
        return [run for run in works.lab.flow_runs("prune/nightly") if run["auto_scheduled"] and _is_due(run, due)]

    wait_until(lambda: bool(own()), 30)
    works.lab.state_becomes(own()[0]["id"], "Completed")
    (record,) = RunStore(works.folder / "nightly").list()
    assert (record.status, record.flow_run_id) == ("completed", own()[0]["id"])
    # Prefect rounds to whole seconds how long a run that is early has to wait.
    assert record.created_at > due - timedelta(seconds=1)


def _is_due(flow_run: dict[str, Any], due: datetime) -> bool:
    expected: str = flow_run["expected_start_time"]
    return abs((datetime.fromisoformat(expected).astimezone(UTC) - due).total_seconds()) < 60


def test_a_server_that_disappears_costs_no_stage(works: Works) -> None:
    """The last test: there is no server afterwards."""
    workspace = works.folder / "orphaned"
    options = ["--model", works.folder / "model", "--calibration", works.folder / "long.txt", "--num-samples", "all"]
    command = [*options, "--sequence-length", 64, "--num-blocks", 2, "--workspace", workspace, "--json"]
    api = works.lab.environment["PREFECT_API_URL"]
    process = start("run", *command, PREFECT_API_URL=api)
    try:
        wait_until(lambda: any(workspace.glob("state/search/*/*")) or process.poll() is not None, 120)
        works.lab.kill_server()
        stdout, stderr = process.communicate(timeout=150)
    finally:
        process.kill()
    outcome = Outcome(process.returncode, stdout, stderr)
    (record,) = RunStore(workspace).list()
    assert outcome.json["run_id"] == record.run_id
    assert record.status == "completed"
    (line,) = [line for line in stderr.splitlines() if "server" in line]
    assert line.startswith("Warning: Prefect's server does not answer any more (")
    assert "Traceback" not in stderr
    found = blockpruner("search", *command).json
    assert [stage["cached"] for stage in found["stages"]] == [True, True]
