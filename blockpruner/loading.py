"""From a checked checkpoint to a model and a tokenizer in memory. Decides device and dtype; changes nothing."""

from __future__ import annotations

import logging
from typing import Any, Literal, cast

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from blockpruner.architectures import Architecture, architecture_of
from blockpruner.checkpoint import Checkpoint
from blockpruner.errors import CheckpointError, ConfigurationError

logger = logging.getLogger(__name__)

DtypeName = Literal["float32", "bfloat16"]

_DTYPES: dict[DtypeName, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def resolve_device(device: str) -> str:
    """The torch device for 'auto', 'cpu', 'cuda' or 'cuda:N'; auto takes the GPU where there is one.

    Raises:
        ConfigurationError: if the device is unknown or not on this machine.
    """
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        return "cuda" if num_gpus else "cpu"
    if device == "cpu":
        return device
    name, _, index = device.partition(":")
    if name != "cuda" or (index and not index.isdigit()) or device.endswith(":"):
        raise ConfigurationError(f"unknown device {device!r}; valid are auto, cpu, cuda and cuda:N")
    if int(index or 0) >= num_gpus:
        raise ConfigurationError(f"device {device!r} is not on this machine ({num_gpus} GPUs); use cpu or auto")
    return device


def resolve_dtype(dtype: str, device: str) -> DtypeName:
    """The dtype to compute in; 'auto' is float32 on a CPU and bfloat16 (as in the paper) on a GPU.

    Raises:
        ConfigurationError: if the dtype is unknown.
    """
    if dtype == "auto":
        return "float32" if device == "cpu" else "bfloat16"
    if dtype not in _DTYPES:
        raise ConfigurationError(f"unknown dtype {dtype!r}; valid are auto, {' and '.join(_DTYPES)}")
    return dtype


def torch_dtype(dtype: DtypeName) -> torch.dtype:
    """The torch dtype of a name."""
    return _DTYPES[dtype]


def load_model(
    checkpoint: Checkpoint, *, device: str, dtype: DtypeName, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Load a causal LM in eval mode on a device.

    Raises:
        CheckpointError: if the model cannot be built, or tensors are missing (transformers would fill them at random).
    """
    try:
        # transformers' annotations do not know that output_loading_info makes the result a pair.
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            checkpoint.path, dtype=_DTYPES[dtype], trust_remote_code=trust_remote_code, output_loading_info=True
        )
        model, info = cast("tuple[PreTrainedModel, dict[str, Any]]", loaded)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"{checkpoint.name} cannot be loaded: {_one_line(error)}") from error
    missing = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if missing:
        raise CheckpointError(
            f"{checkpoint.name} lacks {len(missing)} tensors that its config.json asks for, {missing[0]} first; "
            "config and weights do not belong together: download the model again"
        )
    model.train(False)
    model.requires_grad_(False)
    torch.nn.Module.to(model, device)  # the method as transformers annotates it takes no device
    return model


def load_tokenizer(checkpoint: Checkpoint, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer beside a model.

    Raises:
        CheckpointError: if there is none, or its files are damaged.
    """
    _ = checkpoint.tokenizer_fingerprint  # says clearly when there is none at all
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.path, trust_remote_code=trust_remote_code)
    except Exception as error:  # the tokenizers library raises bare Exception for a damaged file
        raise CheckpointError(f"the tokenizer of {checkpoint.name} cannot be loaded: {_one_line(error)}") from error
    return cast(PreTrainedTokenizerBase, tokenizer)


def meta_model(checkpoint: Checkpoint) -> tuple[Architecture, PreTrainedModel]:
    """The model's modules without its weights (meta device), and its row in the table: for shapes and counts.

    Raises:
        UnsupportedArchitectureError: if the family is not in the table, or this model of it can lose no block.
        CheckpointError: if config.json does not describe a model.
    """
    architecture = architecture_of(checkpoint.model_type)
    try:
        config = AutoConfig.from_pretrained(checkpoint.path)
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # transformers checks a configuration with many types of errors
        raise CheckpointError(f"config.json of {checkpoint.name} describes no model: {_one_line(error)}") from error
    return architecture.for_config(config), cast(PreTrainedModel, model)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:297] + "..."
