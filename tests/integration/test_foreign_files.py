"""Artifacts, checkpoints and names of others: none of them runs code, leads out of the workspace or steers a terminal.

What `sql` may do is in tests/unit/test_store.py, what a page shows in test_report.py, what an export trusts in
test_export_trust.py.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stages.contract import canonical_digest
from tests.integration.bad_input_lab import Lab, refused
from tests.tiny_models import save_tiny_model, tiny_rows

TinyFolder = Callable[[str], Path]
ESCAPES = "\x1b[2J\x07\u202e"


class Trap:
    """What touches a file as soon as it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return (eval, (f"open({str(self.mark)!r}, 'w').close()",))


def code(mark: Path) -> str:
    return f"open({str(mark)!r}, 'w').close()\n"


def small(folder: Path, model: Path) -> Lab:
    shutil.copytree(model, folder / "model")
    (folder / "cal.txt").write_text("\n".join(tiny_rows(40)))
    (folder / "new.txt").write_text("\n".join(tiny_rows(40, seed=1)))
    return Lab(folder, folder / "ws")


@pytest.fixture
def lab(tmp_path: Path, tiny_folder: TinyFolder) -> Lab:
    return small(tmp_path, tiny_folder("llama"))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, tiny_folder: TinyFolder) -> Lab:
    """A run whose export comes with code."""
    made = small(tmp_path_factory.mktemp("exported"), tiny_folder("llama"))
    assert made.call("export", *made.good, "--num-blocks", 1, "--export-format", "transformers").status == 0
    return made


@pytest.fixture
def foreign(exported: Lab, tmp_path: Path) -> Lab:
    """The same, handed on by somebody."""
    shutil.copytree(exported.path, tmp_path / "foreign")
    return Lab(tmp_path / "foreign", tmp_path / "foreign/ws")


def signed(artifact: Path) -> None:
    """Write the manifest anew, so that every digest is right: it is no secret how."""
    manifest = json.loads((artifact / "manifest.json").read_text())
    del manifest["sha256"]
    contents = {
        path.relative_to(artifact).as_posix(): path.read_bytes()
        for path in sorted(artifact.rglob("*"))
        if path.is_file() and path.name != "manifest.json"
    }
    manifest["files"] = {
        name: {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
        for name, content in contents.items()
    }
    manifest["sha256"] = canonical_digest(manifest)
    (artifact / "manifest.json").write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")


def with_more_code(model: Path, mark: Path) -> None:
    path = model / "modeling_blockpruned.py"
    path.write_text(path.read_text() + code(mark))


def with_another_file(model: Path, mark: Path) -> None:
    (model / "custom_generate").mkdir()
    (model / "custom_generate" / "generate.py").write_text(code(mark))


def with_a_pointer(model: Path, mark: Path) -> None:
    elsewhere = mark.parent / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "modeling.py").write_text(code(mark))
    config = json.loads((model / "config.json").read_text())
    config["auto_map"]["AutoModelForCausalLM"] = f"{elsewhere}--modeling.Model"
    (model / "config.json").write_text(json.dumps(config))


def with_another_type(model: Path, mark: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "model_type": "mine"}))
    with_more_code(model, mark)


@pytest.mark.parametrize("change", [with_more_code, with_another_file, with_a_pointer, with_another_type])
def test_code_in_an_artifact_of_others_is_not_run(
    change: Callable[[Path, Path], None], foreign: Lab, tmp_path: Path
) -> None:
    (artifact,) = foreign.workspace.glob("artifacts/export/*")
    change(artifact / "model", tmp_path / "mark")
    signed(artifact)
    for command in (("evaluate", "latest", "--eval-text", foreign.path / "new.txt"), ("speed", "latest")):
        line = refused(foreign.call(*command))
        assert "format transformers writes" in line or "model code that this version's exporter does not write" in line
    assert not (tmp_path / "mark").exists()


def test_our_own_code_is_run(foreign: Lab) -> None:
    (artifact,) = foreign.workspace.glob("artifacts/export/*")
    signed(artifact)
    assert foreign.call("evaluate", "latest", "--eval-text", foreign.path / "new.txt").status == 0


@pytest.mark.parametrize("name", ["model/pytorch_model.bin", "results.PKL", "model/deep/x.pt"])
def test_an_artifact_with_a_pickle_is_refused(name: str, foreign: Lab, tmp_path: Path) -> None:
    (artifact,) = foreign.workspace.glob("artifacts/search/*")
    (artifact / name).parent.mkdir(parents=True, exist_ok=True)
    (artifact / name).write_bytes(pickle.dumps(Trap(tmp_path / "mark")))
    signed(artifact)
    outcome = foreign.search("--json")
    assert f"holds {name}, a kind of file that can run code when it is loaded: computed again" in outcome.stderr
    assert [stage["cached"] for stage in outcome.json["stages"]] == [True, False]
    assert not (tmp_path / "mark").exists()


def test_pickled_weights_are_never_loaded(lab: Lab, tmp_path: Path) -> None:
    """Whatever the folder offers beside, or in place of, what is checked."""
    content = pickle.dumps(Trap(tmp_path / "mark"))
    for name in ("pytorch_model.bin", "adapter_model.bin", "model.pt", "training_args.bin", "scheduler.pt"):
        (lab.model / name).write_bytes(content)
    assert lab.search().status == 0
    (lab.model / "model.safetensors").unlink()
    assert "only pickled weights" in refused(lab.search())
    (lab.model / "model.safetensors").write_bytes(content)
    assert "hold no header" in refused(lab.search())
    assert not (tmp_path / "mark").exists()


def test_code_of_a_model_is_run_for_who_trusts_it_alone_and_the_run_says_so(lab: Lab, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    config = lab.model / "config.json"
    settings = json.loads(config.read_text()) | {"auto_map": {"AutoModelForCausalLM": "modeling.Mine"}}
    config.write_text(json.dumps(settings))
    class_ = "from transformers import LlamaForCausalLM\n\n\nclass Mine(LlamaForCausalLM):\n    pass\n"
    (lab.model / "modeling.py").write_text(code(mark) + class_)
    assert lab.search().status == 0
    assert not mark.exists()
    assert lab.call("baseline", *lab.good, "--trust-remote-code").status == 0
    assert mark.exists()
    trusted = "SELECT config->>'trust_remote_code' AS trusted FROM runs ORDER BY created_at"
    assert [row["trusted"] for row in lab.call("sql", trusted, "--json").json] == ["false", "true"]


def test_an_adapter_does_not_bring_another_model(lab: Lab) -> None:
    """Which would be loaded in place of the one that was checked and identified."""
    other = save_tiny_model(lab.path / "other", "llama")
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(other)}
    (lab.model / "adapter_config.json").write_text(json.dumps(settings))
    assert "holds an adapter" in refused(lab.search())


@pytest.mark.parametrize("name", ["../../outside", "/tmp/outside", "..", f"a/{ESCAPES}\n../b"])
def test_names_lead_nowhere_and_steer_nothing(name: str, lab: Lab) -> None:
    text = lab.file("new\x1b[2J\n.txt", b"\n".join(row.encode() for row in tiny_rows(40, seed=1)))
    before = {path for path in lab.path.rglob("*") if lab.workspace not in (path, *path.parents)}
    run = ("baseline", *lab.good, "--name", name, "--eval-text", text)
    said = [lab.call(*run), lab.call("runs"), lab.call("show", name), lab.call("show", "latest", "--markdown")]
    assert [outcome.status for outcome in said] == [0, 0, 0, 0], said
    shown = "".join(outcome.stdout + outcome.stderr for outcome in said)
    assert all(character.isprintable() or character == "\n" for character in shown), shown
    after = {path for path in lab.path.rglob("*") if lab.workspace not in (path, *path.parents)}
    assert after == before
    assert all(path.name.isascii() and path.name.isprintable() for path in lab.workspace.rglob("*"))


DEEP = ["[" * 200_000, '{"a":' * 200_000]


@pytest.mark.parametrize("deep", DEEP, ids=["lists", "objects"])
@pytest.mark.parametrize("place", ["artifacts/export/*/manifest.json", "artifacts/search/*/manifest.json"])
def test_a_manifest_that_is_too_deep_is_damaged_as_any_other(place: str, deep: str, foreign: Lab) -> None:
    (manifest,) = foreign.workspace.glob(place)
    manifest.write_text(deep)
    (foreign.workspace / "results.duckdb").unlink()
    for command in (("show", "latest"), ("db", "rebuild"), ("sql", "FROM runs")):
        outcome = foreign.call(*command)
        assert outcome.status == 0, outcome
    assert "has a changed file manifest.json: its rows are left out" in foreign.call("show", "latest").stderr
    assert foreign.call("calibrate", *foreign.good).status == 0  # which has nothing to do with it
    assert foreign.call("export", *foreign.good, "--num-blocks", 1, "--format", "transformers").status == 0
    assert foreign.call("show", "latest").stderr == ""


@pytest.mark.parametrize("deep", DEEP, ids=["lists", "objects"])
@pytest.mark.parametrize("name", ["step-0001.json", "plan.json"])
def test_a_checkpoint_that_is_too_deep_is_computed_again(name: str, deep: str, foreign: Lab) -> None:
    expected = foreign.search("--num-blocks", 2, "--json").json["pruning_order"]
    shutil.rmtree(foreign.workspace / "artifacts/search")
    (folder,) = foreign.workspace.glob("state/search/*")
    (folder / "step-0002.json").unlink()
    (folder / name).write_text(deep)
    found = foreign.search("--num-blocks", 2, "--json").json["pruning_order"]
    assert [(step["layer_index"], step["block_kind"], step["score"]) for step in found] == [
        (step["layer_index"], step["block_kind"], step["score"]) for step in expected
    ]


def pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def endless(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("make", [pipe, endless])
def test_a_record_that_is_no_file_is_said_and_not_waited_for(make: Callable[[Path], None], foreign: Lab) -> None:
    make(foreign.workspace / "runs/aa.json")
    said = f"Warning: the run record {foreign.workspace / 'runs/aa.json'} is damaged; remove it"
    for outcome in (foreign.call("runs"), foreign.search(), foreign.call("export", "latest")):
        assert outcome.status == 0
        assert any(line.startswith(said) for line in outcome.stderr.splitlines()), outcome.stderr


@pytest.mark.parametrize("make", [pipe, endless])
@pytest.mark.parametrize(
    "name", ["step-0001.json", "plan.json", "dense.safetensors", "partial.safetensors", "partial-previous.safetensors"]
)
def test_a_checkpoint_that_is_no_file_is_said_and_not_waited_for(
    name: str, make: Callable[[Path], None], foreign: Lab
) -> None:
    shutil.rmtree(foreign.workspace / "artifacts/search")
    (folder,) = foreign.workspace.glob("state/search/*")
    make(folder / name)
    outcome = foreign.search("--num-blocks", 2)
    assert outcome.status == 0
    said = [line for line in outcome.stderr.splitlines() if line.startswith("Warning: ")]
    assert any(f"{name} is no file" in line or "step 1 of the search's checkpoints is" in line for line in said), said


def test_a_databases_log_that_is_no_file_is_not_waited_for(foreign: Lab) -> None:
    pipe(foreign.workspace / "results.duckdb.wal")
    assert [row["name"] for row in foreign.call("sql", "SELECT name FROM runs", "--json").json] == [None]
    pipe(foreign.workspace / "results.duckdb.wal")
    assert "results.duckdb is damaged: made anew" in foreign.search().stderr


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """What is none of a workspace's business."""
    for name in ("precious", ".tmp-ab-1/mine", "search/.tmp-ab-1/mine", "search/ab/mine", "results.lock"):
        (tmp_path / "outside" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "outside" / name).write_text("x")
    return tmp_path / "outside"


def contents(folder: Path) -> dict[Path, str]:
    return {path: path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["artifacts", "state", "runs", "locks", "damaged"])
def test_a_workspaces_folders_do_not_lie_elsewhere(name: str, foreign: Lab, outside: Path) -> None:
    shutil.rmtree(foreign.workspace / name, ignore_errors=True)
    (foreign.workspace / name).symlink_to(outside)
    before = contents(outside)
    for command in (("runs",), ("show", "latest"), ("cache", "list"), ("search", *foreign.good, "--num-blocks", 2)):
        assert f"{foreign.workspace / name} is a symbolic link" in refused(foreign.call(*command))
    assert contents(outside) == before


@pytest.mark.parametrize("name", ["results.duckdb", "results.duckdb.wal"])
def test_a_workspaces_database_does_not_lie_elsewhere(name: str, foreign: Lab, outside: Path) -> None:
    (foreign.workspace / name).unlink(missing_ok=True)
    (foreign.workspace / name).symlink_to(outside / "precious")
    before = contents(outside)
    for command in (("runs",), ("sql", "SELECT 1"), ("db", "rebuild"), ("search", *foreign.good, "--num-blocks", 2)):
        assert f"{foreign.workspace / name} is a symbolic link" in refused(foreign.call(*command))
    assert contents(outside) == before


@pytest.mark.parametrize("name", ["artifacts/evil", "artifacts/speed", "state/evil"])
def test_nothing_is_removed_through_a_link(name: str, foreign: Lab, outside: Path) -> None:
    (foreign.workspace / name).symlink_to(outside)
    before = contents(outside)
    assert foreign.search("--num-blocks", 2).status == 0
    assert foreign.call("cache", "prune", "--older-than", "0h", "--yes").status == 0
    assert contents(outside) == before


def test_answers_outside_of_the_workspace_are_not_those_of_a_run(foreign: Lab, outside: Path) -> None:
    (outside / "samples.parquet").touch()
    (record,) = foreign.records()
    stage = {**record["stages"][0], "role": "evaluate:dense", "artifact_path": str(outside)}
    for path in (str(outside), "../../outside"):
        changed = {**record, "stages": [*record["stages"], {**stage, "artifact_path": path}]}
        (foreign.workspace / f"runs/{record['run_id']}.json").write_text(json.dumps(changed))
        assert foreign.call("show", "latest", "--json").json["samples"] == {}


STEERING = "[/red][red]\x1b[2J\x1b]0;pwned\x07\u202e"


def in_the_trace(workspace: Path) -> None:
    (artifact,) = workspace.glob("artifacts/search/*")
    steps = [json.loads(line) for line in (artifact / "trace.jsonl").read_text().splitlines()]
    for step in steps:
        step["block"]["block_kind"] = STEERING
    (artifact / "trace.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    signed(artifact)


def in_the_export(workspace: Path) -> None:
    (artifact,) = workspace.glob("artifacts/export/*")
    manifest = json.loads((artifact / "manifest.json").read_text())
    manifest["manifest"] |= {"format": STEERING, "verified_with": STEERING}
    (artifact / "manifest.json").write_text(json.dumps(manifest))
    signed(artifact)


def in_the_evaluation(workspace: Path) -> None:
    """Which is the baseline's artifact with other words."""
    (artifact,) = workspace.glob("artifacts/search/*")
    manifest = json.loads((artifact / "manifest.json").read_text())
    metric = {"task": STEERING, "metric": STEERING, "value": 0.5, "stderr": None, "num_examples": 3}
    manifest["manifest"] = {"texts": [{"text": STEERING, "num_tokens": 2, "perplexity": 3.0}], "metrics": [metric]}
    copy = workspace / "artifacts/evaluate" / artifact.name
    copy.mkdir(parents=True)
    (copy / "manifest.json").write_text(json.dumps(manifest))
    signed(copy)
    stage = {"stage": "evaluate", "label": "evaluate", "status": "completed"}
    stage["artifact_path"] = copy.relative_to(workspace).as_posix()
    in_record(workspace, lambda record: record["stages"].append({**stage, "role": "evaluate:dense"}))


def in_the_record(workspace: Path) -> None:
    def change(record: dict[str, Any]) -> None:
        for stage in record["stages"]:
            stage |= {"fingerprint": STEERING, "error": STEERING, "label": STEERING}
        for name in ("model", "name", "host", "calibration", "strategy", "metric", "dtype", "device", "error"):
            record[name] = STEERING
        record["config"] |= {"task_dir": STEERING, "ray_address": STEERING}

    in_record(workspace, change)


def in_record(workspace: Path, change: Callable[[dict[str, Any]], object]) -> None:
    (path,) = workspace.glob("runs/*.json")
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


@pytest.mark.parametrize("forge", [in_the_trace, in_the_export, in_the_evaluation, in_the_record])
def test_nothing_in_a_workspace_of_others_steers_a_terminal(forge: Callable[[Path], None], foreign: Lab) -> None:
    forge(foreign.workspace)
    (foreign.workspace / "results.duckdb").unlink()
    tables = ("search_steps", "evaluations", "exports", "runs", "stage_runs")
    commands = [
        *(("show", "latest", *form) for form in ((), ("--csv",), ("--markdown",), ("--latex",), ("--json",))),
        *(("runs", *form) for form in ((), ("--csv",), ("--json",))),
        *(("sql", f"FROM {table}", *form) for table in tables for form in ((), ("--csv",), ("--json",))),
        ("cache", "list"),
        ("resume", "latest"),
    ]
    said = [foreign.call(*command) for command in commands]
    assert [outcome.status for outcome in said] == [0] * len(commands), said
    for outcome in said:
        shown = outcome.stdout + outcome.stderr
        assert all(character.isprintable() or character == "\n" for character in shown), shown
    assert "[/red][red]\\x1b[2J" in said[0].stdout
