"""The command `compare` through a real Prefect server: what cells share, what fails, what a killed one has left."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.settings import PREFECT_API_URL
from prefect.testing.utilities import prefect_test_harness

from blockpruner.errors import ConfigurationError
from flows import compare_flow
from flows.cell_pool import CellPool, environment_of
from flows.cell_worker import Event, Request
from flows.grid import load_comparison
from flows.recipe import make_recipe
from stages.runs import RunRecord, RunStore
from tests.integration.command_line import ROOT, Outcome, blockpruner, start
from tests.integration.test_flow import artifact_keys, newest_flow_run, task_states
from tests.tiny_models import save_tiny_model, tiny_rows

TinyFolder = Callable[[str], Path]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def _server() -> Iterator[None]:
    """One temporary server for all tests here."""
    with prefect_test_harness(server_startup_timeout=180):
        yield


TASKS = {"tasks": "demo_facts", "task_dir": str(ROOT / "data/demo/tasks"), "limit": 4}


def write_comparison(folder: Path, model: Path, tasks: dict[str, Any] | None = None, **fields: Any) -> Path:
    (folder / "cal.txt").write_text("\n".join(tiny_rows(60)))
    (folder / "short.txt").write_text("a\n")
    (folder / "eval.txt").write_text("\n".join(tiny_rows(30, seed=1)))
    base = {
        "model": str(model),
        "calibration": "cal.txt",
        "num_samples": "all",
        "sequence_length": 16,
        "eval_text": "eval.txt",
        **(tasks or {}),
    }
    (folder / "grid.yaml").write_text(yaml.safe_dump({"base": base, **fields}, sort_keys=False))
    return folder / "grid.yaml"


def computed(records: list[RunRecord]) -> Counter[tuple[str, str | None]]:
    """How often each result was computed, by stage and fingerprint, over all runs."""
    stages = [stage for record in records for stage in record.stages if stage.status == "completed"]
    counts = Counter((stage.stage, stage.fingerprint) for stage in stages if not stage.cached)
    assert {(stage.stage, stage.fingerprint) for stage in stages} == counts.keys()
    return counts


# --- a whole comparison -----------------------------------------------------------------------------------------------

GRID = [
    {"strategy": ["blockpruner", "oneshot"], "num_blocks": [1, 3]},
    {"calibration": "short.txt", "num_blocks": 1},
]
LABELS = [
    "blockpruner cal.txt num_blocks=1",
    "blockpruner cal.txt num_blocks=3",
    "oneshot cal.txt num_blocks=1",
    "oneshot cal.txt num_blocks=3",
    "blockpruner short.txt num_blocks=1",
    "SliceGPT",
]


@dataclass(frozen=True)
class Compared:
    """A comparison that was run."""

    arguments: list[object]
    workspace: Path
    model: Path
    outcome: Outcome
    tasks: dict[str, str]
    keys: set[str | None]
    report: Path

    @property
    def rows(self) -> dict[str, dict[str, Any]]:
        """As `--json` printed them, by label."""
        (line,) = self.outcome.stdout.splitlines()
        return {row["label"]: row for row in json.loads(line)["rows"]}

    @property
    def records(self) -> list[RunRecord]:
        return RunStore(self.workspace).list()


@pytest.fixture(scope="module")
def compared(tiny_folder: TinyFolder, tmp_path_factory: pytest.TempPathFactory, _server: None) -> Compared:
    folder = tmp_path_factory.mktemp("compared")
    model = tiny_folder("llama")
    external = save_tiny_model(folder / "sliced", num_hidden_layers=3, seed=5)
    file = write_comparison(folder, model, TASKS, grid=GRID, description="Two strategies.")
    arguments: list[object] = [
        *("compare", file, "--parallel", 2, "--workspace", folder / "ws"),
        *("--external", external, "--label", "SliceGPT", "--report", folder / "report.html"),
    ]
    outcome = blockpruner(*arguments, "--json")
    run = newest_flow_run()
    assert run.name == load_comparison(str(file), {}, {}).name
    assert (run.state_name, "1 of 6 cells failed" in str(run.state and run.state.message)) == ("Failed", True)
    keys = {key for _, key in artifact_keys(run)}
    return Compared(arguments, folder / "ws", model, outcome, task_states(run), keys, folder / "report.html")


def test_every_cell_is_a_row_and_one_that_fails_has_its_error(compared: Compared) -> None:
    assert compared.outcome.status == 1
    rows = compared.rows
    assert list(rows) == LABELS
    failed = rows.pop("blockpruner short.txt num_blocks=1")
    assert failed["status"] == "failed"
    assert "short.txt: the text is too short" in failed["error"]
    assert {(row["status"], row["error"]) for row in rows.values()} == {("completed", None)}
    assert "1 of 6 cells failed" in compared.outcome.stderr
    assert "(6 of 6 done, 0 left)" in compared.outcome.stderr


def test_what_cells_share_is_computed_once(compared: Compared) -> None:
    counts = computed(compared.records)
    assert set(counts.values()) == {1}
    by_stage = Counter(stage for stage, _ in counts)
    # Two texts; searches and exports one a cell; one evaluation of each model: the dense one, the external one and of
    # the four that were exported three, for both strategies remove the same block first.
    assert by_stage == {"calibrate": 2, "baseline": 1, "evaluate": 5, "search": 4, "export": 4}


def test_one_search_goes_furthest_and_the_others_read_it(compared: Compared) -> None:
    assert len(list((compared.workspace / "state" / "search").iterdir())) == 2
    for strategy in ("blockpruner", "oneshot"):
        long, short = (trace_of(compared, f"{strategy}{text} num_blocks={k}") for k, text in ((3, ""), (1, "")))
        assert short == long[:1]  # its seconds as well: it was read, and not computed again
        created = {record.config["num_blocks"]: record.created_at for record in records_of(compared, strategy)}
        assert created[3] < created[1]


def records_of(compared: Compared, strategy: str) -> list[RunRecord]:
    return [each for each in compared.records if each.strategy == strategy and each.status == "completed"]


def trace_of(compared: Compared, label: str) -> list[str]:
    strategy, _, k = label.partition(" num_blocks=")
    (record,) = [each for each in records_of(compared, strategy) if each.config["num_blocks"] == int(k)]
    stage = record.stage("search")
    assert stage is not None
    assert stage.artifact_path is not None
    return (compared.workspace / stage.artifact_path / "trace.jsonl").read_text().splitlines()


def test_rows_have_what_the_runs_measured(compared: Compared) -> None:
    for label, row in compared.rows.items():
        if row["status"] == "failed":
            continue
        shown = blockpruner("show", row["run_id"], "--workspace", compared.workspace, "--json").json
        assert shown["name"] == f"grid: {label}"
        measured = {(each["variant"], each["text"]): each["perplexity"] for each in shown["perplexities"]}
        assert row["perplexities"] == {
            "eval.txt": {"dense": measured["dense", "eval.txt"], "pruned": measured["pruned", "eval.txt"]}
        }
        scores = {(each["variant"], each["metric"]): each["value"] for each in shown["evaluations"]}
        name = "acc_norm" if ("dense", "acc_norm") in scores else "acc"
        assert row["accuracies"]["demo_facts"] == {"dense": scores["dense", name], "pruned": scores["pruned", name]}
        if label != "SliceGPT":
            assert row["num_blocks_asked"] == row["num_blocks_removed"]
            assert row["ratio"] == pytest.approx(shown["pruning_order"][-1]["ratio"])


def test_an_external_checkpoint_is_evaluated_and_not_searched(compared: Compared, tmp_path: Path) -> None:
    row = compared.rows["SliceGPT"]
    record = RunStore(compared.workspace).load(row["run_id"])
    assert not {stage.stage for stage in record.stages} & {"search", "export"}
    assert (row["strategy"], row["metric"], row["num_blocks_removed"]) == ("SliceGPT", None, None)
    alone = blockpruner(
        *("evaluate", "--model", compared.workspace.parent / "sliced", "--sequence-length", 16),
        *("--eval-text", compared.workspace.parent / "eval.txt", "--workspace", tmp_path, "--json"),
    ).json
    (measured,) = alone["perplexities"]
    assert row["perplexities"]["eval.txt"]["pruned"] == pytest.approx(measured["perplexity"])
    # One of four layers is missing. A layer: q, o 32*32, k, v 16*32, three of 48*32, two norms of 32.
    layer = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32 + 2 * 32
    assert row["ratio"] == pytest.approx(layer / (4 * layer + 2 * 128 * 32 + 32))


def test_the_server_has_a_task_a_cell_and_the_table(compared: Compared) -> None:
    states = {label: "Failed" if "short" in label else "Completed" for label in LABELS}
    assert compared.tasks == states
    assert "comparison" in compared.keys


def test_the_store_knows_which_comparison_a_run_belongs_to(compared: Compared) -> None:
    query = "SELECT comparison, strategy, status, count(*) AS n FROM runs GROUP BY ALL ORDER BY ALL"
    rows = blockpruner("sql", query, "--workspace", compared.workspace, "--json").json
    assert {row["comparison"] for row in rows} == {"grid"}
    assert sum(row["n"] for row in rows) == 6


def test_the_report_is_of_all_runs(compared: Compared) -> None:
    page = compared.report.read_text()
    for label in ("oneshot cal.txt num_blocks=3", "SliceGPT"):
        assert label in page


def test_again_only_what_is_missing_is_done(compared: Compared) -> None:
    before = {record.run_id for record in compared.records}
    again = blockpruner(*compared.arguments)
    new = [record for record in compared.records if record.run_id not in before]
    assert [record.name for record in new] == ["grid: blockpruner short.txt num_blocks=1"]
    assert again.stderr.count("was done before") == 5
    assert again.status == 1
    words = again.stdout.split()
    assert words[:3] == ["grid", "Two", "strategies."]
    assert {"dense", "blockpruner", "oneshot", "SliceGPT"} <= set(words)


def test_a_changed_text_is_measured_anew(compared: Compared) -> None:
    text = compared.workspace.parent / "eval.txt"
    original = text.read_text()
    recipe = load_comparison(str(compared.workspace.parent / "grid.yaml"), {}, {}).cells[0].recipe
    from flows.reporter import Reporter
    from flows.runner import Runner

    runner = Runner(compared.workspace, Reporter())
    assert runner.finished(recipe, "evaluate", "grid") is not None
    assert runner.finished(recipe, "evaluate", "another") is None
    try:
        text.write_text("\n".join(tiny_rows(30, seed=2)))
        assert runner.finished(recipe, "evaluate", "grid") is None
    finally:
        text.write_text(original)


def test_what_the_library_says_of_a_cell_is_said_by_the_cell(
    compared: Compared, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it was computed before; and what only looks at a comparison leaves it to the cells."""
    from flows.reporter import Reporter
    from flows.runner import Plan, Runner

    library, make, said = logging.getLogger("blockpruner"), Plan.make, list[str]()
    heard_by: list[list[logging.Handler]] = []

    def warning(*arguments: Any) -> Plan:
        heard_by.append(list(library.handlers))
        library.warning("too long a sequence")
        return make(*arguments)

    monkeypatch.setattr(Plan, "make", warning)
    comparison = load_comparison(str(compared.workspace.parent / "grid.yaml"), {}, {})
    monkeypatch.setattr(Reporter, "warn", lambda _, line: said.append(line))
    runner = Runner(compared.workspace, Reporter())
    for _ in range(2):
        assert runner.finished(comparison.cells[0].recipe, "evaluate", "grid") is not None
    assert said == ["too long a sequence"]
    compare_flow.check_comparison(comparison, 1)
    assert said == ["too long a sequence"]
    assert len(heard_by) > 2
    assert all(heard_by)  # else Python prints it bare


# --- stopped in the middle --------------------------------------------------------------------------------------------


def processes_naming(text: str) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if text.encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def wait_for(condition: Callable[[], object], seconds: float = 150.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def stopped_in_its_next_cell(how: signal.Signals, arguments: list[object], runs: RunStore) -> str:
    """Start the comparison, end it as soon as it has a cell more than before and is at the next; what it said."""
    before = Counter(record.status for record in runs.list())["completed"]
    process = start(*arguments, PREFECT_API_URL=PREFECT_API_URL.value() or "")
    wait_for(lambda: standing(runs)["completed"] == before + 1 and standing(runs)["running"])
    os.kill(process.pid, how)
    _, said = process.communicate(timeout=60)
    assert process.returncode == (-signal.SIGKILL if how == signal.SIGKILL else 130), said
    wait_for(lambda: not processes_naming(str(runs.workspace.path)))
    return said


def standing(runs: RunStore) -> Counter[str]:
    return Counter(record.status for record in runs.list())


@pytest.mark.timeout(400)  # three commands, each of which imports everything
def test_one_that_is_stopped_goes_on_where_it_was(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    grid = {"metric": ["perplexity", "js", "kl"], "num_blocks": 2}
    file = write_comparison(tmp_path, tiny_folder("llama"), grid=grid)
    arguments: list[object] = ["compare", file, "--workspace", tmp_path / "ws", "--json"]
    runs = RunStore(tmp_path / "ws")

    said = stopped_in_its_next_cell(signal.SIGINT, arguments, runs)
    assert said.splitlines()[-1].startswith("Interrupted. What was finished is kept")
    assert standing(runs) == {"completed": 1, "cancelled": 1}
    assert ": stopped (1 of 3 done, 2 left" in said
    assert "failed" not in said
    stopped_in_its_next_cell(signal.SIGKILL, arguments, runs)
    assert standing(runs) == {"completed": 2, "cancelled": 2}  # closed by the cells' own processes, which ended too
    done = {record.run_id for record in runs.list() if record.status == "completed"}

    outcome = blockpruner(*arguments)
    rows = outcome.json["rows"]
    assert [row["status"] for row in rows] == ["completed"] * 3
    assert {row["run_id"] for row in rows} > done
    assert standing(runs) == {"completed": 3, "cancelled": 2}
    assert outcome.stderr.count("was done before") == 2
    assert set(computed(runs.list()).values()) == {1}


# --- the processes that carry out cells -------------------------------------------------------------------------------


def request(model: Path, tmp_path: Path, **fields: Any) -> Request:
    (tmp_path / "cal.txt").write_text("\n".join(tiny_rows(60)))
    recipe = make_recipe(
        {
            "model": str(model),
            "calibration": str(tmp_path / "cal.txt"),
            "num_samples": "all",
            "sequence_length": 16,
            "num_blocks": 1,
            **fields,
        }
    )
    return Request(recipe=recipe, goal="evaluate", comparison="c")


def test_a_process_that_dies_costs_its_own_cell_alone(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    pool = CellPool(tmp_path / "ws", 1)
    heard: list[Event] = []

    def kill_at_the_search(event: Event) -> None:
        heard.append(event)
        if event.text.startswith("search"):
            (pid,) = processes_naming(str(tmp_path / "ws"))
            os.kill(pid, signal.SIGKILL)

    try:
        died = pool.carry_out(request(tiny_folder("llama"), tmp_path), kill_at_the_search)
        assert died.text == "the process of this cell was ended by SIGKILL (out of memory?)"
        assert any(event.kind == "stage" and event.text == "calibrate" for event in heard)
        lived = pool.carry_out(request(tiny_folder("llama"), tmp_path), heard.append)
        assert (lived.text, lived.cached) == ("", False)
        assert any("it is now closed as crashed" in event.text for event in heard)
        again = pool.carry_out(request(tiny_folder("llama"), tmp_path), heard.append)
        assert (again.run_id, again.cached) == (lived.run_id, True)
    finally:
        pool.stop()
    assert pool.carry_out(request(tiny_folder("llama"), tmp_path), heard.append).text == "stopped before it began"
    assert not processes_naming(str(tmp_path / "ws"))


def test_each_process_has_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    shares = [environment_of(slot, 3, spread=True) for slot in range(3)]
    assert [share["CUDA_VISIBLE_DEVICES"] for share in shares] == ["4", "6", "4"]
    assert {share["OMP_NUM_THREADS"] for share in shares} == {"2"}
    assert environment_of(0, 1, spread=True).keys() == {"PYTHONPATH"}
    assert "CUDA_VISIBLE_DEVICES" not in environment_of(0, 2, spread=False)


# --- refused before anything runs -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--external", "./x"], "--external is given 1 times and --label 0 times"),
        (["--external", "./nowhere", "--label", "y"], "cell y: there is no model folder"),
        (["--report", "nowhere/report.html"], "there is no folder nowhere"),
        (["--parallel", 0], "parallel is 0"),
        (["--tasks", "piqa", "--task-data", "nowhere", "--log-samples"], "there is no folder"),
        (["--log-samples"], "log_samples is given and no tasks"),
        (["--tasks", "piqqa"], "cell js seed=1: unknown task 'piqqa'"),
        (["--json", "--csv"], "both --json and --csv"),
        (["--seed", 3], "seed differs from cell to cell"),
    ],
)
def test_what_is_wrong_is_refused_before_anything_runs(
    more: list[object], said: str, tiny_folder: TinyFolder, tmp_path: Path
) -> None:
    grid = [{"metric": "js", "seed": 1, "num_blocks": 1}, {"metric": "kl", "seed": 2, "num_blocks": 1}]
    file = write_comparison(tmp_path, tiny_folder("llama"), grid=grid)
    outcome = blockpruner("compare", file, "--workspace", tmp_path / "ws", *more)
    assert outcome.status == 2
    assert outcome.stdout == ""
    assert said in outcome.stderr.splitlines()[-1]
    assert not (tmp_path / "ws").exists()


def test_a_report_that_can_go_nowhere_is_refused_on_the_server_too(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    file = write_comparison(tmp_path, tiny_folder("llama"), grid={"num_blocks": 1})
    comparison = load_comparison(str(file), {}, {})
    for page, said in (
        (tmp_path / "gone" / "page.html", "there is no folder"),
        (tmp_path, "is a folder"),
        (tmp_path / "page.txt", "end in .html"),
    ):
        with pytest.raises(ConfigurationError, match=said):
            compare_flow.compare(comparison, str(tmp_path / "ws"), report=str(page))
    assert not (tmp_path / "ws").exists()


def test_the_weekly_deployment_names_what_exists() -> None:
    deployments = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
    (weekly,) = [each for each in deployments if each["name"] == "weekly"]
    module, _, function = weekly["entrypoint"].rpartition(".")
    assert getattr(import_module(module), function) is compare_flow.compare
    assert weekly["parameters"].keys() <= compare_flow.compare.parameters.properties.keys()
    assert load_comparison(weekly["parameters"]["recipe"], {}, {}).cells
    assert weekly["schedules"] == [{"cron": "0 3 * * 0", "timezone": "UTC"}]


def test_help_is_quick_to_import() -> None:
    code = "import sys, flows.cli_compare; print(sorted({'torch', 'prefect', 'plotly'} & sys.modules.keys()))"
    import sys

    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert answer.stdout.strip() == "[]"
