"""Loading: weights as they are and none made up, the meta model, the tokenizer, and what device and dtype mean."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from blockpruner.checkpoint import Checkpoint
from blockpruner.errors import CheckpointError, ConfigurationError
from blockpruner.loading import load_model, load_tokenizer, meta_model, resolve_device, resolve_dtype
from tests.tiny_models import TINY_FAMILIES
from tests.unit.test_checkpoint import edit_config, load, message


@pytest.fixture
def folder(tmp_path: Path, tiny_folder: Callable[[str], Path]) -> Path:
    """A Llama of the test's own, to damage."""
    return Path(shutil.copytree(tiny_folder("llama"), tmp_path / "model"))


def test_a_model_is_loaded_to_be_read(folder: Path) -> None:
    model = load(folder)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    bfloat16 = load_model(Checkpoint.open(str(folder)), device="cpu", dtype="bfloat16")
    assert {parameter.dtype for parameter in bfloat16.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("family", sorted(TINY_FAMILIES))
def test_loading_calls_no_module(
    family: str, tiny_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compiler that starts meanwhile would disturb it: see `compiled.warm_up`."""
    checkpoint = Checkpoint.open(str(tiny_folder(family)))
    called: list[nn.Module] = []

    def noted(module: nn.Module, *_: object, **__: object) -> None:
        called.append(module)

    monkeypatch.setattr(nn.Module, "__call__", noted)
    load_model(checkpoint, device="cpu", dtype="bfloat16")
    assert not called
    nn.Linear(1, 1)(torch.ones(1))
    assert called, "it would have been seen"


@pytest.mark.parametrize(
    "left_out",
    ["model.layers.2.mlp.up_proj.weight", "lm_head.weight", "model.norm.weight", "model.embed_tokens.weight"],
)
def test_a_missing_tensor_is_not_filled_at_random(folder: Path, left_out: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors[left_out]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    assert left_out in message(caught.value)


def test_a_tensor_of_another_shape_is_refused(folder: Path) -> None:
    edit_config(folder, intermediate_size=64)
    with pytest.raises(CheckpointError, match="has 12 of another shape") as caught:
        load(folder)
    assert "down_proj" in message(caught.value)


@pytest.mark.parametrize("num_layers", [3, 6])
def test_transformers_report_of_what_does_not_fit_is_not_printed(
    folder: Path, num_layers: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)  # so that caplog hears it
    edit_config(folder, num_hidden_layers=num_layers)
    with nullcontext() if num_layers < 4 else pytest.raises(CheckpointError, match="lacks 18 tensors"):
        load(folder)
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    unused = f"{folder} holds 9 tensors that the model does not use, model.layers.3.input_layernorm.weight first"
    assert said == ([unused] if num_layers < 4 else [])


def test_the_meta_model_has_the_models_shapes_and_no_weights(folder: Path) -> None:
    architecture, shapes = meta_model(Checkpoint.open(str(folder)))
    assert architecture.model_type == "llama"
    assert {name: p.shape for name, p in shapes.named_parameters()} == {
        name: p.shape for name, p in load(folder).named_parameters()
    }
    assert {parameter.device.type for parameter in shapes.parameters()} == {"meta"}


def test_the_tokenizer_is_loaded_from_beside_the_model(folder: Path) -> None:
    tokenizer = load_tokenizer(Checkpoint.open(str(folder)))
    assert tokenizer.decode(tokenizer("the river")["input_ids"][1:]) == "the river"


def test_a_model_without_a_tokenizer_says_so(folder: Path) -> None:
    for path in folder.glob("*token*"):
        path.unlink()
    with pytest.raises(CheckpointError, match="no tokenizer") as caught:
        load_tokenizer(Checkpoint.open(str(folder)))
    message(caught.value)


def test_a_damaged_tokenizer_is_refused(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "BPE", "vocab": 3}}')
    with pytest.raises(CheckpointError, match="tokenizer of") as caught:
        load_tokenizer(Checkpoint.open(str(folder)))
    message(caught.value)


# --- device and dtype -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "cuda:-1", "", "CPU", "mps", "cuda:0:1"])
def test_an_unknown_device_is_refused(device: str) -> None:
    with pytest.raises(ConfigurationError, match="unknown device") as caught:
        resolve_device(device)
    assert repr(device) in message(caught.value)


@pytest.mark.parametrize(
    ("device", "num_gpus", "resolved"),
    [("auto", 0, "cpu"), ("auto", 2, "cuda"), ("cpu", 2, "cpu"), ("cuda", 1, "cuda"), ("cuda:1", 2, "cuda:1")],
)
def test_devices(monkeypatch: pytest.MonkeyPatch, device: str, num_gpus: int, resolved: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: num_gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    assert resolve_device(device) == resolved


@pytest.mark.parametrize(("device", "num_gpus"), [("cuda", 0), ("cuda:0", 0), ("cuda:2", 2)])
def test_a_device_that_is_not_here_is_refused(monkeypatch: pytest.MonkeyPatch, device: str, num_gpus: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: num_gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    with pytest.raises(ConfigurationError, match="not on this machine") as caught:
        resolve_device(device)
    assert repr(device) in message(caught.value)


def test_dtypes() -> None:
    assert resolve_dtype("auto", "cpu") == "float32"
    assert resolve_dtype("auto", "cuda:1") == "bfloat16"
    assert resolve_dtype("float32", "cuda") == "float32"
    assert resolve_dtype("bfloat16", "cpu") == "bfloat16"


@pytest.mark.parametrize("dtype", ["float16", "fp32", "bf16", ""])
def test_an_unknown_dtype_is_refused(dtype: str) -> None:
    with pytest.raises(ConfigurationError, match="unknown dtype") as caught:
        resolve_dtype(dtype, "cpu")
    assert repr(dtype) in message(caught.value)
