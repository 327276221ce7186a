"""What a stage is: a name, a version, a frozen config, inputs known by content, and a function that fills a folder.

This module runs nothing and stores nothing; `artifacts` does. It is what all stage modules share, so that no stage
needs to import another.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict

from blockpruner.progress import ProgressCallback, silent
from blockpruner.scoring.settings import ScorerSettings
from stages.executor import ExecutorSettings


class StageConfig(BaseModel):
    """Base of every stage's settings: frozen, and unknown fields are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class StageManifest(BaseModel):
    """Base of what a stage says about the files it wrote. NaN and infinity are written as strings."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), ser_json_inf_nan="strings")


class StageInputs(Protocol):
    """What a stage reads. Knows the content of each input by its fingerprint, never by its path."""

    def fingerprints(self) -> Mapping[str, str]:
        """Name of each input and the sha256 that identifies its content."""
        ...


@dataclass(frozen=True)
class ArtifactRef:
    """An upstream artifact: where its files are and what it is."""

    fingerprint: str
    path: Path


@dataclass(frozen=True)
class Runtime:
    """How to run a stage here: all that may differ between two runs that give the same result."""

    device: str = "cpu"
    """A torch device: 'cpu', 'cuda', 'cuda:1'."""
    batch_size: int | None = None
    """Sequences in one forward pass; None lets the stage choose."""
    scoring: ScorerSettings = field(default_factory=ScorerSettings)
    """How a search computes its scores."""
    executor: ExecutorSettings = field(default_factory=ExecutorSettings)
    """Who computes them."""
    progress: ProgressCallback = silent
    state_dir: Path | None = None
    """Where a resumable stage keeps its checkpoints; the artifact store sets it."""


ConfigT = TypeVar("ConfigT", bound=StageConfig)
InputsT = TypeVar("InputsT", bound=StageInputs)
ManifestT = TypeVar("ManifestT", bound=StageManifest)


@dataclass(frozen=True)
class Stage(Generic[ConfigT, InputsT, ManifestT]):
    """A cacheable unit of work, as plain data; every stage module ends with one, named STAGE."""

    name: str
    version: int
    """Counted up when the same config and inputs would give another result."""
    manifest_type: type[ManifestT]
    run: Callable[[ConfigT, InputsT, Path, Runtime], ManifestT]
    """`run(config, inputs, out_dir, runtime)`: writes files into `out_dir` and returns what they are."""
    not_resume_fields: frozenset[str] = field(default=frozenset())
    """Config fields that may differ between two runs that share checkpoints (a search's number of blocks)."""
    resumable: bool = False
    """Whether the stage keeps checkpoints in `Runtime.state_dir`."""

    def fingerprint(self, config: ConfigT, inputs: InputsT) -> str:
        """The sha256 that identifies this stage's result."""
        return self._digest(config.model_dump(mode="json"), inputs)

    def resume_fingerprint(self, config: ConfigT, inputs: InputsT) -> str:
        """The sha256 that identifies the checkpoints this stage may go on from."""
        return self._digest(config.model_dump(mode="json", exclude=set(self.not_resume_fields)), inputs)

    def _digest(self, config: dict[str, Any], inputs: InputsT) -> str:
        identity = {
            "stage": self.name,
            "version": self.version,
            "config": config,
            "inputs": dict(inputs.fingerprints()),
        }
        return canonical_digest(identity)


def canonical_digest(value: object) -> str:
    """sha256 (hex) of a value's canonical JSON: sorted keys, no spaces, no NaN.

    Raises:
        TypeError: if the value has a part without a stable identity; the message names it.
    """
    try:
        text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"no stable identity for {value!r}: {error}; give plain strings, numbers, lists and dictionaries"
        ) from error
    return hashlib.sha256(text.encode()).hexdigest()
