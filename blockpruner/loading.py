"""From a checked checkpoint to a model and a tokenizer in memory. Decides device and dtype; changes nothing."""

from __future__ import annotations

import gc
import logging
import math
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, Literal, cast

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from blockpruner.architectures import KNOWN_MODEL_TYPES, Architecture, architecture_of, num_parameters
from blockpruner.baichuan import check, is_foldable, llama_settings
from blockpruner.checkpoint import NUM_LAYERS_KEYS, Checkpoint
from blockpruner.errors import CheckpointError, ConfigurationError, one_line

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
    checkpoint: Checkpoint,
    *,
    device: str,
    dtype: DtypeName,
    trust_remote_code: bool = False,
    settings: Mapping[str, Any] = MappingProxyType({}),
) -> PreTrainedModel:
    """Load a causal LM in eval mode on a device.

    Args:
        checkpoint: the files.
        device: a torch device.
        dtype: of weights and activations.
        trust_remote_code: whether to run code that the files bring along.
        settings: what counts in place of config.json's own.

    Raises:
        CheckpointError: if the model cannot be built, needs a library that is not here, or lacks tensors
            (transformers would fill them at random).
    """
    try:
        # transformers' annotations do not know that output_loading_info makes the result a pair. A tensor of another
        # shape is to be told there as well: what transformers raises for it points to the report that is not printed.
        with _without_load_report():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                checkpoint.path,
                dtype=_DTYPES[dtype],
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **{"return_dict": True, **settings},  # config.json may say otherwise, and we ask for results by name
            )
        model, info = cast("tuple[PreTrainedModel, dict[str, Any]]", loaded)
    except ImportError as error:
        raise CheckpointError(
            f"{checkpoint.name} needs a library that is not installed: {one_line(error)}; install it, "
            "or give the model in a form that needs none (not quantized)"
        ) from error
    except Exception as error:  # of many types, by transformers and by the model's own code
        raise CheckpointError(f"{checkpoint.name} cannot be loaded: {one_line(error)}") from error
    if info["missing_keys"] or info["mismatched_keys"]:
        raise _other_weights(
            checkpoint, sorted(info["missing_keys"]), sorted(key for key, *_ in info["mismatched_keys"])
        )
    if info["unexpected_keys"]:
        unused = sorted(info["unexpected_keys"])
        logger.warning(
            "%s holds %d tensors that the model does not use, %s first", checkpoint.name, len(unused), unused[0]
        )
    model.train(False)
    model.requires_grad_(False)
    torch.nn.Module.to(model, device)  # the method as transformers annotates it takes no device
    return model


def release_memory() -> None:
    """Give the GPU memory of models that are gone back to the system, for other processes to use."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def load_tokenizer(checkpoint: Checkpoint, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer beside a model.

    Raises:
        CheckpointError: if there is none, or its files are damaged.
    """
    _ = checkpoint.tokenizer_fingerprint  # says clearly when there is none at all
    try:
        with _without_load_report():  # nor its remark that it does not know the type of an export with code
            tokenizer = AutoTokenizer.from_pretrained(checkpoint.path, trust_remote_code=trust_remote_code)
            tokenizer("a", verbose=False)  # some settings are looked at only now
    except Exception as error:  # the tokenizers library raises bare Exception for a damaged file
        says_what_to_do = isinstance(error, ImportError) or "trust_remote_code" in str(error)
        remedy = "" if says_what_to_do else "; its files are damaged or incomplete: copy or download them again"
        raise CheckpointError(
            f"the tokenizer of {checkpoint.name} cannot be loaded: {one_line(error)}{remedy}"
        ) from error
    return cast(PreTrainedTokenizerBase, tokenizer)


def meta_model(checkpoint: Checkpoint) -> tuple[Architecture, PreTrainedModel]:
    """The model's modules without its weights (meta device), and its row in the table: for shapes and counts.

    Raises:
        UnsupportedArchitectureError: if the family is not in the table, or this model of it can lose no block.
        CheckpointError: if config.json does not describe a model, or one with layers that the weights lack, or if the
            weights are whole numbers that nothing scales.
    """
    folded = llama_settings(checkpoint.config) if is_foldable(checkpoint) else None
    architecture = architecture_of("llama" if folded else checkpoint.model_type)
    _check_num_layers(checkpoint, architecture)
    try:
        config = LlamaConfig(**folded) if folded else AutoConfig.from_pretrained(checkpoint.path)
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # transformers checks a configuration with many types of errors
        remedy = "" if isinstance(error, ImportError) else "; correct it, or download the model again"
        raise CheckpointError(
            f"config.json of {checkpoint.name} describes no model: {one_line(error)} ({type(error).__name__}){remedy}"
        ) from error
    _check_size(checkpoint, model)
    _check_floating(checkpoint, model)
    return architecture.for_config(config), cast(PreTrainedModel, model)


def any_meta_model(checkpoint: Checkpoint) -> PreTrainedModel | None:
    """The modules of a model of any family; None where only its own code, or a library that is not here, knows them.

    Raises:
        CheckpointError: if config.json describes a model with layers that the weights lack, or if the weights are whole
            numbers that nothing scales.
    """
    if is_foldable(checkpoint):
        return meta_model(checkpoint)[1]
    if checkpoint.model_type in KNOWN_MODEL_TYPES:
        _check_num_layers(checkpoint, architecture_of(checkpoint.model_type))
    try:
        config = AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=False)
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001  # of many types; `load_model` has the last word
        logger.debug("%s is not known before it is loaded: %s", checkpoint.name, error)
        return None
    _check_size(checkpoint, model)
    _check_floating(checkpoint, model)
    return cast(PreTrainedModel, model)


def _check_num_layers(checkpoint: Checkpoint, architecture: Architecture) -> None:
    """Compare the number of layers with the names of the tensors: building thousands of layers to see it takes long."""
    stated = [checkpoint.config[name] for name in NUM_LAYERS_KEYS if type(checkpoint.config.get(name)) is int]
    if not stated:  # left to the family's default, or no number, which is for transformers to refuse
        return
    asked = stated[0]
    if asked < 1:
        raise CheckpointError(
            f"config.json of {checkpoint.name} says that it has {asked} layers (num_hidden_layers); a model has 1 or "
            "more: download it again"
        )
    list_name = architecture.layers.rpartition(".")[2]
    of_layer = re.compile(rf"(?:^|\.){re.escape(list_name)}\.(\d+)\.")
    held = {int(found[1]) for name in checkpoint.tensors if (found := of_layer.search(name))}
    if held and max(held) + 1 < asked:
        lacks = f"layer {asked - 1}" if max(held) + 2 == asked else f"layers {max(held) + 1} to {asked - 1}"
        raise CheckpointError(
            f"{checkpoint.name} lacks the weights of {lacks} that its config.json asks for; "
            "config and weights do not belong together: download the model again"
        )


def _check_size(checkpoint: Checkpoint, shapes: PreTrainedModel) -> None:
    """Refuse a model far larger than its weights: transformers makes memory for what the files lack.

    Quantized weights are packed, and have fewer elements than the model.
    """
    asked, held = num_parameters(shapes), sum(math.prod(entry.shape) for entry in checkpoint.tensors.values())
    if asked > 2 * held and "quantization_config" not in checkpoint.config:
        raise CheckpointError(
            f"config.json of {checkpoint.name} asks for {asked:,} parameters, and the weight files hold {held:,}; "
            "config and weights do not belong together: download the model again"
        )


def _check_floating(checkpoint: Checkpoint, shapes: PreTrainedModel) -> None:
    """Refuse whole numbers where nothing says how they are scaled: transformers would take them for the weights."""
    if checkpoint.config.get("quantization_config"):
        return
    prefix = f"{shapes.base_model_prefix}."  # which some files leave out
    for name, _ in shapes.named_parameters():
        entry = checkpoint.tensors.get(name) or checkpoint.tensors.get(name.removeprefix(prefix))
        if entry is not None and entry.dtype.startswith(("I", "U", "BOOL")):  # as safetensors calls them: I8, U8, ...
            raise CheckpointError(
                f"{name} of {checkpoint.name} is {entry.dtype}, and no quantization_config in its config.json says "
                "what its numbers stand for; give the model unquantized"
            )


def check_tensors(checkpoint: Checkpoint, shapes: PreTrainedModel) -> None:
    """Compare the headers of the weight files with the model that config.json describes; reads no weight.

    Judges only what is certain from the names: where the files hold tensors that the model does not know, transformers
    may know them by other names, and quantized weights have shapes of their own. `load_model` has the last word.

    Args:
        checkpoint: the files.
        shapes: `meta_model` of the checkpoint.

    Raises:
        CheckpointError: if tensors are missing or have another shape.
    """
    if is_foldable(checkpoint):
        check(checkpoint)
        return
    if "quantization_config" in checkpoint.config:
        return
    expected: dict[str, torch.Tensor] = shapes.state_dict(keep_vars=True)  # without non-persistent buffers
    held = {name: entry.shape for name, entry in checkpoint.tensors.items()}
    tied: dict[int, set[str]] = {}
    for name, tensor in expected.items():
        tied.setdefault(id(tensor), set()).add(name)
    # Of tied tensors a file may hold any one.
    missing = [name for name, tensor in expected.items() if held.keys().isdisjoint(tied[id(tensor)])]
    misshapen = [name for name, tensor in expected.items() if held.get(name, tensor.shape) != tuple(tensor.shape)]
    if held.keys() <= expected.keys() and (missing or misshapen):
        raise _other_weights(checkpoint, missing, misshapen)


def _other_weights(checkpoint: Checkpoint, missing: list[str], misshapen: list[str]) -> CheckpointError:
    """The error for weights that are not those of the model that config.json describes."""
    lacks = f"lacks {len(missing)} tensors that its config.json asks for, {missing[0]} first" if missing else ""
    differs = f"has {len(misshapen)} of another shape than it asks for, {misshapen[0]} first" if misshapen else ""
    return CheckpointError(
        f"{checkpoint.name} {' and '.join(part for part in (lacks, differs) if part)}; "
        "config and weights do not belong together: download the model again"
    )


@contextmanager
def _without_load_report() -> Iterator[None]:
    """Keep transformers from printing its table of every tensor that does not fit: we say it in one line.

    And that `rope_scaling` is an old name, which some configurations have to keep for the engines that read it.
    """
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`rope_scaling` is deprecated", FutureWarning)
            yield
    finally:
        transformers_logging.set_verbosity(before)
