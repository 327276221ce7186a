"""Stage `speed`: the dense model and the exported one in use on this machine, in transformers.

What it gives depends on the machine, so the machine is part of its configuration, and so of its identity.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import transformers

from blockpruner.checkpoint import Checkpoint
from blockpruner.loading import DtypeName
from blockpruner.progress import Progress
from blockpruner.speed import Speed, SpeedCase, measure_speed
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
    """Repetitions; the median counts."""
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
    """Measure the dense model, then the pruned one, each in a process of its own.

    Raises:
        CheckpointError: if a model cannot be run.
    """
    speeds: list[VariantSpeed] = []
    variants: tuple[tuple[Literal["dense", "pruned"], Checkpoint, bool], ...] = (
        ("dense", inputs.dense, inputs.trust_remote_code),
        ("pruned", inputs.pruned, inputs.pruned_has_code),
    )
    for done, (variant, checkpoint, trusts) in enumerate(variants):
        runtime.progress(Progress(done, len(variants), "models", variant))
        measured = measure_speed(
            checkpoint.path,
            config.cases,
            device=runtime.device,
            dtype=config.dtype,
            num_repeats=config.num_repeats,
            trust_remote_code=trusts,
        )
        speeds += [VariantSpeed(variant=variant, **speed.model_dump()) for speed in measured]
    runtime.progress(Progress(len(variants), len(variants), "models"))
    return SpeedManifest(machine=config.machine, speeds=tuple(speeds))


STAGE: Stage[SpeedConfig, SpeedInputs, SpeedManifest] = Stage(
    name="speed", version=1, manifest_type=SpeedManifest, run=run
)
