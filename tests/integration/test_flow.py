"""The flow `prune` through a real Prefect server: states, artifacts, errors; and the deployments that it has."""

from __future__ import annotations

import logging
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prefect._internal.concurrency.cancellation import CancelledError, WatcherThreadCancelScope
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterId
from prefect.client.schemas.objects import FlowRun, TaskRun
from prefect.client.schemas.schedules import CronSchedule
from prefect.client.schemas.sorting import FlowRunSort
from prefect.testing.utilities import prefect_test_harness
from prefect.utilities.schema_tools import validate
from pydantic import BaseModel, model_serializer

from blockpruner.errors import TextSourceError
from blockpruner.progress import Progress
from flows import prune_flow
from flows.recipe import make_recipe
from flows.reporter import Reporter
from stages.runs import RunStore
from tests.integration.command_line import ROOT, Outcome, blockpruner
from tests.tiny_models import tiny_rows

TinyFolder = Callable[[str], Path]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def _server() -> Iterator[None]:
    """One temporary server for all tests here; on two busy cores it takes half a minute to start."""
    with prefect_test_harness(server_startup_timeout=180):
        yield


@pytest.fixture
def options(tiny_folder: TinyFolder, tmp_path: Path) -> list[object]:
    (tmp_path / "cal.txt").write_text("\n".join(tiny_rows(60)))
    (tmp_path / "eval.txt").write_text("\n".join(tiny_rows(30, seed=1)))
    return [
        *("--model", tiny_folder("llama")),
        *("--calibration", tmp_path / "cal.txt"),
        *("--num-samples", 40),
        *("--sequence-length", 16),
        *("--num-blocks", 2),
        *("--workspace", tmp_path / "ws"),
        "--json",
    ]


def newest_flow_run() -> FlowRun:
    with get_client(sync_client=True) as client:
        return client.read_flow_runs(sort=FlowRunSort.START_TIME_DESC, limit=1)[0]


def task_states(flow_run: FlowRun) -> dict[str, str]:
    """The final state of each task, by the stage's label. The server hears of them with a little delay."""
    with get_client(sync_client=True) as client:
        runs: list[TaskRun] = []
        for _ in range(200):
            found = client.read_task_runs()
            runs = [run for run in found if run.flow_run_id == flow_run.id]
            if runs and all(run.state is not None and run.state.is_final() for run in runs):
                break
    return {run.name: run.state.name for run in runs if run.state is not None and run.state.name is not None}


def artifact_keys(flow_run: FlowRun) -> set[tuple[str, str | None]]:
    with get_client(sync_client=True) as client:
        response = client.request("POST", "/artifacts/filter", json={"flow_runs": {"id": {"any_": [str(flow_run.id)]}}})
    return {(artifact["type"], artifact["key"]) for artifact in response.json()}


def test_the_pipeline_and_then_everything_cached(options: list[object], tmp_path: Path) -> None:
    searched = blockpruner("search", *options).json  # one stage, without Prefect
    first = blockpruner("run", *options, "--eval-text", tmp_path / "eval.txt")
    assert first.json["pruning_order"] == searched["pruning_order"]
    assert Path(first.json["export_path"], "config.json").is_file()
    states = task_states(newest_flow_run())
    cached = {"calibrate": "Cached", "search": "Cached"}
    assert states == {name: cached.get(name, "Completed") for name in states}
    assert {"calibrate eval.txt", "baseline", "export", "evaluate pruned"} <= states.keys()

    assert newest_flow_run().name == str(options[1])  # the model's

    second = blockpruner("run", *options, "--eval-text", tmp_path / "eval.txt", "--name", "{again}")
    assert newest_flow_run().name == "{again}"
    assert set(task_states(newest_flow_run()).values()) == {"Cached"}
    assert all(stage["cached"] for stage in second.json["stages"])
    assert [line.split()[-1] for line in second.stderr.splitlines()[1:]] == ["cached"] * 6
    for name in ("pruning_order", "dense_perplexity", "pruned_perplexity", "export_path", "perplexities"):
        assert second.json[name] == first.json[name]
    # Prefect reads its results with whatever serializer the file names, pickle too: a workspace can be somebody else's.
    its_own = {"artifacts", "runs", "state", "locks", "results.duckdb"}
    assert {path.name for path in (tmp_path / "ws").iterdir()} == its_own

    query = f"SELECT variant, text FROM perplexities WHERE run_id = '{second.json['run_id']}'"
    rows = blockpruner("sql", query, "--workspace", tmp_path / "ws", "--json").json
    assert {(row["variant"], row["text"]) for row in rows} == {
        (variant, text) for variant in ("dense", "pruned") for text in ("calibration", "eval.txt")
    }


def test_prefects_memory_counts_only_while_the_artifact_is_whole(options: list[object], tmp_path: Path) -> None:
    blockpruner("run", *options)
    (trace,) = tmp_path.glob("ws/artifacts/search/*/trace.jsonl")
    trace.write_bytes(trace.read_bytes() + b" ")
    again = blockpruner("run", *options)
    assert "computed again" in again.stderr
    states = task_states(newest_flow_run())
    assert states["search"] == "Completed"
    assert states["calibrate"] == states["export"] == "Cached"


def test_the_server_gets_the_progress_and_the_tables(options: list[object]) -> None:
    blockpruner("run", *options)
    assert artifact_keys(newest_flow_run()) == {
        *(("table", "pruning-order"), ("table", "measurements"), ("markdown", "prune-summary"), ("progress", None)),
        *(("image", "removed-blocks"), ("image", "perplexity")),
    }


def test_a_users_error_fails_the_flow_in_one_line(
    options: list[object], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cal.txt").write_text("a\n")
    outcome: Outcome = blockpruner("run", *options, "--num-samples", "all")
    assert outcome.status == 2
    assert outcome.stdout == ""
    assert outcome.stderr.splitlines()[-1].startswith("Error: cal.txt: the text is too short")
    flow_run = newest_flow_run()
    assert flow_run.state is not None
    assert flow_run.state.is_failed()
    assert "too short" in str(flow_run.state.message)
    assert all(record.exc_info is None for record in caplog.records)


def test_a_lost_server_stops_the_showing_and_not_the_search(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def gone(*_: object, **__: object) -> None:
        raise httpx.ConnectError("gone\nreally")

    monkeypatch.setattr(prune_flow, "create_progress_artifact", gone)
    show = prune_flow._ProgressArtifact("search", Reporter())
    for done in (0, 5, 10):
        show(Progress(done, 10, "candidates"))
    assert capsys.readouterr().err.count("does not take the progress") == 1


def test_a_slot_that_is_lost_stops_no_stage(
    options: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Prefect does where the server was away for minutes: it stops the flow wherever that is."""
    took_the_slot: list[threading.Thread] = []

    def take_the_slot(*_: object) -> None:
        if not took_the_slot:
            took_the_slot.append(threading.Thread(target=slot.cancel))
            took_the_slot[0].start()
            time.sleep(1)

    monkeypatch.setattr(prune_flow._ProgressArtifact, "__call__", take_the_slot)
    with WatcherThreadCancelScope() as slot, pytest.raises(CancelledError):
        blockpruner("run", *options)
    (record,) = RunStore(tmp_path / "ws").list()
    assert record.status == "completed"
    assert [stage.status for stage in record.stages] == ["completed"] * 5


class _Interrupted(BaseModel):
    """What is being put into words for the server when SIGTERM comes: pydantic makes an error of its own of it."""

    @model_serializer
    def in_words(self) -> str:
        os.kill(os.getpid(), signal.SIGTERM)
        return ""


def test_an_order_to_end_that_becomes_another_error_cancels_the_flow(
    options: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        prune_flow, "create_progress_artifact", lambda *_, **__: print(_Interrupted().model_dump_json())
    )
    outcome = blockpruner("run", *options)
    assert outcome.status == 143
    assert outcome.stderr.splitlines()[-1].startswith("Terminated. What was finished is kept: ")
    assert "Traceback" not in outcome.stderr
    (record,) = RunStore(tmp_path / "ws").list()
    assert (record.status, record.stages[-1].role) == ("cancelled", "search")
    flow_run = newest_flow_run()
    assert flow_run.state is not None
    assert flow_run.state.is_crashed()  # Prefect's word for an end by a signal
    assert task_states(flow_run)["search"] == "Crashed"


def test_only_a_hub_out_of_reach_is_worth_another_try() -> None:
    def failed(cause: Exception | None) -> Any:
        error = TextSourceError("x")
        error.__cause__ = cause
        return type("State", (), {"data": error})()

    class OfflineModeIsEnabled(ConnectionError):  # noqa: N818  # the hub's own name
        pass

    worth = [
        prune_flow._is_worth_another_try(None, None, failed(e))
        for e in (  # type: ignore[arg-type]
            ConnectionError(),
            OfflineModeIsEnabled(),
            OSError(),
            None,
        )
    ]
    assert worth == [True, False, False, False]


def test_the_deployments_name_what_exists() -> None:
    text = (ROOT / "prefect.yaml").read_text()
    deployments = {deployment["name"]: deployment for deployment in yaml.safe_load(text)["deployments"]}
    assert deployments.keys() == {"local", "nightly", "weekly"}
    assert str(ROOT) not in text
    for deployment in (deployments["local"], deployments["nightly"]):
        module, _, function = deployment["entrypoint"].rpartition(".")
        assert getattr(import_module(module), function) is prune_flow.prune
        make_recipe(deployment["parameters"]["recipe"]).require_target()
        assert deployment["parameters"].keys() <= prune_flow.prune.parameters.properties.keys()
    assert "cron" in deployments["nightly"]["schedules"][0]


def test_the_readme_creates_the_pool_that_the_deployments_name() -> None:
    prefect_yaml = (ROOT / "prefect.yaml").read_text()
    pools = {deployment["work_pool"]["name"] for deployment in yaml.safe_load(prefect_yaml)["deployments"]}
    assert pools == {"blockpruner"}
    for text in (prefect_yaml, (ROOT / "README.md").read_text()):
        assert re.findall(r"work-pool create --type process (\S+)", text) == ["blockpruner"]
        assert re.findall(r"worker start --pool (\S+)", text) == ["blockpruner"]


def test_the_server_schedules_runs_by_cron() -> None:
    """The scheduler writes them in bulk, which SQLAlchemy 2.1 refuses to Prefect 3.8: no night would have its run."""
    with get_client(sync_client=True) as client:
        flow_id = client.create_flow_from_name("nightly")
        schedules = [DeploymentScheduleCreate(schedule=CronSchedule(cron="0 2 * * *", timezone="UTC"))]
        deployment_id = client.create_deployment(flow_id, "nightly", schedules=schedules)
        client.request("POST", f"/deployments/{deployment_id}/schedule", json={}).raise_for_status()
        found = client.read_flow_runs(deployment_filter=DeploymentFilter(id=DeploymentFilterId(any_=[deployment_id])))
    assert {run.state_name for run in found} == {"Scheduled"}


def test_the_servers_form_describes_every_setting() -> None:
    schema = prune_flow.prune.parameters.model_dump()
    fields = schema["definitions"]["Recipe"]["properties"]
    assert all(field["description"] for field in fields.values())


@pytest.mark.parametrize(
    "given",
    [
        {"num_samples": "all", "batch_size": "auto", "tasks": "piqa,arc_easy", "eval_text": "wikitext2"},
        {"num_samples": None, "batch_size": 4, "tasks": ["piqa"], "eval_text": ["a.txt", "b.txt"]},
        {"export_format": "stock,gguf", "export_dtype": None, "speed_batch_sizes": "1,8", "speed_prompt_tokens": 128},
    ],
)
def test_the_servers_form_takes_what_its_descriptions_offer(given: dict[str, Any]) -> None:
    recipe = {"model": "m", "num_blocks": 1, **given}
    make_recipe(recipe)
    validate({"recipe": recipe}, prune_flow.prune.parameters.model_dump(), raise_on_error=True)


def test_logs_of_defects_keep_their_traceback() -> None:
    keep = prune_flow._OneLine()
    for error, kept in ((ValueError("ours"), True), (TextSourceError("theirs"), False)):
        record = logging.LogRecord("x", logging.ERROR, "x", 1, "failed", (), (type(error), error, None))
        assert keep.filter(record)
        assert (record.exc_info is not None) is kept
