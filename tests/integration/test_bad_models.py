"""Model folders that are wrong: refused in one line before anything large is read, built or allocated."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from tests.integration.bad_input_lab import Lab, little_memory, refused
from tests.integration.bad_input_models import CONFIGS, FILES, HEADERS, INDICES, change_header
from tests.integration.command_line import Outcome
from tests.tiny_models import tiny_rows

TinyFolder = Callable[[str], Path]


@pytest.fixture
def lab(tmp_path: Path, tiny_folder: TinyFolder) -> Lab:
    shutil.copytree(tiny_folder("llama"), tmp_path / "model")
    (tmp_path / "cal.txt").write_text("\n".join(tiny_rows(40)))
    return Lab(tmp_path, tmp_path / "ws")


@pytest.fixture(autouse=True)
def _little_memory() -> Iterator[None]:
    with little_memory():
        yield


def both(lab: Lab) -> Iterator[str]:
    """What a search says, and what a baseline, which takes models of any family."""
    for command, target in (("search", ["--num-blocks", 1]), ("baseline", [])):
        line = refused(lab.call(command, *lab.good, *target))
        assert "allocate" not in line
        yield line


@pytest.mark.parametrize(("changes", "said"), CONFIGS)
def test_a_config_that_describes_no_such_model(changes: dict[str, object], said: str, lab: Lab) -> None:
    config = lab.model / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    searched, _ = both(lab)
    assert said in searched


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_none_of_its_kind(name: str, lab: Lab) -> None:
    file, content, said = FILES[name]
    (lab.model / file).write_bytes(content)
    assert all(said in line for line in both(lab))


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_lies(name: str, lab: Lab) -> None:
    change, said = HEADERS[name]
    change_header(lab.model / "model.safetensors", change)
    assert all(said in line for line in both(lab))
    assert lab.records()[0]["stages"] == []


@pytest.mark.parametrize("name", INDICES)
def test_an_index_that_points_elsewhere(name: str, lab: Lab) -> None:
    content, said = INDICES[name]
    weights = lab.model / "model.safetensors"
    shutil.copy(weights, lab.path / "other.safetensors")
    weights.rename(lab.model / "pytorch_model.bin")
    (lab.model / "model.safetensors.index.json").write_text(json.dumps(content))
    assert all(said in line for line in both(lab))


def test_a_header_larger_than_the_memory_is_not_read(lab: Lab) -> None:
    size = 100 * 2**30
    with (lab.model / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", size - 8))
        file.truncate(size)  # takes no space on the disk
    assert all("bytes hold no header" in line for line in both(lab))


def test_a_size_is_noticed_beside_a_tensor_that_nobody_knows(lab: Lab) -> None:
    """With which shapes alone prove nothing: transformers may know the tensor by another name."""
    weights, config = lab.model / "model.safetensors", lab.model / "config.json"
    tensors = load_file(weights)
    save_file({**tensors, "unknown": next(iter(tensors.values()))}, weights, {"format": "pt"})
    config.write_text(json.dumps(json.loads(config.read_text()) | {"vocab_size": 10**9}))
    assert all("64,000,031,008 parameters, and the weight files hold" in line for line in both(lab))


def test_layers_that_no_tensor_belongs_to_are_not_built(lab: Lab) -> None:
    weights, config = lab.model / "model.safetensors", lab.model / "config.json"
    save_file({name: x for name, x in load_file(weights).items() if "layers" not in name}, weights, {"format": "pt"})
    for model_type in ("llama", "mamba"):
        changes = {"num_hidden_layers": 10**8, "model_type": model_type}
        config.write_text(json.dumps(json.loads(config.read_text()) | changes))
        assert all("asks for 100000000 layers" in line for line in both(lab))


def test_results_come_by_name_whatever_the_config_says(lab: Lab) -> None:
    first = perplexities(lab.search("--json"))
    config = lab.model / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"return_dict": False}))
    assert perplexities(lab.search("--json")) == first


def perplexities(outcome: Outcome) -> list[float]:
    return [step["perplexity"] for step in outcome.json["pruning_order"]]


def test_what_is_checked_is_what_is_loaded(lab: Lab) -> None:
    """Of a folder with both, transformers loads the single file."""
    (lab.model / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    assert lab.search().status == 0


@pytest.mark.parametrize("prefix", ["", "model."])
def test_whole_numbers_are_no_weights_where_nothing_scales_them(prefix: str, lab: Lab) -> None:
    """Whatever the names begin with."""
    weights, config = lab.model / "model.safetensors", lab.model / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": None}))
    tensors = load_file(weights)
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name] = tensors[name].astype("int8")
    save_file({each.removeprefix(prefix): tensor for each, tensor in tensors.items()}, weights, {"format": "pt"})
    assert all(f"{name} of" in line and "is I8, and no quantization_config" in line for line in both(lab))
