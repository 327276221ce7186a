"""The model card: what it says must be true of the export beside it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers
import yaml

from blockpruner.blocks import Block, mha, mlp, survivors
from blockpruner.checkpoint import Checkpoint, file_digest
from blockpruner.export.card import CardNumbers, strips, write_card
from blockpruner.export.names import ExportFormat
from blockpruner.export.write import MANIFEST_FILE, WrittenExport

PERPLEXITIES = (("the calibration set", 5.4711, 11.5149), ("wikitext2", 6.0, float("inf")))
NUMBERS = CardNumbers(2_000_000, 1_500_000, 8_000_000, 6_012_345, PERPLEXITIES)
DROPPED = (mlp(2), mha(0))
HUB_ID = "meta-llama/Llama-2-7b-hf"


def card(
    folder: Path,
    *,
    source: str = HUB_ID,
    format_: ExportFormat = "transformers",
    dropped: tuple[Block, ...] = DROPPED,
    numbers: CardNumbers = NUMBERS,
    source_card: str | None = None,
    zeros: tuple[Block, ...] = (),
    config: dict[str, object] | None = None,
) -> tuple[dict[str, object], str]:
    """Write a card and return its metadata and its text."""
    out_dir, source_dir = folder / "export", folder / "source"
    out_dir.mkdir()
    source_dir.mkdir(exist_ok=True)
    if source_card is not None:
        (source_dir / "README.md").write_text(source_card)
    (out_dir / "config.json").write_text(json.dumps({"model_type": "llama"} | (config or {})))
    (out_dir / MANIFEST_FILE).write_text(json.dumps({"files": {}}))
    written = WrittenExport(out_dir, format_, survivors(4, dropped), dropped, 0, zeros)
    hub_id = source if source == HUB_ID else None
    write_card(written, Checkpoint(source, source_dir, {}, {}, hub_id), numbers)
    _, metadata, text = (out_dir / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(metadata), text


def test_metadata_says_where_the_model_comes_from(tmp_path: Path) -> None:
    metadata, _ = card(tmp_path)
    assert metadata["base_model"] == "meta-llama/Llama-2-7b-hf"
    assert metadata["library_name"] == "transformers"
    assert "blockpruner" in str(metadata["tags"])


def test_the_card_is_in_the_manifest(tmp_path: Path) -> None:
    card(tmp_path)
    manifest = json.loads((tmp_path / "export" / MANIFEST_FILE).read_text())
    assert manifest["files"] == {"README.md": file_digest(tmp_path / "export" / "README.md")}


def test_numbers_are_the_given_ones(tmp_path: Path) -> None:
    _, text = card(tmp_path)
    assert "1,500,000 of 2,000,000 parameters remain (25.00% removed)" in text
    assert "| | dense | pruned |\n|---|---|---|\n| parameters | 2,000,000 | 1,500,000 |" in text
    assert "| attention blocks | 4 | 3 |" in text
    assert "| feed-forward blocks | 4 | 3 |" in text
    assert "| weights on disk, MB | 8.0 | 6.0 |" in text
    assert "| perplexity on the calibration set | 5.471 | 11.515 |" in text
    assert "| perplexity on wikitext2 | 6.000 | inf |" in text
    assert "# Llama-2-7b-hf, 2 residual blocks removed" in text
    assert "Removed in this order: mlp:2, mha:0." in text
    assert "MHA .###\nMLP ##.#\n" in text


@pytest.mark.parametrize(
    ("format_", "needs_code"), [("stock", False), ("transformers", True), ("decilm", True), ("zeroed", False)]
)
def test_the_way_to_load_it_fits_the_format(tmp_path: Path, format_: ExportFormat, needs_code: bool) -> None:
    _, text = card(tmp_path, format_=format_)
    assert 'from_pretrained("."' in text
    assert ('ForCausalLM.from_pretrained(".", trust_remote_code=True)' in text) == needs_code
    assert ('AutoTokenizer.from_pretrained(".", trust_remote_code=False)' in text) == needs_code
    assert ("it needs transformers 5 or newer" in text) == needs_code
    assert f"in transformers {transformers.__version__}" in text
    assert ("what loads that loads this" in text) == (format_ in ("stock", "zeroed"))
    assert ("saves neither memory nor time" in text) == (format_ == "zeroed")
    assert ("vllm serve . --trust-remote-code" in text) == (format_ == "decilm")


@pytest.mark.parametrize("zeros", [(), (mha(0),)])
def test_an_attention_that_stays_is_owned_up_to(tmp_path: Path, zeros: tuple[Block, ...]) -> None:
    _, text = card(tmp_path, format_="decilm", zeros=zeros)
    assert ("first layer's attention is still in the files" in text) == bool(zeros)


SLIDING, FULL = "sliding_attention", "full_attention"


@pytest.mark.parametrize(
    ("format_", "config", "engine"),
    [
        ("stock", {"model_type": "gemma3_text", "layer_types": [SLIDING, FULL] * 2, "sliding_window_pattern": 2}, None),
        ("stock", {"model_type": "gemma3_text", "layer_types": [FULL, SLIDING], "sliding_window_pattern": None}, "MLX"),
        ("stock", {"model_type": "cohere2", "layer_types": [FULL, SLIDING], "sliding_window_pattern": None}, "MLX"),
        ("stock", {"model_type": "gemma2", "layer_types": [SLIDING, FULL, SLIDING]}, None),
        ("stock", {"model_type": "gemma2", "layer_types": [SLIDING, SLIDING, FULL]}, "SGLang"),
        ("zeroed", {"model_type": "gemma2", "layer_types": [FULL, SLIDING]}, None),
    ],
)
def test_engines_that_number_the_windows_are_named_where_they_would_err(
    tmp_path: Path, format_: ExportFormat, config: dict[str, object], engine: str | None
) -> None:
    _, text = card(tmp_path, format_=format_, config=config)
    assert ("no rule by the layer's number" in text) == (engine is not None)
    assert engine is None or engine in text


def test_a_gguf_file_is_for_other_engines(tmp_path: Path) -> None:
    metadata, text = card(tmp_path, format_="gguf")
    assert metadata["library_name"] == "gguf"
    assert "from_pretrained" not in text
    for way in ("llama-cli -m model.gguf", r"printf 'FROM ./model.gguf\n' > Modelfile", 'Llama("model.gguf"'):
        assert way in text


def test_a_folder_is_named_and_its_path_kept_private(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    metadata, text = card(tmp_path, source=str(source))
    assert "base_model" not in metadata
    assert "Made from `source`" in text
    assert str(tmp_path) not in text


def test_the_folder_one_is_in_has_a_name_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _, text = card(tmp_path, source=".")
    assert f"Made from `{tmp_path.name}`" in text


@pytest.mark.parametrize(
    ("source_card", "licence"),
    [
        ("---\nlicense: llama2\n---\n# Llama\n", "llama2"),
        ("---\ntags: [x]\n---\n# Llama\n", None),
        ("# no metadata\n", None),
        ("---\nlicense: [\n---\n", None),
        (None, None),
    ],
    ids=["with a licence", "without one", "without metadata", "with broken metadata", "without a card"],
)
def test_the_licence_is_carried_over(tmp_path: Path, source_card: str | None, licence: str | None) -> None:
    metadata, _ = card(tmp_path, source_card=source_card)
    assert metadata.get("license") == licence


OTHER_LICENCE = """---
license: other
license_name: tongyi-qianwen
license_link: https://huggingface.co/Qwen/Qwen2-72B/blob/main/LICENSE
language: [en, zh]
base_model: Qwen/Qwen2-72B
tags: [chat]
---
# Qwen
"""


def test_a_licence_of_its_own_keeps_its_name_and_link(tmp_path: Path) -> None:
    metadata, _ = card(tmp_path, source_card=OTHER_LICENCE)
    assert metadata["license"] == "other"
    assert metadata["license_name"] == "tongyi-qianwen"
    assert metadata["license_link"] == "https://huggingface.co/Qwen/Qwen2-72B/blob/main/LICENSE"
    assert metadata["language"] == ["en", "zh"]
    assert metadata["base_model"] == HUB_ID, "the nearest"
    assert metadata["tags"] == ["blockpruner", "pruned"]


def test_several_licences_stay_a_list(tmp_path: Path) -> None:
    metadata, _ = card(tmp_path, source_card="---\nlicense: [apache-2.0, mit]\n---\n")
    assert metadata["license"] == ["apache-2.0", "mit"]


def test_a_copy_of_a_hub_model_names_what_its_card_names(tmp_path: Path) -> None:
    metadata, _ = card(tmp_path, source="models/qwen", source_card=OTHER_LICENCE)
    assert metadata["base_model"] == "Qwen/Qwen2-72B"


def test_a_relative_folder_is_no_hub_id(tmp_path: Path) -> None:
    """Wherever the command is given: there the folder may not be."""
    metadata, text = card(tmp_path, source="models/tiny")
    assert "base_model" not in metadata
    assert "Made from `tiny`" in text


@pytest.mark.parametrize("num_layers", [3, 12])
def test_strips_mark_every_layer_of_the_original(num_layers: int) -> None:
    dropped = (mha(0), mlp(num_layers - 1), mha(num_layers - 1))
    attention, feed_forward = strips(survivors(num_layers, dropped), dropped)
    assert attention == "MHA ." + "#" * (num_layers - 2) + "."
    assert feed_forward == "MLP " + "#" * (num_layers - 1) + "."
