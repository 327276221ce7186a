"""Stage `fold`: a model in a published layout of its own (Baichuan 2 7B), as the Llama checkpoint that it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from blockpruner.baichuan import copied_files, fold
from blockpruner.checkpoint import Checkpoint
from stages.contract import Runtime, Stage, StageConfig, StageManifest

MODEL_FOLDER = "model"


class FoldConfig(StageConfig):
    """Nothing to choose."""


@dataclass(frozen=True)
class FoldInputs:
    """What this stage reads."""

    model: Checkpoint

    def fingerprints(self) -> Mapping[str, str]:
        """The model, and what is copied from beside its weights, by content."""
        copied = self.model.files_fingerprint(path.name for path in copied_files(self.model))
        return {"model": self.model.fingerprint, "copied": copied}


class FoldManifest(StageManifest):
    """What was written."""

    model_type: str
    bytes: int


def run(config: FoldConfig, inputs: FoldInputs, out_dir: Path, runtime: Runtime) -> FoldManifest:
    """Write the Llama checkpoint into `out_dir`/model.

    Raises:
        UnsupportedArchitectureError: if the model cannot be folded.
    """
    folder = out_dir / MODEL_FOLDER
    fold(inputs.model, folder)
    return FoldManifest(model_type="llama", bytes=sum(file.stat().st_size for file in folder.iterdir()))


STAGE: Stage[FoldConfig, FoldInputs, FoldManifest] = Stage(name="fold", version=1, manifest_type=FoldManifest, run=run)
