"""Stage `speed`: the dense model and the exported one in use on this machine, in transformers.

What it gives depends on the machine, so the machine is part of its configuration, and so of its identity.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import transformers

from blockpruner.checkpoint import Checkpoint
from blockpruner.loading import DtypeName
from blockpruner.speed import Speed, SpeedCase, TimedModel, measure_speed
from stages.contract import Runtime, Stage, StageConfig, StageManifest


class SpeedConfig(StageConfig):
    """What to measure."""

    batch_sizes: tuple[int, ...] = (1, 8)
    """Sequences side by side."""
    prompt_tokens: tuple[int, ...] = (128, 512)
    """Lengths of the prompts."""
    new_tokens: int = 32
    """Tokens decoded after each."""
    num_repeats: int = 5
    """Repetitions in each of a model's two processes; the median of all counts."""
    dtype: DtypeName = "float32"
    machine: str
    """See `machine`."""

    @property
    def cases(self) -> list[SpeedCase]:
        """Every batch size with every length."""
        return [
            SpeedCase(batch_size=batch_size, prompt_tokens=length, new_tokens=self.new_tokens)
            for batch_size in self.batch_sizes
            for length in self.prompt_tokens
        ]


@dataclass(frozen=True)
class SpeedInputs:
    """What this stage reads."""

    dense: Checkpoint
    pruned: Checkpoint
    trust_remote_code: bool = False
    """For the dense model."""
    pruned_has_code: bool = False
    """Whether the exporter has put code into the pruned one: no other code of it is run."""

    def fingerprints(self) -> Mapping[str, str]:
        """Both models, by content."""
        return {"dense": self.dense.fingerprint, "pruned": self.pruned.fingerprint}


class VariantSpeed(Speed):
    """One measurement of one model."""

    variant: Literal["dense", "pruned"]
    weight_bytes: int
    """Of the files with the weights, on disk."""


class SpeedManifest(StageManifest):
    """All measurements."""

    machine: str
    speeds: tuple[VariantSpeed, ...]


def machine(device: str) -> str:
    """What a measurement depends on beside the models: the device, and the versions that compute."""
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.processor() or "cpu"
    threads = "" if device.startswith("cuda") else f", {torch.get_num_threads()} threads"
    return f"{platform.node()}: {name}{threads}, torch {torch.__version__}, transformers {transformers.__version__}"


def run(config: SpeedConfig, inputs: SpeedInputs, out_dir: Path, runtime: Runtime) -> SpeedManifest:
    """Measure the dense model and the pruned one, in turn, each in processes of its own.

    Raises:
        CheckpointError: if a model cannot be run.
    """
    dense, pruned = inputs.dense, inputs.pruned
    measured = measure_speed(
        [TimedModel(dense.path, inputs.trust_remote_code), TimedModel(pruned.path, inputs.pruned_has_code)],
        config.cases,
        device=runtime.device,
        dtype=config.dtype,
        num_repeats=config.num_repeats,
        progress=runtime.progress,
    )
    speeds = (*_of_variant("dense", dense, measured[0]), *_of_variant("pruned", pruned, measured[1]))
    return SpeedManifest(machine=config.machine, speeds=speeds)


def _of_variant(
    variant: Literal["dense", "pruned"], model: Checkpoint, speeds: Iterable[Speed]
) -> Iterator[VariantSpeed]:
    weight_bytes = sum(file.stat().st_size for file in {entry.file for entry in model.tensors.values()})
    for speed in speeds:
        yield VariantSpeed(variant=variant, weight_bytes=weight_bytes, **speed.model_dump())


STAGE: Stage[SpeedConfig, SpeedInputs, SpeedManifest] = Stage(
    name="speed", version=2, manifest_type=SpeedManifest, run=run
)
