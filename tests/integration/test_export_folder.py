"""Exports: what is in the folder, and sources and options that are not like the others."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from blockpruner.architectures import block_sizes, num_parameters
from blockpruner.blocks import Block, all_blocks, mha, mlp
from blockpruner.checkpoint import Checkpoint, file_digest
from blockpruner.errors import ExportError, UnsupportedArchitectureError
from blockpruner.export.names import FormatChoice
from blockpruner.export.write import MANIFEST_FILE, WrittenExport, write_export
from tests.integration.export_lab import (
    REMOVED,
    REQUEST,
    STOCK,
    WITH_CODE,
    Source,
    TinyFolder,
    assert_is_placed,
    every_case,
    every_family,
    load,
    logits,
)
from tests.oracles import oracle_logits
from tests.tiny_models import save_tiny_model

# --- what is in the folder --------------------------------------------------------------------------------------------


@every_case
def test_a_file_has_the_parameters_of_the_surviving_blocks(
    sources: dict[str, Source],
    exports: dict[tuple[str, str], WrittenExport],
    loaded: Callable[[str, str], PreTrainedModel],
    family: str,
    case: str,
) -> None:
    source, export = sources[family], exports[family, case]
    expected = num_parameters(source.model)
    if export.format != "zeroed":
        sizes = block_sizes(source.architecture, source.model)
        expected -= sum(sizes[block] for block in REMOVED[case]) + shared_size(source, REMOVED[case])
    assert sum(tensor.numel() for tensor in load_file(export.path / "model.safetensors").values()) == expected
    assert num_parameters(loaded(family, case)) == expected


def shared_size(source: Source, removed: tuple[Block, ...]) -> int:
    """Parameters of what serves both blocks of a layer, of the layers that lost both."""
    gone = [index for index in range(4) if {mha(index), mlp(index)} <= set(removed)]
    layers = [source.architecture.decoder_layers(source.model)[index] for index in gone]
    shared = [layer.get_submodule(name) for layer in layers for name in source.architecture.shared]
    return sum(parameter.numel() for module in shared for parameter in module.parameters())


def expected_format(source: Source, family: str, case: str) -> str:
    if family == "gpt2-scaled":  # attention scores are scaled by the layer's number, which only the last may lose
        return "stock" if case == "last layer" else "zeroed"
    if source.architecture.is_parallel:
        return "stock" if case in ("first layer", "last layer") else "zeroed"
    if case in STOCK:
        return "stock"
    return "transformers" if family.partition("-")[0] in WITH_CODE else "zeroed"


@every_case
def test_the_format_is_the_smallest_that_can_hold_the_model(
    sources: dict[str, Source], exports: dict[tuple[str, str], WrittenExport], family: str, case: str
) -> None:
    export = exports[family, case]
    config = json.loads((export.path / "config.json").read_text())
    assert export.format == expected_format(sources[family], family, case)
    assert bool(list(export.path.glob("*.py"))) == ("auto_map" in config) == (export.format == "transformers")


@every_family
def test_a_stock_export_differs_from_its_source_in_the_number_of_layers_only(
    sources: dict[str, Source], exports: dict[tuple[str, str], WrittenExport], family: str
) -> None:
    source = dict(sources[family].checkpoint.config)
    config = json.loads((exports[family, "last layer"].path / "config.json").read_text())
    changed = {key for key in source | config if source.get(key) != config.get(key)}
    number = sources[family].model.config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    lists = {"layer_types", "max_window_layers", "sliding_window_pattern", "decoder_sparse_step", "mlp_only_layers"}
    assert changed <= {number, *lists}
    assert (config["model_type"], config[number]) == (source["model_type"], 3)


@pytest.mark.parametrize(
    ("case", "layer_types"),
    [
        ("alternating", ["full", "sliding", "sliding"]),  # attentions 0, 1 and 3
        ("first layer", ["sliding", "full", "sliding"]),
        ("first attention", ["sliding", "full", "sliding"]),
        ("feed-forwards in a row", ["full", "sliding"]),
        ("all attentions but one", ["full"]),
        ("all but an attention", ["sliding"]),
    ],
)
@pytest.mark.parametrize("family", ["qwen2-mixed-windows", "qwen3-mixed-windows"])
def test_layer_types_follow_their_attention(
    exports: dict[tuple[str, str], WrittenExport], family: str, case: str, layer_types: list[str]
) -> None:
    config = json.loads((exports[family, case].path / "config.json").read_text())
    assert config["layer_types"] == [f"{name}_attention" for name in layer_types]
    assert config["sliding_window"] == 6


def test_layer_types_that_the_source_only_implies_are_written_out(tmp_path: Path) -> None:
    """Qwen2's windows begin at `max_window_layers` when nothing else is said; renumbering must not move them."""
    folder = save_tiny_model(
        tmp_path / "source", "qwen2", use_sliding_window=True, sliding_window=6, max_window_layers=2
    )
    config = json.loads((folder / "config.json").read_text())
    assert config.pop("layer_types") == ["full_attention"] * 2 + ["sliding_attention"] * 2
    (folder / "config.json").write_text(json.dumps(config))
    source, removed = Source.of(folder), (mha(0), mlp(0))
    export = write_export(source.checkpoint, removed, tmp_path / "model")
    written = json.loads((export.path / "config.json").read_text())
    assert written["layer_types"] == ["full_attention", "sliding_attention", "sliding_attention"]
    assert written["max_window_layers"] == 1, "who reads this number must find the same"
    expected = source.masked_logits(removed)["plain_logits"]
    assert (logits(load(export.path), REQUEST["plain_ids"]) - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("case", ["alternating", "first attention"])
def test_tokenizer_and_generation_config_come_along(
    sources: dict[str, Source], exports: dict[tuple[str, str], WrittenExport], case: str
) -> None:
    source, export = sources["llama"].checkpoint.path, exports["llama", case].path
    text = "The river, and the lantern keeper."
    assert AutoTokenizer.from_pretrained(export)(text) == AutoTokenizer.from_pretrained(source)(text)
    assert (export / "generation_config.json").read_bytes() == (source / "generation_config.json").read_bytes()


def test_terms_and_further_templates_come_along(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_folder("llama"), tmp_path / "source"))
    names = ["LICENSE.md", "NOTICE", "USE_POLICY.md", "chat_template.jinja", "additional_chat_templates/rag.jinja"]
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"of {name}")
    terms = [f"of {name}" for name in names[:3]]
    for format_ in ("stock", "gguf"):
        source = Checkpoint.open(str(folder))
        export = write_export(source, REMOVED["alternating"], tmp_path / format_, format_)
        assert [(export.path / name).read_text() for name in names[:3]] == terms
        manifest = json.loads((export.path / MANIFEST_FILE).read_text())
        assert set(names if format_ == "stock" else names[:3]) <= set(manifest["files"])
        assert (manifest["source_model"], str(tmp_path) in json.dumps(manifest)) == ("source", False)
    templates = AutoTokenizer.from_pretrained(tmp_path / "stock").chat_template
    assert templates == {"default": "of chat_template.jinja", "rag": "of additional_chat_templates/rag.jinja"}


@every_case
def test_the_manifest_is_true(
    sources: dict[str, Source], exports: dict[tuple[str, str], WrittenExport], family: str, case: str
) -> None:
    export = exports[family, case]
    manifest = json.loads((export.path / MANIFEST_FILE).read_text())
    kept = tuple(Block.model_validate(block) for block in manifest["kept"])
    dropped = tuple(Block.model_validate(block) for block in manifest["dropped_in_order"])
    assert dropped == REMOVED[case] == export.dropped
    assert kept == tuple(block for block in all_blocks(4) if block not in dropped) == export.kept
    assert manifest["source_fingerprint"] == sources[family].checkpoint.fingerprint
    assert manifest["format"] == export.format
    assert manifest["places"].keys() == {str(block) for block in kept}
    for block in kept:
        assert_is_placed(sources[family], export, block, manifest["places"][str(block)])
    files = {file.name for file in export.path.iterdir()} - {MANIFEST_FILE}
    assert manifest["files"] == {name: file_digest(export.path / name) for name in files}


def test_the_same_export_is_the_same_bytes(sources: dict[str, Source], tmp_path: Path) -> None:
    digests = []
    for name in ("one", "two"):
        export = write_export(sources["llama"].checkpoint, REMOVED["first attention"], tmp_path / name)
        digests.append({file.name: file_digest(file) for file in export.path.iterdir()})
    assert digests[0] == digests[1]


# --- options and odd sources ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["alternating", "feed-forwards in a row"])
def test_shards_hold_the_same_model(
    sources: dict[str, Source], exports: dict[tuple[str, str], WrittenExport], tmp_path: Path, case: str
) -> None:
    whole = load(exports["qwen3", case].path)
    export = write_export(sources["qwen3"].checkpoint, REMOVED[case], tmp_path / "model", shard_bytes=20_000)
    shards = sorted(export.path.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert not (export.path / "model.safetensors").exists()
    assert all(sum(t.numel() * 4 for t in load_file(shard).values()) <= 20_000 for shard in shards)
    index = json.loads((export.path / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: shard.name for shard in shards for name in load_file(shard)}
    assert index["metadata"]["total_size"] == sum(t.numel() * 4 for shard in shards for t in load_file(shard).values())
    tensors = load(export.path).state_dict()
    assert tensors.keys() == whole.state_dict().keys()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in whole.state_dict().items())


def test_a_tensor_larger_than_a_shard_gets_one_of_its_own(sources: dict[str, Source], tmp_path: Path) -> None:
    export = write_export(sources["llama"].checkpoint, (mha(0),), tmp_path / "model", shard_bytes=1)
    names = [name for shard in export.path.glob("model-*.safetensors") for name in load_file(shard)]
    assert len(names) == len(set(names)) == len(list(export.path.glob("model-*.safetensors")))
    assert Checkpoint.open(str(export.path)).tensors.keys() == set(names)


def test_a_sharded_source_is_read_from_all_its_files(tmp_path: Path, sources: dict[str, Source]) -> None:
    source = sources["llama"]
    sharded = Path(shutil.copytree(source.checkpoint.path, tmp_path / "sharded"))
    (sharded / "model.safetensors").unlink()
    source.model.save_pretrained(sharded, max_shard_size="30KB")
    assert len(list(sharded.glob("model-*.safetensors"))) > 1
    export = write_export(Checkpoint.open(str(sharded)), REMOVED["alternating"], tmp_path / "model")
    expected = source.masked_logits(REMOVED["alternating"])["plain_logits"]
    assert (logits(load(export.path), REQUEST["plain_ids"]) - expected).abs().max() <= 1e-5


def test_a_stock_layout_can_be_written_with_code_too(sources: dict[str, Source], tmp_path: Path) -> None:
    source = sources["qwen2"]
    export = write_export(source.checkpoint, REMOVED["alternating"], tmp_path / "model", "transformers")
    assert export.format == "transformers"
    expected = source.masked_logits(REMOVED["alternating"])["plain_logits"]
    assert (logits(load(export.path), REQUEST["plain_ids"]) - expected).abs().max() <= 1e-5


def test_stock_that_cannot_be_is_refused_before_anything_is_written(sources: dict[str, Source], tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="format stock"):
        write_export(sources["llama"].checkpoint, (mha(0),), tmp_path / "model", "stock")
    assert not (tmp_path / "model").exists()


def test_a_model_without_attention_is_refused_before_anything_is_written(
    sources: dict[str, Source], tmp_path: Path
) -> None:
    for wanted in ("stock", "transformers"):
        with pytest.raises(ExportError, match="no attention block"):
            write_export(sources["llama"].checkpoint, all_blocks(4, "mha"), tmp_path / "model", wanted)
        assert not (tmp_path / "model").exists()


def with_tensors(folder: Path, **tensors: Tensor) -> Checkpoint:
    path = folder / "model.safetensors"
    save_file(load_file(path) | tensors, path, {"format": "pt"})
    return Checkpoint.open(str(folder))


def test_parts_that_nobody_knows_are_not_left_behind_in_silence(tmp_path: Path) -> None:
    checkpoint = with_tensors(
        save_tiny_model(tmp_path / "source"), **{"model.layers.1.adapter.weight": torch.zeros(2, 2)}
    )
    with pytest.raises(UnsupportedArchitectureError, match=r"model\.layers\.1\.adapter\.weight"):
        write_export(checkpoint, (mha(0),), tmp_path / "model")


@pytest.mark.parametrize(
    ("family", "wanted", "reason"),
    [
        ("gpt2", "transformers", "and this is a gpt2"),
        ("cohere", "stock", "side by side"),
        ("falcon", "stock", "side by side"),
        ("falcon", "transformers", "and this is a falcon"),
        ("gpt2-scaled", "stock", "scale_attn_by_inverse_layer_idx"),
    ],
)
def test_what_a_format_cannot_hold_is_refused_with_the_reason(
    tiny_folder: TinyFolder, tmp_path: Path, family: str, wanted: FormatChoice, reason: str
) -> None:
    checkpoint = Checkpoint.open(str(tiny_folder(family)))
    with pytest.raises(ExportError, match=reason) as caught:
        write_export(checkpoint, (mlp(1), mha(2)), tmp_path / "model", wanted)
    assert len(str(caught.value).splitlines()) == 1
    assert "--format" in str(caught.value)


def test_layers_beyond_the_configured_ones_are_left_out(tmp_path: Path) -> None:
    """Who shortens a model by its config.json alone gets weights that nothing reads."""
    folder = save_tiny_model(tmp_path / "source")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 3}))
    source, removed = Source.of(folder), (mha(1),)
    export = write_export(source.checkpoint, removed, tmp_path / "model")
    assert export.kept == (mha(0), mlp(0), mlp(1), mha(2), mlp(2))
    expected = source.masked_logits(removed)["plain_logits"]
    assert (logits(load(export.path), REQUEST["plain_ids"]) - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("case", ["alternating", "first attention"])
def test_a_config_in_the_old_words_keeps_them(tmp_path: Path, case: str) -> None:
    """`rope_theta` and `torch_dtype` at the top level, as on the hub: other engines know no other words for them."""
    folder = save_tiny_model(
        tmp_path / "source", "llama", rope_parameters={"rope_type": "default", "rope_theta": 777.0}
    )
    path = folder / "config.json"
    config = json.loads(path.read_text())
    del config["rope_parameters"], config["dtype"]
    path.write_text(json.dumps(config | {"rope_theta": 777.0, "torch_dtype": "float32"}))
    source = Source.of(folder)
    export = write_export(source.checkpoint, REMOVED[case], tmp_path / "model")
    written = json.loads((export.path / "config.json").read_text())
    assert (written["rope_theta"], written["torch_dtype"]) == (777.0, "float32")
    expected = oracle_logits(
        source.model.state_dict(),
        source.model.config.to_dict(),
        REQUEST["plain_ids"],
        {(block.layer_index, block.block_kind.value) for block in REMOVED[case]},
    )
    assert (logits(load(export.path), REQUEST["plain_ids"]) - expected).abs().max() <= 2e-5


LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


@pytest.mark.parametrize("case", ["alternating", "first attention"])
def test_scaled_rotary_embeddings_and_bfloat16_weights_stay_as_they_are(tmp_path: Path, case: str) -> None:
    folder = tmp_path / "source"
    save_tiny_model(folder, "llama", rope_parameters=LLAMA_3_ROPE)
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    source = Source.of(folder)
    export = write_export(source.checkpoint, REMOVED[case], tmp_path / "model")
    assert {entry.dtype for entry in Checkpoint.open(str(export.path)).tensors.values()} == {"BF16"}
    assert load(export.path, dtype="auto").dtype == torch.bfloat16
    expected = source.masked_logits(REMOVED[case])["plain_logits"]
    assert (logits(load(export.path), REQUEST["plain_ids"]) - expected).abs().max() <= 1e-5
