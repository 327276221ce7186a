"""Windows by layer: engines that number the layers find the same or refuse the model; the gate sees them all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from blockpruner.blocks import Block, mha, mlp
from blockpruner.errors import ExportError
from blockpruner.export import stock, verify_mlx
from blockpruner.export.gguf_file.plan import FilePlan
from blockpruner.export.settings import window_period
from blockpruner.export.source import ExportSource
from blockpruner.export.verify import ask, shorter_window
from blockpruner.export.write import write_export
from tests.integration.export_lab import REQUEST, Source, change_config, finished_search, run, verify_here
from tests.tiny_models import save_tiny_model

needs_mlx = pytest.mark.skipif(
    not verify_mlx.is_installed(), reason="needs MLX-LM: pip install -c constraints.txt -e '.[mlx]'"
)
SLIDING, FULL = "sliding_attention", "full_attention"


def layers(*indices: int) -> tuple[Block, ...]:
    return tuple(make(index) for index in indices for make in (mha, mlp))


@pytest.mark.parametrize(
    ("types", "period"),
    [
        ([FULL, FULL], 1),
        ([SLIDING, FULL, SLIDING], 2),
        ([SLIDING, SLIDING, FULL, SLIDING, SLIDING, FULL], 3),
        ([SLIDING, FULL, FULL], None),
        ([FULL, SLIDING], None),
        ([SLIDING, SLIDING], None),
        (["chunked_attention", FULL], None),
    ],
)
def test_the_period_of_windows(types: list[str], period: int | None) -> None:
    assert window_period(types) == period


@pytest.fixture
def gemma3(tmp_path: Path) -> Source:
    """As on the hub: of six layers the last has no window, and no list says so."""
    folder = save_tiny_model(
        tmp_path / "source",
        "gemma3_text",
        num_hidden_layers=12,
        layer_types=None,
        sliding_window_pattern=6,
        tie_word_embeddings=True,
    )
    rope = {"rope_parameters": None, "rope_theta": 500.0, "rope_local_base_freq": 50.0, "query_pre_attn_scalar": 24}
    return Source.of(change_config(folder, layer_types=None, sliding_window_pattern=6, **rope))


def exported(source: Source, removed: tuple[Block, ...], folder: Path) -> dict[str, Any]:
    write_export(source.checkpoint, removed, folder, "stock")
    settings: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return settings


@needs_mlx
def test_mlx_lm_finds_the_windows_where_a_number_says_them(gemma3: Source, tmp_path: Path) -> None:
    removed = layers(1, 8)  # one with a window of either six
    settings = exported(gemma3, removed, tmp_path / "model")
    assert settings["sliding_window_pattern"] == 5
    expected = gemma3.masked_logits(removed)["plain_logits"]
    differences = []
    for period in (5, 6):  # the right one, and the source's
        change_config(tmp_path / "model", sliding_window_pattern=period)
        answer = ask(verify_mlx._FRESH_MLX, tmp_path / "model", {"plain_ids": REQUEST["plain_ids"]})
        differences.append(float((answer["plain_logits"] - expected).abs().max()))
    assert differences[0] <= 5e-3, "MLX-LM computes Gemma a little more coarsely"
    assert differences[1] > 0.1, "the test would see other windows"


@needs_mlx
@pytest.mark.parametrize("written", [6, None])
def test_mlx_lm_refuses_the_model_where_no_number_says_them(
    gemma3: Source, tmp_path: Path, written: int | None
) -> None:
    """Whether the source has the number or leaves it to the family's default."""
    change_config(gemma3.checkpoint.path, sliding_window_pattern=written)
    settings = exported(Source.of(gemma3.checkpoint.path), layers(1, 2), tmp_path / "model")
    assert settings["layer_types"] == [SLIDING] * 3 + [FULL] + [SLIDING] * 5 + [FULL]
    with pytest.raises(ExportError, match="NoneType"):
        ask(verify_mlx._FRESH_MLX, tmp_path / "model", {"plain_ids": REQUEST["plain_ids"]})


def test_cohere_2_has_such_a_number_too(tmp_path: Path) -> None:
    source = Source.of(save_tiny_model(tmp_path / "source", "cohere2"))
    assert source.model.config.layer_types == [FULL, SLIDING, FULL, SLIDING]
    assert exported(source, layers(0), tmp_path / "two")["sliding_window_pattern"] == 2
    assert exported(source, layers(3), tmp_path / "none")["sliding_window_pattern"] is None


# --- windows that are longer than what the gate asks ------------------------------------------------------------------

LONG = 64
"""Of 256 positions; the gate's longest sequence has 40."""


@pytest.fixture
def quick_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    verify_here(monkeypatch)
    monkeypatch.setattr("blockpruner.export.gguf_file.verification.find_spec", lambda _: None)


def long_windowed(family: str, folder: Path) -> Path:
    wanted = {"tie_word_embeddings": True, "query_pre_attn_scalar": 16}  # by llama.cpp
    return save_tiny_model(folder, family, sliding_window=LONG, **(wanted if family == "gemma2" else {}))


WINDOWED = ["gemma2", "gemma3_text", "mistral-window", "qwen2-mixed-windows", "qwen3-mixed-windows", "cohere2"]


@pytest.mark.usefixtures("quick_gate")
@pytest.mark.parametrize(
    ("family", "format_"),
    [
        *((family, "auto") for family in WINDOWED),
        *((family, "gguf") for family in ("gemma2", "gemma3_text")),
        ("gemma2", "transformers"),
        ("qwen2-mixed-windows", "zeroed"),
    ],
)
def test_a_model_with_long_windows_passes_the_gate(tmp_path: Path, family: str, format_: str) -> None:
    source = long_windowed(family, tmp_path / "source")
    assert run(tmp_path, finished_search(source, layers(0), tmp_path), format=format_).verified


@pytest.mark.usefixtures("quick_gate")
@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "qwen2-mixed-windows", "cohere2"])
def test_the_gate_sees_which_layers_have_a_long_window(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """Here those that had one before the first layer went."""
    right = stock.fewer_layers

    def wrong(source: ExportSource, attentions: list[int], mlps: list[int | None]) -> dict[str, Any]:
        return right(source, attentions, mlps) | {"layer_types": source.config.layer_types[: len(attentions)]}

    monkeypatch.setattr(stock, "fewer_layers", wrong)
    source = long_windowed(family, tmp_path / "source")
    with pytest.raises(ExportError, match="differs from the masked original"):
        run(tmp_path, finished_search(source, layers(0), tmp_path), format="stock")


@pytest.mark.usefixtures("quick_gate")
def test_the_gate_sees_which_layers_of_a_gguf_file_have_a_long_window(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FilePlan, "windowed", property(lambda plan: [True, False, True]))
    source = long_windowed("gemma2", tmp_path / "source")
    with pytest.raises(ExportError, match="differs from the masked original"):
        run(tmp_path, finished_search(source, layers(1), tmp_path), format="gguf")


def test_a_window_that_nobody_reaches_is_left_alone() -> None:
    assert [shorter_window(window, REQUEST) for window in (None, 6, 16, 17, 4096)] == [None, None, None, 16, 16]
