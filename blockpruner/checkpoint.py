"""A model's files on disk: opened, checked and identified before anything is loaded. Builds no model.

Only safetensors weights are read: a pickle can run code. Checks are cheap (headers and sizes), so that a damaged folder
is refused in the first second and not after an hour.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from blockpruner.errors import CheckpointError
from blockpruner.foreign_files import parsed_json
from blockpruner.paths import user_path

_VOLATILE_CONFIG_KEYS = frozenset({"_name_or_path", "_commit_hash", "transformers_version"})
LEGAL_FILES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
"""The terms under which a model is given on, as patterns of names."""
_HUB_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py", "README.md", *LEGAL_FILES]
NUM_LAYERS_KEYS = ("num_hidden_layers", "n_layer", "num_layers")
"""How families call the number of layers in config.json."""
_MOST_OF_ANYTHING = 10**6
"""Experts, heads, labels."""
_MOST_HEADER_BYTES = 100_000_000
"""The limit of the format's own library."""
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
COMPANION_FILES = (
    *TOKENIZER_FILES,
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "generation_config.json",
)
"""Files beside the weights that a model is not complete without, as patterns of names."""


@dataclass(frozen=True)
class TensorEntry:
    """What a safetensors header says of one tensor."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int


@dataclass(frozen=True)
class Checkpoint:
    """A checked folder with config.json and safetensors weights."""

    name: str
    """What the user called it: a folder or a hub id."""
    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorEntry]
    hub_id: str | None = None
    """Where it is from, if from the hub."""

    @classmethod
    def open(cls, id_or_dir: str) -> Checkpoint:
        """Open a folder, or fetch a model of the Hugging Face hub (from the local cache when offline).

        Raises:
            CheckpointError: if there is no such model, or its files are missing or damaged.
        """
        path = _locate(id_or_dir)
        config = _read_json(path / "config.json", "a model folder holds config.json")
        if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
            raise CheckpointError(f"{path / 'config.json'} names no model_type; give a Hugging Face model folder")
        _check_that_nothing_else_is_loaded(path, config)
        tensors = {name: entry for file in _weight_files(path) for name, entry in _read_header(file).items()}
        _check_numbers(path, config, len(tensors))
        return cls(id_or_dir, path, config, tensors, None if user_path(id_or_dir).is_dir() else id_or_dir)

    @property
    def model_type(self) -> str:
        """The family, as config.json names it."""
        return str(self.config["model_type"])

    @property
    def public_name(self) -> str:
        """What others may know of `name`: the hub id, or the folder's own name without where it is."""
        return self.hub_id or user_path(self.name).resolve().name

    def files(self, patterns: Iterable[str]) -> list[Path]:
        """The files, relative to the folder, that any of the patterns fits; sorted."""
        found = {path for pattern in patterns for path in self.path.glob(pattern) if path.is_file()}
        return sorted(path.relative_to(self.path) for path in found)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the configuration and the digests of the weight files; reads every weight byte once."""
        identity = {
            "config": {key: value for key, value in self.config.items() if key not in _VOLATILE_CONFIG_KEYS},
            "weights": {
                file.name: file_digest(file) for file in sorted({entry.file for entry in self.tensors.values()})
            },
            "code": {file.name: file_digest(file) for file in sorted(self.path.glob("*.py"))},
        }
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    @property
    def tokenizer_fingerprint(self) -> str:
        """sha256 over the tokenizer's files.

        Raises:
            CheckpointError: if there is none.
        """
        if not any((self.path / name).is_file() for name in TOKENIZER_FILES):
            raise CheckpointError(f"{self.name} has no tokenizer; put tokenizer.json beside its config.json")
        return self.files_fingerprint(TOKENIZER_FILES)

    def files_fingerprint(self, patterns: Iterable[str]) -> str:
        """sha256 over the files that the patterns fit."""
        identity = {path.as_posix(): file_digest(self.path / path) for path in self.files(patterns)}
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """sha256 (hex) of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _locate(id_or_dir: str) -> Path:
    path = user_path(id_or_dir)
    if path.is_dir():
        return path.resolve()
    if path.exists():
        raise CheckpointError(f"{id_or_dir} is a file; a model is a folder with config.json and safetensors weights")
    looks_like_hub_id = id_or_dir.count("/") <= 1 and not id_or_dir.startswith((".", "/", "~")) and id_or_dir.strip()
    if not looks_like_hub_id:
        raise CheckpointError(f"there is no model folder {id_or_dir!r}; give a folder with config.json, or a hub id")
    return _fetch(id_or_dir)


def _fetch(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(hub_id, allow_patterns=_HUB_PATTERNS))
    except HFValidationError as error:
        raise CheckpointError(f"{hub_id!r} is neither a folder nor a valid hub id (NAME or OWNER/NAME)") from error
    except GatedRepoError as error:
        raise CheckpointError(
            f"{hub_id} is gated: accept its licence on its hub page and log in with `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"the hub has no model {hub_id!r} that you can read; check the name, or log in with `hf auth login`"
        ) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{hub_id!r} is no folder here and the hub cannot be reached ({type(error).__name__}); "
            "check the path, or download the model once with a network, or unset HF_HUB_OFFLINE"
        ) from error


def _read_json(path: Path, hint: str) -> Any:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; {hint}")
    try:
        return parsed_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({type(error).__name__}); download the model again") from error


def _check_that_nothing_else_is_loaded(path: Path, config: dict[str, Any]) -> None:
    """Refuse what makes transformers load other files than those that are checked here, or code of the hub."""
    if (path / "adapter_config.json").exists():
        raise CheckpointError(
            f"{path} holds an adapter (adapter_config.json); merge it into its model (PEFT: merge_and_unload) first"
        )
    for key, value in _settings_within(config):
        if key == "transformers_weights":
            raise CheckpointError(
                f"config.json of {path} names its weights itself ({key}); call them model.safetensors, and take it out"
            )
        if key.endswith(("attn_implementation", "experts_implementation")) and "/" in str(value):
            raise CheckpointError(
                f"config.json of {path} asks for code of the hub ({key}: {str(value)[:80]!r}), which is not run; take "
                "it out"
            )


def _check_numbers(path: Path, config: dict[str, Any], num_tensors: int) -> None:
    """Refuse numbers that transformers would count to for hours before it found that something does not fit."""
    for key, value in _settings_within(config):
        if type(value) is not int:
            continue
        if key in NUM_LAYERS_KEYS and value > num_tensors:
            raise CheckpointError(
                f"config.json of {path} asks for {value} layers ({key}), and the weight files hold {num_tensors} "
                "tensors; config and weights do not belong together: download the model again"
            )
        if key.startswith("num_") and value > _MOST_OF_ANYTHING:
            raise CheckpointError(f"config.json of {path} says that {key} is {value}; no model has so many: mend it")


def _settings_within(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every setting, also of the configurations within."""
    waiting: list[Any] = [config]
    while waiting:
        for key, value in waiting.pop().items():
            yield key, value
            if isinstance(value, dict):
                waiting.append(value)


def _weight_files(path: Path) -> list[Path]:
    """The files that transformers loads: one alone goes before several, as there."""
    index_path, single = path / "model.safetensors.index.json", path / "model.safetensors"
    if single.is_file():
        return [single]
    if not index_path.is_file():
        pickled = sorted(path.glob("*.bin")) + sorted(path.glob("*.pt"))
        reason = f"only pickled weights ({pickled[0].name})" if pickled else "no model.safetensors"
        raise CheckpointError(f"{path} has {reason}; only safetensors weights are read: convert or download them first")
    index = _read_json(index_path, "the model's index")
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index_path} holds no weight_map; download the model again")
    files = [path / name for name in sorted({str(name) for name in weight_map.values()})]
    for file in files:
        if file.parent != path or file.suffix != ".safetensors" or not file.is_file():
            raise CheckpointError(f"{file.name}, named by {index_path.name}, is missing from {path}; download it again")
    return files


def _read_header(path: Path) -> dict[str, TensorEntry]:
    """The header of a safetensors file, checked against the file's size."""
    size = path.stat().st_size
    with path.open("rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        if size < 8 or header_size > size - 8 or header_size > _MOST_HEADER_BYTES:
            raise CheckpointError(f"{path} is truncated: {size} bytes hold no header; download it again")
        raw = file.read(header_size)
    try:
        header = parsed_json(raw)
        entries = {
            str(name): TensorEntry(
                path, str(entry["dtype"]), tuple(entry["shape"]), entry["data_offsets"][1] - entry["data_offsets"][0]
            )
            for name, entry in header.items()
            if name != "__metadata__"
        }
        expected = (
            8
            + header_size
            + max((entry["data_offsets"][1] for n, entry in header.items() if n != "__metadata__"), default=0)
        )
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{path} has a damaged safetensors header; download it again") from error
    if expected != size:
        state = "truncated" if size < expected else "too long"
        raise CheckpointError(f"{path} is {state}: {size} bytes, its header asks for {expected}; download it again")
    try:
        with safe_open(path, framework="numpy"):  # who reads the weights later; it compares offsets, dtypes and shapes
            return entries
    except SafetensorError as error:
        raise CheckpointError(f"{path} has a damaged safetensors header ({error}); download it again") from error
