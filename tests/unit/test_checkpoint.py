"""Checkpoints: a model's files are identified by content, and a damaged folder is refused before anything is loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from blockpruner.checkpoint import Checkpoint
from blockpruner.errors import BlockPrunerError, CheckpointError, UnsupportedArchitectureError
from blockpruner.loading import (
    check_tensors,
    load_model,
    meta_model,
)
from tests.tiny_models import TINY_FAMILIES

TinyFolder = Callable[[str], Path]


@pytest.fixture
def folder(tmp_path: Path, tiny_folder: TinyFolder) -> Path:
    """A Llama of the test's own, to damage."""
    return Path(shutil.copytree(tiny_folder("llama"), tmp_path / "model"))


def message(error: BaseException) -> str:
    """The error's one line."""
    text = str(error)
    assert isinstance(error, BlockPrunerError)
    assert text
    assert len(text.splitlines()) == 1
    return text


def edit_config(folder: Path, **changes: Any) -> None:
    """Change fields of config.json; None deletes one."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def write_header(folder: Path, header: object, num_bytes: int = 0) -> None:
    raw = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(num_bytes))


def shard(folder: Path) -> dict[str, Any]:
    """Write the weights anew as two files with an index, and return the index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, part in parts.items() for name in part}}
    write_index(folder, index)
    return index


def write_index(folder: Path, index: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_an_intact_folder_opens_with_every_tensor(folder: Path) -> None:
    checkpoint = Checkpoint.open(str(folder))
    tensors = load_file(folder / "model.safetensors")
    assert checkpoint.model_type == "llama"
    assert checkpoint.name == str(folder)
    assert checkpoint.config["num_hidden_layers"] == 4
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert {name: entry.shape for name, entry in checkpoint.tensors.items()} == shapes
    assert {name: entry.num_bytes for name, entry in checkpoint.tensors.items()} == {
        name: tensor.numel() * 4 for name, tensor in tensors.items()
    }


def test_a_sharded_folder_opens_with_every_tensor_in_its_file(folder: Path) -> None:
    whole = Checkpoint.open(str(folder))
    index = shard(folder)
    sharded = Checkpoint.open(str(folder))
    assert set(sharded.tensors) == set(whole.tensors)
    assert {name: entry.file.name for name, entry in sharded.tensors.items()} == index["weight_map"]


# --- damaged folders --------------------------------------------------------------------------------------------------


def _no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _config_not_json(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "llama",')


def _config_not_utf8(folder: Path) -> None:
    (folder / "config.json").write_bytes(b'{"model_type": "ll\xe4ma"}')


def _config_a_list(folder: Path) -> None:
    (folder / "config.json").write_text("[1]")


def _no_model_type(folder: Path) -> None:
    edit_config(folder, model_type=None)


def _no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _only_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _truncated(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-7])


def _truncated_in_header(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:100])


def _empty_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def _not_safetensors(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\n")


def _too_long(folder: Path) -> None:
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"extra")


def _header_not_json(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((4).to_bytes(8, "little") + b"{]{]")


def _header_a_list(folder: Path) -> None:
    write_header(folder, [1])


def _header_without_offsets(folder: Path) -> None:
    write_header(folder, {"a": {"dtype": "F32", "shape": [1]}}, 4)


def _header_with_odd_offsets(folder: Path) -> None:
    write_header(folder, {"a": {"dtype": "F32", "shape": [1], "data_offsets": ["0", "4"]}}, 4)


def _index_not_json(folder: Path) -> None:
    shard(folder)
    (folder / "model.safetensors.index.json").write_text("{")


def _index_without_map(folder: Path) -> None:
    write_index(folder, {"metadata": {}})


def _index_with_odd_map(folder: Path) -> None:
    write_index(folder, {"weight_map": {"lm_head.weight": ["model.safetensors"]}})


def _shard_missing(folder: Path) -> None:
    shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def _shard_truncated(folder: Path) -> None:
    shard(folder)
    path = folder / "model-00001-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def _shard_elsewhere(folder: Path) -> None:
    index = shard(folder)
    (folder / "model-00002-of-00002.safetensors").rename(folder.parent / "outside.safetensors")
    renamed = {"model-00002-of-00002.safetensors": "../outside.safetensors"}
    write_index(folder, {"weight_map": {name: renamed.get(file, file) for name, file in index["weight_map"].items()}})


DAMAGES: Mapping[Callable[[Path], None], tuple[str, ...]] = {
    _no_config: ("config.json", "missing"),
    _config_not_json: ("config.json", "JSON"),
    _config_not_utf8: ("config.json", "JSON"),
    _config_a_list: ("config.json", "model_type"),
    _no_model_type: ("config.json", "model_type"),
    _no_weights: ("no model.safetensors",),
    _only_pickle: ("pytorch_model.bin", "safetensors"),
    _truncated: ("model.safetensors", "truncated"),
    _truncated_in_header: ("model.safetensors", "truncated"),
    _empty_weights: ("model.safetensors", "truncated"),
    _not_safetensors: ("model.safetensors",),
    _too_long: ("model.safetensors", "too long"),
    _header_not_json: ("model.safetensors", "damaged"),
    _header_a_list: ("model.safetensors", "damaged"),
    _header_without_offsets: ("model.safetensors", "damaged"),
    _header_with_odd_offsets: ("model.safetensors", "damaged"),
    _index_not_json: ("model.safetensors.index.json", "JSON"),
    _index_without_map: ("model.safetensors.index.json", "weight_map"),
    _index_with_odd_map: ("model.safetensors.index.json",),
    _shard_missing: ("model-00002-of-00002.safetensors", "missing"),
    _shard_truncated: ("model-00001-of-00002.safetensors", "truncated"),
    _shard_elsewhere: ("outside.safetensors",),
}
"""What is done to a folder, and what the message must then say."""


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__.strip("_").replace("_", " "))
def test_a_damaged_folder_is_refused(folder: Path, damage: Callable[[Path], None]) -> None:
    damage(folder)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(str(folder))
    for words in DAMAGES[damage]:
        assert words in message(caught.value)


# --- what is no folder ------------------------------------------------------------------------------------------------


def test_a_file_is_no_model(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="is a file") as caught:
        Checkpoint.open(str(folder / "config.json"))
    assert "config.json" in message(caught.value)


@pytest.mark.parametrize("path", ["./nowhere", "/nowhere/at/all", "../nowhere", "~/nowhere", "a/b/c"])
def test_a_path_that_is_not_there_is_not_looked_for_on_the_hub(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(hub_id: str) -> Path:
        raise AssertionError(f"asked the hub for {hub_id}")

    monkeypatch.setattr("blockpruner.checkpoint._fetch", fetch)
    with pytest.raises(CheckpointError, match="no model folder") as caught:
        Checkpoint.open(path)
    assert path in message(caught.value)


@pytest.mark.parametrize("hub_id", ["somebody/some-model", "some-model"])
def test_a_hub_id_while_offline_says_what_to_do(hub_id: str) -> None:
    with pytest.raises(CheckpointError, match="hub cannot be reached") as caught:
        Checkpoint.open(hub_id)
    assert hub_id in message(caught.value)
    assert "download" in message(caught.value)
    assert "HF_HUB_OFFLINE" in message(caught.value)


def test_a_name_that_is_no_hub_id_is_refused() -> None:
    with pytest.raises(CheckpointError, match="neither a folder nor a valid hub id") as caught:
        Checkpoint.open("two words!")
    message(caught.value)


# --- identity ---------------------------------------------------------------------------------------------------------


def fingerprint(folder: Path) -> str:
    return Checkpoint.open(str(folder)).fingerprint


def test_a_copy_elsewhere_is_the_same_model(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "another name"))
    edit_config(copy, _name_or_path="/somewhere", transformers_version="4.0.0")
    (copy / "README.md").write_text("a card")
    assert fingerprint(copy) == fingerprint(folder)


def test_one_changed_byte_makes_another_model(folder: Path) -> None:
    before = fingerprint(folder)
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    assert fingerprint(folder) != before


@pytest.mark.parametrize("change", [{"rms_norm_eps": 1e-5}, {"rope_parameters": None}, {"new_field": 1}])
def test_a_changed_setting_makes_another_model(folder: Path, change: dict[str, Any]) -> None:
    before = fingerprint(folder)
    edit_config(folder, **change)
    assert fingerprint(folder) != before


def test_code_beside_the_weights_belongs_to_the_model(folder: Path) -> None:
    before = fingerprint(folder)
    (folder / "modeling_x.py").write_text("x = 1\n")
    assert fingerprint(folder) != before


def test_the_tokenizer_has_an_identity_of_its_own(folder: Path) -> None:
    model, tokenizer = fingerprint(folder), Checkpoint.open(str(folder)).tokenizer_fingerprint
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace("river", "rover"))
    (folder / "tokenizer_config.json").write_text("{}")
    assert fingerprint(folder) == model
    assert Checkpoint.open(str(folder)).tokenizer_fingerprint != tokenizer


# --- whether the weights are the config's, before they are loaded -----------------------------------------------------


def load(folder: Path) -> Any:
    return load_model(Checkpoint.open(str(folder)), device="cpu", dtype="float32")


def check(folder: Path) -> None:
    checkpoint = Checkpoint.open(str(folder))
    check_tensors(checkpoint, meta_model(checkpoint)[1])


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Write the weights anew after a change."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_every_familys_own_weights_fit(family: str, tiny_folder: TinyFolder) -> None:
    check(tiny_folder(family))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_hidden_layers": 6}, "lacks the weights of layers 4 to 5 that its config.json asks for"),
        ({"intermediate_size": 64}, "has 12 of another shape than it asks for, model.layers.0.mlp."),
        ({"num_hidden_layers": 5, "vocab_size": 64}, "lacks the weights of layer 4 that"),
        ({"num_hidden_layers": 2_000_000_000}, "lacks the weights of layers 4 to 1999999999"),
        ({"num_hidden_layers": 0}, "says that it has 0 layers"),
        ({"attention_bias": True}, "lacks 16 tensors that its config.json asks for, model.layers.0."),
        ({"tie_word_embeddings": True}, None),
        ({"num_hidden_layers": 3}, None),
        ({"quantization_config": {}, "vocab_size": 64}, None),
    ],
)
def test_weights_of_another_model_are_known_by_their_headers(
    folder: Path, changes: dict[str, Any], words: str | None
) -> None:
    edit_config(folder, **changes)
    with nullcontext() if words is None else pytest.raises(CheckpointError) as caught:
        check(folder)
    assert words is None or words in message(caught.value)


@pytest.mark.parametrize("name", ["lm_head.weight", "model.embed_tokens.weight"])
def test_one_of_two_tied_tensors_is_enough(name: str, folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=f"lacks 1 tensors that its config.json asks for, {name}"):
        check(folder)
    edit_config(folder, tie_word_embeddings=True)
    check(folder)


def test_tensors_with_names_of_their_own_are_left_to_transformers(folder: Path) -> None:
    """It knows more names than ours: those of the model without its head, for one."""
    rewrite(folder, lambda tensors: tensors.update({n.removeprefix("model."): tensors.pop(n) for n in list(tensors)}))
    check(folder)


def test_a_header_that_lies_about_a_dtype_is_refused(folder: Path) -> None:
    """The offsets add up, so that only loading can notice."""
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"dtype":"F32"', b'"dtype":"F16"', 1))
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    message(caught.value)


@pytest.mark.parametrize("model_type", ["t5", "lama", "my-own-model"])
def test_an_unknown_architecture_is_named_and_the_known_ones_listed(folder: Path, model_type: str) -> None:
    edit_config(folder, model_type=model_type)
    with pytest.raises(UnsupportedArchitectureError) as caught:
        meta_model(Checkpoint.open(str(folder)))
    text = message(caught.value)
    assert repr(model_type) in text
    assert all(known in text for known in ("llama", "mistral", "qwen2", "qwen3"))
    assert ("did you mean 'llama'" in text) == (model_type == "lama")


@pytest.mark.parametrize(
    "change", [{"hidden_size": "wide"}, {"num_attention_heads": 0}, {"num_hidden_layers": "x"}, {"rope_parameters": 3}]
)
def test_a_config_that_describes_no_model_is_refused(folder: Path, change: dict[str, Any]) -> None:
    edit_config(folder, **change)
    with pytest.raises(CheckpointError, match=r"config\.json") as caught:
        meta_model(Checkpoint.open(str(folder)))
    message(caught.value)
