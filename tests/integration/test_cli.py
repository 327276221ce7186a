"""The command line from end to end on a tiny model: results, JSON, caches, interruptions, what is imported."""

from __future__ import annotations

import contextlib
import csv
import fcntl
import io
import json
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import stages.search_scorer
from flows.reporter import LOADING
from tests.integration.command_line import ROOT, Outcome, blockpruner, in_a_process, start
from tests.tiny_models import tiny_rows
from tests.unit.child_processes import wait_for

TinyFolder = Callable[[str], Path]
Search = Callable[..., Outcome]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    (folder / "cal.txt").write_text("\n".join(tiny_rows(60)))
    (folder / "long.txt").write_text("\n".join(tiny_rows(800)))
    (folder / "eval.txt").write_text("\n".join(tiny_rows(30, seed=1)))
    return folder


@pytest.fixture
def options(tiny_folder: TinyFolder, texts: Path, tmp_path: Path) -> list[object]:
    return [
        *("--model", tiny_folder("llama")),
        *("--calibration", texts / "cal.txt"),
        *("--num-samples", 40),
        *("--sequence-length", 16),
        *("--workspace", tmp_path / "ws"),
        "--json",
    ]


def order(result: dict[str, Any], *but: str) -> list[dict[str, Any]]:
    """The pruning order without the fields that a clock decides."""
    return [{k: v for k, v in step.items() if k not in ("seconds", *but)} for step in result["pruning_order"]]


def cached(result: dict[str, Any]) -> dict[str, bool]:
    return {stage["role"]: stage["cached"] for stage in result["stages"]}


# --- the commands -----------------------------------------------------------------------------------------------------


def test_every_stage_by_itself(options: list[object], texts: Path, tmp_path: Path) -> None:
    text = ["--eval-text", texts / "eval.txt"]
    assert cached(blockpruner("calibrate", *options, *text).json) == {"calibration": False, "text:eval.txt": False}
    dense = blockpruner("baseline", *options, *text).json
    assert cached(dense) == {"calibration": True, "text:eval.txt": True, "baseline": False}
    assert {row["text"] for row in dense["perplexities"]} == {"calibration", "eval.txt"}

    found = blockpruner("search", *options, "--num-blocks", 3, "--name", "mine").json
    assert found["dense_perplexity"] == pytest.approx(dense["dense_perplexity"], rel=1e-6)
    assert [step["step"] for step in found["pruning_order"]] == [1, 2, 3]
    assert found["export_path"] is None

    workspace = ["--workspace", tmp_path / "ws", "--json"]
    copied = blockpruner("export", "mine", "--num-blocks", 2, "--output", tmp_path / "out", *workspace).json
    assert copied["export_path"] == str(tmp_path / "out")
    assert copied["export"]["num_blocks_removed"] == 2
    assert copied["pruned_perplexity"] == found["pruning_order"][1]["perplexity"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True, dtype=torch.float32)
    assert sum(p.numel() for p in model.parameters()) == copied["export"]["num_parameters"]

    measured = blockpruner("evaluate", "mine", *text, *workspace).json
    assert cached(measured) == {
        "calibration": True,
        "text:eval.txt": True,
        "baseline": True,
        "search": True,
        "export": True,
        "evaluate:pruned": False,
    }
    variants = {(row["variant"], row["text"]) for row in measured["perplexities"]}
    assert variants == {(v, t) for v in ("dense", "pruned") for t in ("calibration", "eval.txt")}


def test_home_folders_are_meant_in_every_path(
    options: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    copied = blockpruner("export", *options, "--num-blocks", 1, "--output", "~/out", "--workspace", "~/ws").json
    assert copied["export_path"] == str(tmp_path / "out")
    assert (tmp_path / "out" / "config.json").is_file()
    assert (tmp_path / "ws" / "runs").is_dir()


def test_after_an_export_that_failed_latest_is_the_run_before(options: list[object], tmp_path: Path) -> None:
    workspace = ["--workspace", tmp_path / "ws"]
    blockpruner("search", *options, "--num-blocks", 2)
    failed = blockpruner("export", "latest", *workspace, "--num-blocks", 1, "--format", "stock")
    assert failed.status == 2, "the first block of this model leaves an attention without its feed-forward"
    assert blockpruner("show", "latest", *workspace, "--json").json["status"] == "failed"
    exported = blockpruner("export", "latest", *workspace, "--json").json
    assert exported["export"]["num_blocks_removed"] == 2
    assert exported["export"]["format"] == "transformers"


def test_a_model_is_evaluated_as_it_is(options: list[object], texts: Path) -> None:
    dense = blockpruner("baseline", *options, "--eval-text", texts / "eval.txt").json
    model = [*options[:2], *options[6:]]
    result = blockpruner("evaluate", *model, "--eval-text", texts / "eval.txt").json
    assert cached(result) == {"text:eval.txt": True, "evaluate:dense": False}
    (row,) = result["perplexities"]
    assert (row["variant"], row["text"]) == ("dense", "eval.txt")
    expected = {row["text"]: row["perplexity"] for row in dense["perplexities"]}
    assert row["perplexity"] == pytest.approx(expected["eval.txt"], rel=1e-6)


def test_lm_eval_tasks_for_dense_and_pruned(options: list[object], tmp_path: Path) -> None:
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    rows = [{"prompt": "the river", "choices": ["stone", "lantern"], "answer": i % 2} for i in range(4)]
    (tasks / "tiny.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tasks / "tiny.yaml").write_text(
        "task: tiny\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: tiny.jsonl\ntest_split: test\n"
        "output_type: multiple_choice\ndoc_to_text: prompt\ndoc_to_choice: choices\ndoc_to_target: answer\n"
        "metric_list:\n  - metric: acc\n"
    )
    result = blockpruner("evaluate", *options, "--num-blocks", 1, "--tasks", "tiny", "--task-dir", tasks)
    rows = [(row["variant"], row["task"], row["metric"], row["num_examples"]) for row in result.json["evaluations"]]
    assert rows == [
        (variant, *row, 4)
        for variant in ("dense", "pruned")
        for row in (("tiny", "acc"), ("average", "acc_norm or acc"))
    ]
    assert all(row["stderr"] is not None for row in result.json["evaluations"])


@pytest.mark.slow
def test_the_dense_models_tasks_are_scored_once_for_all_runs(
    options: list[object], texts: Path, tmp_path: Path
) -> None:
    """Whatever else a run measures, and in whichever order the tasks are named; their data come from local files."""
    data = tmp_path / "data"
    data.mkdir()
    question = {"goal": "the river", "sol1": "the stone", "sol2": "a lantern", "label": 0}
    (data / "piqa.jsonl").write_text("".join(json.dumps(question | {"label": i}) + "\n" for i in (0, 1)))
    question = {"sentence": "the _ was open", "option1": "river", "option2": "garden", "answer": "1"}
    (data / "winogrande.jsonl").write_text(json.dumps(question) + "\n")
    given = ["--task-data", data, "--batch-size", "auto"]
    model = [*options[:2], *options[6:]]
    alone = blockpruner(
        "evaluate", *model, "--tasks", "winogrande,piqa", *given, "--eval-text", texts / "eval.txt"
    ).json
    assert cached(alone) == {"text:eval.txt": False, "evaluate:dense": False, "evaluate:dense:texts": False}
    assert [row["text"] for row in alone["perplexities"]] == ["eval.txt"]
    run = blockpruner("evaluate", *options, "--num-blocks", 1, "--tasks", "piqa,winogrande", *given).json
    assert cached(run)["evaluate:dense"] is True
    assert run["dense_average"] == alone["dense_average"]
    values = {(row["variant"], row["task"], row["metric"]): row["value"] for row in run["evaluations"]}
    for variant in ("dense", "pruned"):
        taken = [values[variant, "piqa", "acc_norm"], values[variant, "winogrande", "acc"]]
        assert run[f"{variant}_average"] == pytest.approx(sum(taken) / 2)
    assert run["samples"] == {}
    kept = blockpruner("evaluate", run["run_id"], "--log-samples", *options[-3:]).json
    assert sorted(kept["samples"]) == ["dense", "pruned"]
    assert all(Path(path).is_file() for path in kept["samples"].values())
    assert kept["evaluations"] == run["evaluations"]
    shown = blockpruner("show", kept["run_id"], *options[-3:-1]).stdout
    assert "answers, pruned:" in shown
    assert kept["samples"]["pruned"] in "".join(shown.split()), "in several lines, as wide as the terminal"
    assert "acc_norm or acc" in shown


def test_the_same_call_again_is_cached_and_says_so(options: list[object]) -> None:
    first = blockpruner("search", *options, "--num-blocks", 2)
    second = blockpruner("search", *options, "--num-blocks", 2)
    assert "computed in" in first.stderr
    assert [line.split() for line in second.stderr.splitlines()] == [["calibrate", "cached"], ["search", "cached"]]
    assert second.json["pruning_order"] == first.json["pruning_order"]
    assert set(cached(second.json).values()) == {True}


def test_more_blocks_continue_and_fewer_read_the_prefix(options: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    first = blockpruner("search", *options, "--num-blocks", 2).json
    more = blockpruner("search", *options, "--num-blocks", 4).json
    assert more["pruning_order"][:2] == first["pruning_order"]  # with the seconds that they took then
    ratio = more["pruning_order"][2]["ratio"]

    def no_model(*_: object, **__: object) -> None:
        raise AssertionError("a prefix needs no model")

    monkeypatch.setattr(stages.search_scorer, "load_model", no_model)
    assert blockpruner("search", *options, "--num-blocks", 3).json["pruning_order"] == more["pruning_order"][:3]
    assert blockpruner("search", *options, "--ratio", ratio).json["pruning_order"] == more["pruning_order"][:3]


def test_a_recipe_with_options(options: list[object], texts: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"model: {options[1]}\ncalibration: {texts}/cal.txt\nnum_samples: 40\nsequence_length: 16\nratio: 0.9\n"
    )
    workspace = ["--workspace", tmp_path / "ws", "--json"]
    by_recipe = blockpruner("search", recipe, "--num-blocks", 2, "--block-kinds", "mha", *workspace).json
    assert [step["block_kind"] for step in by_recipe["pruning_order"]] == ["mha", "mha"]
    assert (
        by_recipe["pruning_order"]
        == (blockpruner("search", *options, "--num-blocks", 2, "--block-kinds", "mha").json["pruning_order"])
    )


# --- results ----------------------------------------------------------------------------------------------------------


def test_runs_are_found_by_id_prefix_name_and_latest(options: list[object], tmp_path: Path) -> None:
    workspace = ["--workspace", tmp_path / "ws"]
    named = blockpruner("search", *options, "--num-blocks", 1, "--name", "mine").json["run_id"]
    latest = blockpruner("search", *options, "--num-blocks", 2).json["run_id"]
    for text, expected in ((named, named), ("mine", named), (latest, latest), ("latest", latest)):
        assert blockpruner("show", text, *workspace, "--json").json["run_id"] == expected
    assert [run["run_id"] for run in blockpruner("runs", *workspace, "--json").json] == [latest, named]
    assert named in blockpruner("runs", *workspace).stdout
    shown = blockpruner("show", "mine", *workspace).stdout
    assert "mha   " in shown
    assert "perplexity" in shown


def test_sql_for_people_and_for_machines(options: list[object], tmp_path: Path) -> None:
    blockpruner("search", *options, "--num-blocks", 2)
    workspace = ["--workspace", tmp_path / "ws"]
    query = "SELECT step, block_kind FROM search_steps ORDER BY step"
    rows = blockpruner("sql", query, *workspace, "--json").json
    assert [row["step"] for row in rows] == [1, 2]
    table = list(csv.DictReader(io.StringIO(blockpruner("sql", query, *workspace, "--csv").stdout)))
    assert [row["block_kind"] for row in table] == [row["block_kind"] for row in rows]
    assert "block_kind" in blockpruner("sql", query, *workspace).stdout
    scores = blockpruner("sql", "SELECT count(*) AS n FROM block_scores", *workspace, "--json").json
    assert scores == [{"n": 8 + 7}]
    never = blockpruner("sql", "SELECT 'nan'::DOUBLE AS x, created_at FROM runs", *workspace, "--json").json
    assert never[0]["x"] is None
    nested = "SELECT [1.5, 'nan'::DOUBLE] AS l, {'a': 'inf'::DOUBLE, 'b': [2]} AS s, MAP {1: '-inf'::DOUBLE} AS m"
    answer = blockpruner("sql", nested, *workspace, "--json").json
    assert answer == [{"l": [1.5, None], "s": {"a": None, "b": [2]}, "m": {"1": None}}]
    assert blockpruner("sql", "SELECT 1 AS a, 2 AS a", *workspace, "--json").json == [{"a": 1, "a_1": 2}]


def test_the_environment_names_the_workspace(
    options: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = blockpruner("search", *options, "--num-blocks", 1).json["run_id"]
    monkeypatch.setenv("BLOCKPRUNER_WORKSPACE", str(tmp_path / "ws"))
    assert blockpruner("show", "latest", "--json").json["run_id"] == run_id


# --- processes --------------------------------------------------------------------------------------------------------


def _started_search(folder: Path, *arguments: object, command: str = "search") -> subprocess.Popen[str]:
    """A search in a process of its own, caught after its first removal or within it."""
    process = start(command, *arguments)
    _wait_for_a_search(process, folder)
    return process


def _wait_for_a_search(process: subprocess.Popen[Any], folder: Path) -> None:
    deadline = time.monotonic() + 90
    while not any(path.stat().st_size for path in folder.glob("state/search/*/*") if path.is_file()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def long_search(tiny_folder: TinyFolder, texts: Path) -> Callable[[Path], list[object]]:
    """Arguments of a search that takes several seconds, in some workspace."""

    def arguments(workspace: Path) -> list[object]:
        good = ["--model", tiny_folder("llama"), "--calibration", texts / "long.txt", "--num-samples", "all"]
        return [*good, "--sequence-length", 64, "--num-blocks", 4, "--workspace", workspace, "--json"]

    return arguments


@pytest.mark.slow
def test_killed_and_run_again_gives_the_undisturbed_trace(
    long_search: Callable[[Path], list[object]], tmp_path: Path
) -> None:
    killed, undisturbed = tmp_path / "killed", tmp_path / "undisturbed"
    process = _started_search(killed, *long_search(killed))
    running = blockpruner("sql", "SELECT status FROM runs", "--workspace", killed, "--json")
    assert running.json == [{"status": "running"}]  # while the search has the workspace
    process.send_signal(signal.SIGKILL)
    process.communicate()

    again = blockpruner("search", *long_search(killed))
    assert "had died" in again.stderr
    dead = blockpruner("runs", "--workspace", killed, "--json").json[1]["run_id"]
    assert f"`blockpruner resume {dead} --workspace {killed}` goes on with it" in again.stderr
    assert cached(again.json) == {"calibration": True, "search": False}
    assert order(again.json) == order(blockpruner("search", *long_search(undisturbed)).json)
    statuses = [run["status"] for run in blockpruner("runs", "--workspace", killed, "--json").json]
    assert statuses == ["completed", "crashed"]
    rows = blockpruner("sql", "SELECT status FROM runs ORDER BY created_at", "--workspace", killed, "--json").json
    assert [row["status"] for row in rows] == ["crashed", "completed"]
    assert not list(killed.rglob(".tmp-*"))


@pytest.mark.slow
@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_search_says_how_to_go_on(
    sent: signal.Signals, status: int, long_search: Callable[[Path], list[object]], tmp_path: Path
) -> None:
    process = _started_search(tmp_path / "ws", *long_search(tmp_path / "ws"))
    process.send_signal(sent)
    stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == status
    assert stdout == ""
    assert "give the same command again" in stderr
    assert "Traceback" not in stderr
    (run,) = blockpruner("runs", "--workspace", tmp_path / "ws", "--json").json
    assert run["status"] == "cancelled"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sent", "status", "said"),
    [(signal.SIGINT, 130, ["", "Interrupted."]), (signal.SIGTERM, 143, ["Terminated."])],
)
def test_what_every_process_of_a_terminal_or_job_hears_spares_prefects_server(
    sent: signal.Signals,
    status: int,
    said: list[str],
    long_search: Callable[[Path], list[object]],
    tmp_path: Path,
) -> None:
    """Ctrl-C, and the SIGTERM of `timeout` and others: without its server Prefect goes on trying for two minutes."""
    process = _started_search(tmp_path / "ws", *long_search(tmp_path / "ws"), command="run")
    os.killpg(process.pid, sent)
    stdout, stderr = process.communicate(timeout=45)
    assert process.returncode == status
    assert stdout == ""
    first, second, *stages = stderr.splitlines()
    assert [first, second] == [f"{LOADING} ...", "starting Prefect ..."]
    stages, ended = stages[: -len(said)], stages[-len(said) :]
    assert {line.split()[0] for line in stages} <= {"calibrate", "baseline"}
    assert [line.split(" ")[0] for line in ended] == said
    last = ended[-1]
    (run,) = blockpruner("runs", "--workspace", tmp_path / "ws", "--json").json
    assert f"`blockpruner resume {run['run_id']} --workspace {tmp_path / 'ws'}`" in last
    assert run["status"] == "cancelled"
    assert not _is_any_left(process)


@pytest.mark.slow
def test_a_terminal_that_is_closed_ends_a_search_as_ctrl_c_does(
    long_search: Callable[[Path], list[object]], tmp_path: Path
) -> None:
    """Or a connection that is lost: SIGHUP, and no line can be written any more."""
    terminal, its_side = pty.openpty()
    program = "from flows.cli import app; app(prog_name='blockpruner')"
    process = subprocess.Popen(
        [sys.executable, "-c", program, "search", *map(str, long_search(tmp_path / "ws"))],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=its_side,
        stdout=its_side,
        stderr=its_side,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    try:
        os.close(its_side)
        _wait_for_a_search(process, tmp_path / "ws")
        os.close(terminal)
        assert process.wait(30) == 128 + signal.SIGHUP
    finally:
        process.kill()
    (run,) = blockpruner("runs", "--workspace", tmp_path / "ws", "--json").json
    assert run["status"] == "cancelled"


@pytest.mark.slow
def test_an_order_to_end_while_prefect_starts_leaves_nothing_behind(
    long_search: Callable[[Path], list[object]], tmp_path: Path
) -> None:
    process = start("run", *long_search(tmp_path / "ws"))
    assert process.stderr is not None
    assert [process.stderr.readline() for _ in range(2)] == [f"{LOADING} ...\n", "starting Prefect ...\n"]
    time.sleep(2)  # until its server is under way
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 143
    assert (stdout, stderr) == ("", "Terminated. What was finished is kept: give the same command again to go on.\n")
    assert not _is_any_left(process)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["while Prefect starts", "while it searches"])
def test_a_command_that_is_killed_leaves_no_server_behind(
    moment: str, long_search: Callable[[Path], list[object]], tmp_path: Path
) -> None:
    """Killed alone, as out of memory is: nothing of ours runs any more, and the server has to see it."""
    arguments = long_search(tmp_path / "ws")
    if moment == "while Prefect starts":
        process = start("run", *arguments)
        assert process.stderr is not None
        assert [process.stderr.readline() for _ in range(2)] == [f"{LOADING} ...\n", "starting Prefect ...\n"]
        wait_for(lambda: any(map(_is_the_server, _members(process.pid))))
    else:
        process = _started_search(tmp_path / "ws", *arguments, command="run")
    assert len(_members(process.pid)) > 1
    try:
        os.kill(process.pid, signal.SIGKILL)
        process.communicate(timeout=30)  # to the end of what the server had inherited
        wait_for(lambda: not _members(process.pid))
    finally:
        for left in _members(process.pid):
            os.kill(left, signal.SIGKILL)


def _members(group: int) -> list[int]:
    """The processes of a group that are not dead: an orphan may wait long for somebody to take note of its end."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, its_group, *_ = path.read_text().rpartition(")")[2].split()
            if int(its_group) == group and state not in "ZX":
                found.append(int(path.parent.name))
    return found


def _is_the_server(pid: int) -> bool:
    """Prefect's import starts short-lived programs of its own, which are not meant."""
    with contextlib.suppress(OSError):
        return b"uvicorn" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def _is_any_left(process: subprocess.Popen[str]) -> bool:
    """Whether a process that this one started is still there."""
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize(
    ("command", "unwanted"),
    [
        ("--help", {"torch", "prefect", "duckdb", "transformers", "lm_eval", "pydantic", "rich"}),
        ("search --help", {"torch", "prefect", "duckdb", "transformers", "lm_eval"}),
        ("runs", {"torch", "prefect", "duckdb", "transformers", "lm_eval"}),
        ("show latest", {"torch", "prefect", "duckdb", "transformers", "lm_eval"}),
        ("sql 'SELECT * FROM runs'", {"torch", "prefect", "transformers", "lm_eval"}),
        ("report latest --output {}/r.html", {"torch", "prefect", "duckdb", "transformers", "lm_eval", "kaleido"}),
    ],
)
def test_looking_imports_nothing_heavy(command: str, unwanted: set[str], options: list[object], tmp_path: Path) -> None:
    if "help" not in command:
        blockpruner("search", *options, "--num-blocks", 1)
        command = f"{command.format(tmp_path)} --workspace {tmp_path / 'ws'}"
    code = (
        "import atexit, shlex, sys; from flows.cli import app; "
        "atexit.register(lambda: print(*sorted(sys.modules), file=sys.stderr)); app(shlex.split(sys.argv[1]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, command], capture_output=True, text=True, check=True, cwd=ROOT, timeout=60
    )
    assert not unwanted & set(done.stderr.split())


def test_tab_completes_commands_and_runs(options: list[object], tmp_path: Path) -> None:
    def complete(line: str) -> list[str]:
        words = {"COMP_WORDS": line, "COMP_CWORD": str(len(line.split(" ")) - 1)}
        outcome = in_a_process(_BLOCKPRUNER_COMPLETE="complete_bash", **words)
        return outcome.stdout.split()

    assert complete("blockpruner ex") == ["export"]
    assert complete("blockpruner search --block-kinds m") == ["mha", "mlp"]
    run_id = blockpruner("search", *options, "--num-blocks", 1).json["run_id"]
    assert complete(f"blockpruner show --workspace {tmp_path / 'ws'} 2") == [run_id]
