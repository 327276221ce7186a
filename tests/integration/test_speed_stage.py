"""The speed stage: a pruned model's timings beside the dense one's, from processes that know transformers only."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.numpy import load_file
from transformers import DynamicCache, LlamaConfig

from blockpruner import speed, speed_probe
from blockpruner.blocks import mha
from blockpruner.checkpoint import Checkpoint
from blockpruner.errors import CheckpointError, ConfigurationError
from blockpruner.export.write import write_export
from blockpruner.speed import SpeedCase, TimedModel, measure_speed
from flows.plan import Plan
from flows.recipe import make_recipe
from flows.render import speed_table
from stages.contract import Runtime
from stages.speed import STAGE, SpeedConfig, SpeedInputs, machine
from stages.store_schema import SpeedRow
from tests.integration.command_line import blockpruner
from tests.tiny_models import tiny_rows

TinyFolder = Callable[[str], Path]
CONFIG = SpeedConfig(batch_sizes=(1, 2), prompt_tokens=(5, 9), new_tokens=3, num_repeats=2, machine=machine("cpu"))


def test_every_case_is_measured_for_both_models(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    dense = Checkpoint.open(str(tiny_folder("llama")))
    pruned = write_export(dense, (mha(0), mha(2)), tmp_path / "pruned")
    assert pruned.format == "transformers", "a model with code of its own"
    manifest = STAGE.run(
        CONFIG, SpeedInputs(dense, Checkpoint.open(str(pruned.path)), pruned_has_code=True), tmp_path, Runtime()
    )
    cases = [(row.variant, row.batch_size, row.prompt_tokens, row.new_tokens) for row in manifest.speeds]
    assert cases == [(v, b, p, 3) for v in ("dense", "pruned") for b in (1, 2) for p in (5, 9)]
    for row in manifest.speeds:
        # Two heads of 8 elements for key and value, 4 bytes each, in every layer that has an attention.
        assert row.kv_cache_bytes_per_token == (4 if row.variant == "dense" else 2) * 2 * 2 * 8 * 4
        assert row.prefill_ms > 0
        assert row.decode_tokens_per_s > 0
        assert row.peak_memory_bytes is None or row.peak_memory_bytes > 50e6, "a process with torch in it"
        assert (row.peak_memory_bytes is not None) == Path("/proc/self/clear_refs").exists()
        folder = dense.path if row.variant == "dense" else pruned.path
        assert row.num_parameters == sum(tensor.size for tensor in load_file(folder / "model.safetensors").values())
        assert row.weight_bytes == (folder / "model.safetensors").stat().st_size


# --- the arithmetic, with a clock that tells what it is told ----------------------------------------------------------


@dataclass
class _Clocked:
    """A model that takes 0.5 s for a prompt and 0.25 s for every token after it; the first time, ten times that."""

    now: float = 0.0
    calls: list[tuple[int, ...]] = field(default_factory=list)

    @property
    def config(self) -> LlamaConfig:
        return LlamaConfig(vocab_size=16)

    def __call__(
        self, input_ids: torch.Tensor, past_key_values: DynamicCache | None = None, **_: object
    ) -> SimpleNamespace:
        self.calls.append(tuple(input_ids.shape))
        is_warm = sum(length > 1 for _, length in self.calls) > 1
        self.now += (0.5 if past_key_values is None else 0.25) * (1 if is_warm else 10)
        cache = past_key_values or DynamicCache()
        states = torch.zeros(len(input_ids), 2, input_ids.shape[1], 8)
        cache.update(states, states, 0)
        return SimpleNamespace(logits=torch.zeros(len(input_ids), 1, 16), past_key_values=cache)


def test_what_a_second_means(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _Clocked()
    monkeypatch.setattr(speed_probe, "_now", lambda _: model.now)
    case = SpeedCase(batch_size=2, prompt_tokens=5, new_tokens=3)
    found = speed_probe.measured(model, torch.device("cpu"), case.model_dump(), 4)
    assert model.calls == [(2, 5), (2, 1), (2, 1), (2, 1)] * 5, "a prompt, and after it one token at a time"
    assert (found["prefill_s"], found["decode_s"]) == ([0.5] * 4, [0.75] * 4), "the first is not counted"
    row = speed._combined(case, [{"cases": [found], "num_parameters": 7}] * 2, 0)
    assert row.prefill_ms == 500
    assert row.decode_tokens_per_s == 2 / 0.25, "two sequences, a token every 0.25 s"
    assert row.kv_cache_bytes_per_token == 2 * 2 * 8 * 4, "keys and values of two heads of 8, of one sequence"


def test_a_machine_that_slows_down_favours_no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def answer(model: TimedModel, *_: object) -> dict[str, Any]:
        asked.append(model.path.name)
        seconds = [float(len(asked))] * 3
        case = {"prefill_s": seconds, "decode_s": seconds, "kv_cache_bytes": 1, "peak_memory_bytes": len(asked)}
        return {"num_parameters": 1, "cases": [case]}

    monkeypatch.setattr(speed, "_answer", answer)
    models = [TimedModel(Path(name)) for name in ("dense", "pruned")]
    case = SpeedCase(batch_size=1, prompt_tokens=1, new_tokens=1)
    (dense,), (pruned,) = measure_speed(models, [case], device="cpu", dtype="float32", num_repeats=3)
    assert asked == ["dense", "pruned", "pruned", "dense"]
    assert dense.prefill_ms == pruned.prefill_ms == 2500
    assert (dense.peak_memory_bytes, pruned.peak_memory_bytes) == (4, 3)


def test_where_the_system_tells_no_peak_of_memory_there_is_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(speed_probe, "_CLEAR_REFS", tmp_path / "no" / "clear_refs")
    case = SpeedCase(batch_size=1, prompt_tokens=2, new_tokens=1)
    found = speed_probe.measured(_Clocked(), torch.device("cpu"), case.model_dump(), 1)
    assert found["peak_memory_bytes"] is None
    row = speed._combined(case, [{"cases": [found], "num_parameters": 1}], 0)
    assert row.peak_memory_bytes is None
    shown = SpeedRow("r", "dense", 1, 2, 1, 1.0, 1.0, None, 1.0, "m")
    console = Console(width=160, record=True)
    console.print(speed_table([shown, shown._replace(variant="pruned")]))
    assert "? -> ?" in console.export_text()


def test_another_machine_is_another_measurement(tiny_folder: TinyFolder) -> None:
    model = Checkpoint.open(str(tiny_folder("llama")))
    inputs = SpeedInputs(model, model)
    assert STAGE.fingerprint(CONFIG, inputs) != STAGE.fingerprint(CONFIG.model_copy(update={"machine": "x"}), inputs)


def test_a_model_that_does_not_run_is_one_line(tmp_path: Path) -> None:
    case = SpeedCase(batch_size=1, prompt_tokens=2, new_tokens=1)
    with pytest.raises(CheckpointError, match="cannot be measured") as caught:
        measure_speed([TimedModel(tmp_path)], [case], device="cpu", dtype="float32", num_repeats=1)
    assert "\n" not in str(caught.value)


def test_the_program_needs_nothing_of_this_project() -> None:
    ours = "[name for name in sys.modules if 'blockpruner' in name]"
    code = f"import runpy, sys; runpy.run_path({str(speed._PROBE)!r}); print({ours})"
    finished = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    assert finished.stdout.strip() == "[]"


def test_the_command_gives_rows_and_is_cached(
    tiny_folder: TinyFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(model: TimedModel, cases: list[SpeedCase], *_: object) -> dict[str, Any]:
        case = {"prefill_s": [0.5], "decode_s": [0.25], "kv_cache_bytes": 96, "peak_memory_bytes": 10**9}
        return {"num_parameters": 900 if "export" in str(model.path) else 1200, "cases": [case] * len(cases)}

    monkeypatch.setattr(speed, "_answer", answer)
    (tmp_path / "cal.txt").write_text("\n".join(tiny_rows(40)))
    given = ["--workspace", tmp_path / "ws"]
    model = ["--model", tiny_folder("llama"), "--calibration", tmp_path / "cal.txt"]
    searched = blockpruner("search", *model, "--num-samples", 40, "--sequence-length", 16, "--num-blocks", 2, *given)
    assert searched.status == 0
    timed = ["speed", "latest", "--batch-sizes", "1,2", "--prompt-tokens", 6, "--new-tokens", 2, "--repeats", 1]
    result = blockpruner(*timed, *given, "--json").json
    assert [(row["variant"], row["batch_size"], row["num_parameters"]) for row in result["speed"]] == [
        ("dense", 1, 1200), ("dense", 2, 1200), ("pruned", 1, 900), ("pruned", 2, 900),
    ]  # fmt: skip
    assert all(stage["cached"] for stage in blockpruner(*timed, *given, "--json").json["stages"])
    columns = "count(*) AS n, max(prefill_ms) AS ms, min(num_parameters) AS num, min(weight_bytes) > 0 AS ok"
    rows = blockpruner("sql", f"SELECT {columns} FROM speed", *given, "--json").json
    assert rows == [{"n": 8, "ms": 500.0, "num": 900, "ok": True}]
    assert "dense -> pruned: 1,200 -> 900 parameters, weights of" in blockpruner("show", "latest", *given).stdout


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_prompts_beyond_a_models_positions_are_refused_before_anything(
    tiny_folder: TinyFolder, tmp_path: Path, family: str
) -> None:
    (tmp_path / "cal.txt").write_text("\n".join(tiny_rows(40)))
    recipe = make_recipe({"model": str(tiny_folder(family)), "calibration": str(tmp_path / "cal.txt"), "num_blocks": 1})
    asked = recipe.changed({"sequence_length": 16, "speed_prompt_tokens": "8,252", "speed_new_tokens": 4})
    Plan.make(asked, "speed")
    Plan.make(asked.changed({"speed_new_tokens": 5}), "export")
    with pytest.raises(ConfigurationError, match="of 252 tokens and 5 new ones are 257, but this model knows 256 pos"):
        Plan.make(asked.changed({"speed_new_tokens": 5}), "speed")


@pytest.mark.parametrize("value", ["0", "-1", "a", "", "1,,x", "99999999999"])
def test_lists_of_numbers_that_are_none_are_one_line(tmp_path: Path, value: str) -> None:
    outcome = blockpruner("speed", "latest", "--batch-sizes", value, "--workspace", tmp_path)
    assert outcome.status == 2
    assert len(outcome.stderr.splitlines()) == 1
