"""The speed stage: a pruned model's timings beside the dense one's, from processes that know transformers only."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from blockpruner import speed
from blockpruner.blocks import mha
from blockpruner.checkpoint import Checkpoint
from blockpruner.errors import CheckpointError
from blockpruner.export.write import write_export
from stages.contract import Runtime
from stages.speed import STAGE, SpeedConfig, SpeedInputs, machine
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
        assert row.peak_memory_bytes > 50e6, "a process with torch in it"


def test_another_machine_is_another_measurement(tiny_folder: TinyFolder) -> None:
    model = Checkpoint.open(str(tiny_folder("llama")))
    inputs = SpeedInputs(model, model)
    assert STAGE.fingerprint(CONFIG, inputs) != STAGE.fingerprint(CONFIG.model_copy(update={"machine": "x"}), inputs)


def test_a_model_that_does_not_run_is_one_line(tmp_path: Path) -> None:
    case = speed.SpeedCase(batch_size=1, prompt_tokens=2, new_tokens=1)
    with pytest.raises(CheckpointError, match="cannot be measured") as caught:
        speed.measure_speed(tmp_path, [case], device="cpu", dtype="float32", num_repeats=1, trust_remote_code=False)
    assert "\n" not in str(caught.value)


def test_the_program_needs_nothing_of_this_project() -> None:
    ours = "[name for name in sys.modules if 'blockpruner' in name]"
    code = f"import runpy, sys; runpy.run_path({str(speed._PROBE)!r}); print({ours})"
    finished = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    assert finished.stdout.strip() == "[]"


def test_the_command_gives_rows_and_is_cached(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    (tmp_path / "cal.txt").write_text("\n".join(tiny_rows(40)))
    given = ["--workspace", tmp_path / "ws", "--json"]
    model = ["--model", tiny_folder("llama"), "--calibration", tmp_path / "cal.txt"]
    assert (
        blockpruner("search", *model, "--num-samples", 40, "--sequence-length", 16, "--num-blocks", 2, *given).status
        == 0
    )
    timed = ["speed", "latest", "--batch-sizes", "1,2", "--prompt-tokens", 6, "--new-tokens", 2, "--repeats", 1, *given]
    result = blockpruner(*timed).json
    assert [(row["variant"], row["batch_size"]) for row in result["speed"]] == [
        ("dense", 1), ("dense", 2), ("pruned", 1), ("pruned", 2),
    ]  # fmt: skip
    assert all(stage["cached"] for stage in blockpruner(*timed).json["stages"])
    rows = blockpruner("sql", "SELECT count(*) AS n, min(prefill_ms) > 0 AS ok FROM speed", *given).json
    assert rows == [{"n": 8, "ok": True}]


@pytest.mark.parametrize("value", ["0", "-1", "a", "", "1,,x", "99999999999"])
def test_lists_of_numbers_that_are_none_are_one_line(tmp_path: Path, value: str) -> None:
    outcome = blockpruner("speed", "latest", "--batch-sizes", value, "--workspace", tmp_path)
    assert outcome.status == 2
    assert len(outcome.stderr.splitlines()) == 1
