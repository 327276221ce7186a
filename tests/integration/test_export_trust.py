"""Code that a model's files name is never run unless the user trusts it; the exporter's own always is."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest

from blockpruner.blocks import mha, mlp
from blockpruner.checkpoint import Checkpoint
from blockpruner.errors import CheckpointError
from blockpruner.export.names import ExportFormat
from blockpruner.export.write import write_export
from blockpruner.speed import SpeedCase, TimedModel, measure_speed
from stages.contract import Runtime
from stages.evaluate import EvaluateConfig, EvaluateInputs
from stages.evaluate import run as evaluate
from tests.integration.export_lab import WIDTHS, change_config, finished_search, run
from tests.tiny_models import save_tiny_model

TinyFolder = Callable[[str], Path]
ORDER = (mlp(1), mha(2))


@pytest.fixture
def trap(tmp_path: Path) -> Path:
    """A file that appears as soon as the code beside it is run."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    mark = folder / "mark"
    code = f"open({str(mark)!r}, 'w').close()\n"
    (folder / "modeling.py").write_text(
        f"{code}from transformers import LlamaForCausalLM\n\n\nclass Trap(LlamaForCausalLM):\n    pass\n"
    )
    (folder / "tokenization.py").write_text(
        f"{code}from transformers import PreTrainedTokenizerFast\n\n\nclass Trap(PreTrainedTokenizerFast):\n    pass\n"
    )
    return mark


def model_with(trap: Path, folder: Path) -> Path:
    code = {"AutoModelForCausalLM": f"{trap.parent}--modeling.Trap"}
    change_config(save_tiny_model(folder, "llama", **WIDTHS), auto_map=code, custom_pipelines={"x": {"impl": "y"}})
    return folder


@pytest.mark.parametrize("format_", ["stock", "zeroed", "transformers", "decilm"])
def test_an_export_names_no_code_but_the_exporters(tmp_path: Path, trap: Path, format_: ExportFormat) -> None:
    source = Checkpoint.open(str(model_with(trap, tmp_path / "source")))
    export = write_export(source, ORDER, tmp_path / "model", format_)
    config = json.loads((export.path / "config.json").read_text())
    assert "custom_pipelines" not in config
    files = {path.stem for path in export.path.glob("*.py")}
    assert {name.partition(".")[0] for name in config.get("auto_map", {}).values()} == files
    assert bool(files) == (format_ in ("transformers", "decilm"))


def test_the_gate_runs_no_code_of_the_source(tmp_path: Path, trap: Path) -> None:
    manifest = run(tmp_path, finished_search(model_with(trap, tmp_path / "source"), ORDER, tmp_path), format="stock")
    assert manifest.verified
    assert not trap.exists()


def test_the_gate_runs_no_code_in_a_format_that_has_none(
    tmp_path: Path, trap: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if a setting that names code came through."""
    monkeypatch.setattr("blockpruner.export.source._CODE_SETTINGS", frozenset())
    manifest = run(tmp_path, finished_search(model_with(trap, tmp_path / "source"), ORDER, tmp_path), format="zeroed")
    assert manifest.verified
    assert not trap.exists()


@pytest.mark.parametrize("format_", ["stock", "zeroed"])
def test_a_family_of_transformers_that_brings_its_old_code_along_is_exported(tmp_path: Path, format_: str) -> None:
    """As Phi-3 does on the hub."""
    folder = save_tiny_model(tmp_path / "source", "phi3")
    classes = {"AutoConfig": "configuration_phi3.Phi3Config", "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}
    change_config(folder, auto_map=classes)
    for name in ("configuration_phi3", "modeling_phi3"):
        (folder / f"{name}.py").write_text("raise RuntimeError('old code')\n")
    assert run(tmp_path, finished_search(folder, ORDER, tmp_path), format=format_).verified


@pytest.mark.parametrize("trusted", [False, True])
def test_speed_trusts_a_model_as_it_is_told(tmp_path: Path, trap: Path, trusted: bool) -> None:
    case = SpeedCase(batch_size=1, prompt_tokens=4, new_tokens=1)
    folder = model_with(trap, tmp_path / "source")
    measure_speed([TimedModel(folder, trusted)], [case], device="cpu", dtype="float32", num_repeats=1)
    assert trap.exists() == trusted


@pytest.mark.parametrize("trusted", [False, True])
def test_a_tokenizers_code_is_run_for_who_trusts_it_alone(
    tiny_folder: TinyFolder, tmp_path: Path, trap: Path, trusted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The code of the exporter, which is run in any case, has no part in it."""
    source = Checkpoint.open(str(tiny_folder("llama")))
    export = write_export(source, ORDER[:1], tmp_path / "model", "transformers")
    path = export.path / "tokenizer_config.json"
    code = {"auto_map": {"AutoTokenizer": [None, f"{trap.parent}--tokenization.Trap"]}, "tokenizer_class": "Trap"}
    path.write_text(json.dumps(json.loads(path.read_text()) | code))
    monkeypatch.setattr("stages.lm_harness.evaluate_tasks", lambda model, tokenizer, *_, **__: {"results": {}})
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    inputs = EvaluateInputs(Checkpoint.open(str(export.path)), task_dir=tasks, trust_remote_code=trusted, has_code=True)
    monkeypatch.setattr("stages.evaluate.task_metrics", lambda _: ())
    with nullcontext() if trusted else pytest.raises(CheckpointError, match="trust_remote_code"):
        evaluate(a_task(tasks), inputs, tmp_path, Runtime())
    assert trap.exists() == trusted


def a_task(folder: Path) -> EvaluateConfig:
    from stages.lm_tasks import resolve_tasks

    (folder / "rows.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    (folder / "mine.yaml").write_text(
        "task: mine\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: rows.jsonl\n"
        "test_split: test\noutput_type: loglikelihood\ndoc_to_text: '{{question}}'\ndoc_to_target: '{{answer}}'\n"
        "metric_list:\n  - metric: acc\n"
    )
    return EvaluateConfig(tasks=resolve_tasks(("mine",), folder))
