"""Format `decilm`: what some engine would read otherwise is not written."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from blockpruner.blocks import mha
from blockpruner.checkpoint import Checkpoint
from blockpruner.errors import ExportError
from blockpruner.export import decilm
from blockpruner.export.write import write_export
from tests.integration.export_lab import REMOVED, WIDTHS, YARN, load
from tests.tiny_models import save_tiny_model


@pytest.mark.parametrize(
    ("family", "overrides", "reason", "able"),
    [
        ("gpt2", {}, "this is a gpt2", "stock or zeroed"),
        ("qwen3", {}, "this is a qwen3", "stock or transformers or gguf or zeroed"),
        ("mistral-window", WIDTHS, r"sliding windows.*6", "stock or transformers or zeroed"),
        ("qwen2-mixed-windows", WIDTHS, "sliding windows", "stock or transformers or zeroed"),
        ("llama", WIDTHS | {"head_dim": 32}, "4 of 32", "stock or transformers or gguf or zeroed"),
        ("llama", WIDTHS | {"hidden_act": "gelu"}, "has gelu", "stock or transformers or zeroed"),
        ("llama-bias-tied", WIDTHS, "silu and biases", "stock or transformers or gguf or zeroed"),
        (
            "llama",
            WIDTHS | {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 2.0}},
            "this model dynamic",
            "stock or transformers or zeroed",
        ),
        (
            "llama",
            WIDTHS | {"rope_parameters": {"rope_type": "yarn", "rope_theta": 500.0, "attention_factor": 1.5, **YARN}},
            "setting attention_factor",
            "stock or transformers or zeroed",
        ),
        ("llama", {}, r"would make 256 of this model's 48", "stock or transformers or gguf or zeroed"),
        ("llama", WIDTHS | {"intermediate_size": 320}, r"would make 512 of", "stock or transformers or gguf or zeroed"),
    ],
)
def test_what_an_engine_would_read_otherwise_is_refused_with_the_reason_and_what_can_hold_it(
    tmp_path: Path, family: str, overrides: dict[str, Any], reason: str, able: str
) -> None:
    checkpoint = Checkpoint.open(str(save_tiny_model(tmp_path / "source", family, **overrides)))
    with pytest.raises(ExportError, match=reason) as caught:
        write_export(checkpoint, REMOVED["alternating"], tmp_path / "model", "decilm")
    assert str(caught.value).endswith(f"what can hold it: --format {able}")
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "model").exists()


def test_a_model_without_attention_is_refused(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(str(save_tiny_model(tmp_path / "source", "llama", **WIDTHS)))
    with pytest.raises(ExportError, match=r"no attention block is left.*--format zeroed"):
        write_export(checkpoint, tuple(map(mha, range(4))), tmp_path / "model", "decilm")


@pytest.mark.parametrize("hidden_size", [64, 96, 896, 2048, 3584, 4096, 5120, 8192, 12288, 16384])
def test_every_multiple_of_256_is_exact_and_nothing_else(hidden_size: int) -> None:
    """As the engines compute it, from the factor and from what MLX-LM rounds it to."""
    for width in range(64, 32 * 1024, 64):
        ffn_mult = 3 * width / (2 * hidden_size)
        for value in (ffn_mult, round(ffn_mult, 6)):
            assert (decilm.engine_width(value, hidden_size) == width) == (width % 256 == 0)


def test_an_older_transformers_is_told_what_the_code_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_tiny_model(tmp_path / "source", **WIDTHS)
    folder = write_export(Checkpoint.open(str(source)), (mha(1),), tmp_path / "not-loaded-before", "decilm").path
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "4.57.1")
    runpy.run_path(str(folder / "configuration_decilm.py"))  # other engines read it
    with pytest.raises(ImportError, match=r"needs transformers 5.*4\.57\.1"):
        load(folder)
