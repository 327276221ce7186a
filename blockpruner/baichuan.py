"""Baichuan 2 7B as the Llama that it is: read in its published layout, written as a Llama checkpoint.

Its attention keeps query, key and value in one matrix (`W_pack`), and its head's rows are normalised to length one
before they are used (Baichuan 2, arXiv 2309.10305, "NormHead"); both fold into a Llama's tensors exactly, up to the
rounding of the head to the checkpoint's own dtype. The 13B model has ALiBi in the place of rotary positions and is no
Llama. Its published code does not run on transformers 5, so it is never loaded.

Shapes: `D` hidden, `V` vocabulary.
"""

from __future__ import annotations

import filecmp
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional

from blockpruner.checkpoint import Checkpoint
from blockpruner.errors import CheckpointError, UnsupportedArchitectureError
from blockpruner.export.weights import SHARD_BYTES, TensorSource, dtype_of, write_tensors
from blockpruner.foreign_files import parsed_json, read_plain_file

MODEL_TYPE = "baichuan"

_PACKED = ".self_attn.W_pack.weight"
_HEAD = "lm_head.weight"
_SAME_SETTINGS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "hidden_act",
    "rms_norm_eps",
    "initializer_range",
    "max_position_embeddings",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
)
_WEIGHTS = (".safetensors", ".safetensors.index.json")
_WEIGHTS_AND_CODE = ("*.safetensors", "*.index.json", "config.json", "modeling_*.py", "configuration_*.py", "*.bin")


def llama_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of the Llama that a Baichuan 2 7B is.

    Raises:
        UnsupportedArchitectureError: for a Baichuan that is none.
    """
    if "max_position_embeddings" not in config:  # the models with ALiBi have only model_max_length
        raise UnsupportedArchitectureError(
            "this Baichuan has ALiBi in the place of rotary positions (as the 13B models have), and is no Llama; "
            "Baichuan2-7B can be pruned"
        )
    if "z_loss_weight" not in config:
        raise UnsupportedArchitectureError(
            "this Baichuan is of the first generation, whose head is not normalised; Baichuan2-7B can be pruned"
        )
    same = {name: config[name] for name in _SAME_SETTINGS if name in config}
    return {
        **same,
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "num_key_value_heads": config["num_attention_heads"],
        "attention_bias": False,
        "mlp_bias": False,
        "rope_theta": 10000.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }


def is_foldable(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint is in this layout and must be folded before it can be loaded."""
    return checkpoint.model_type == MODEL_TYPE


def fold(checkpoint: Checkpoint, out_dir: Path, *, shard_bytes: int = SHARD_BYTES) -> None:
    """Write a Baichuan 2 7B as a Llama checkpoint, tensor by tensor; tokenizer and other files are copied.

    Raises:
        UnsupportedArchitectureError: if it is another Baichuan.
        CheckpointError: if a tensor is missing or has another shape than the layout asks for.
    """
    settings = check(checkpoint)
    out_dir.mkdir(parents=True, exist_ok=True)
    for path in copied_files(checkpoint):
        shutil.copyfile(path, out_dir / path.name)
    write_tensors([source for name in checkpoint.tensors for source in _folded(checkpoint, name)], out_dir, shard_bytes)
    (out_dir / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def copied_files(checkpoint: Checkpoint) -> list[Path]:
    """The tokenizer and whatever else lies beside weights and model code: a fold holds these as they are."""
    skipped = {path for pattern in _WEIGHTS_AND_CODE for path in checkpoint.path.glob(pattern)}
    return sorted(path for path in checkpoint.path.iterdir() if path.is_file() and path not in skipped)


def check_fold(checkpoint: Checkpoint, folder: Path) -> None:
    """Make sure that a fold of this checkpoint holds no more than `fold` writes, and no code but the checkpoint's own.

    A tokenizer can bring code, which is run for whoever trusts the checkpoint's. Weights are not looked at.

    Raises:
        CheckpointError: naming the file that is another.
    """
    copied = {path.name: path for path in copied_files(checkpoint)}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name == "config.json":
            fits = _json_of(path) == check(checkpoint)
        elif name in copied:
            fits = filecmp.cmp(copied[name], path, shallow=False)
        else:
            fits = path.is_file() and path.name == name and name.endswith(_WEIGHTS)
        if not fits:
            raise CheckpointError(
                f"{folder} is no fold of {checkpoint.name} that this program writes: {name} is another file; remove "
                f"{folder.parent}, and it is made anew"
            )


def _json_of(path: Path) -> Any:
    """What a file of somebody else's holds; None if that is no JSON."""
    try:
        return parsed_json(read_plain_file(path))
    except (ValueError, OSError):
        return None


def check(checkpoint: Checkpoint) -> dict[str, Any]:
    """The Llama's settings, once the headers of the weights fit them.

    Raises:
        UnsupportedArchitectureError: if it is another Baichuan.
        CheckpointError: if a tensor is missing or has another shape than the layout asks for.
    """
    settings = llama_settings(checkpoint.config)
    hidden = settings["hidden_size"]
    expected = {
        f"model.layers.{index}{_PACKED}": (3 * hidden, hidden) for index in range(settings["num_hidden_layers"])
    }
    expected[_HEAD] = (settings["vocab_size"], hidden)
    for name, shape in expected.items():
        found = checkpoint.tensors[name].shape if name in checkpoint.tensors else "not there"
        if found != shape:
            raise CheckpointError(
                f"{name} of {checkpoint.name} should be {list(shape)} and is {found}; download it again"
            )
    return settings


def _folded(checkpoint: Checkpoint, name: str) -> Iterator[TensorSource]:
    """What one tensor of the published layout becomes."""
    entry = checkpoint.tensors[name]

    def whole() -> Tensor:
        with safe_open(entry.file, "pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    if name.endswith(_PACKED):
        for position, part in enumerate("qkv"):

            def third(position: int = position) -> Tensor:
                return whole().chunk(3)[position].clone()

            yield TensorSource(name.replace("W_pack", f"{part}_proj"), entry.num_bytes // 3, third, dtype_of(entry))
    elif name == _HEAD:
        yield TensorSource(name, entry.num_bytes, lambda: _normalised(whole()), dtype_of(entry))
    elif not name.endswith(".rotary_emb.inv_freq"):  # a buffer, which Llama computes itself
        yield TensorSource(name, entry.num_bytes, whole, dtype_of(entry))


def _normalised(head_VD: Tensor) -> Tensor:
    """Rows of length one, computed in float32."""
    return functional.normalize(head_VD.to(torch.float32), dim=-1).to(head_VD.dtype)
