"""Models that a plan opens: each read once as long as its files stay the same, and those that were pruned elsewhere.

Loads no weights.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from blockpruner.architectures import num_parameters
from blockpruner.checkpoint import Checkpoint
from blockpruner.loading import any_meta_model
from blockpruner.positions import check_sequence_length
from flows.grid import External
from flows.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_known: dict[tuple[object, ...], Checkpoint] = {}
"""Models that were opened before: their fingerprints, which read every weight, are kept by the objects."""


def opened(id_or_dir: str) -> Checkpoint:
    """Open a model; one whose files are the same as when it was last opened is that one."""
    checkpoint = Checkpoint.open(id_or_dir)
    files = sorted({*(entry.file for entry in checkpoint.tensors.values()), *checkpoint.path.glob("*.*")})
    stats = [(str(file), stat.st_ino, stat.st_size, stat.st_mtime_ns) for file in files if (stat := file.stat())]
    return _known.setdefault((id_or_dir, *stats), checkpoint)


@cache  # its fingerprint reads every weight, and is kept by the object
def folded_model(folder: Path, name: str, hub_id: str | None) -> Checkpoint:
    """A folded model under the name of the one that it was."""
    return dataclasses.replace(Checkpoint.open(str(folder)), name=name, hub_id=hub_id)


def check_any_model(recipe: Recipe, checkpoint: Checkpoint) -> PreTrainedModel | None:
    """What must hold of a model that is only measured, of whatever family; without weights, where it can be had."""
    if (shapes := any_meta_model(checkpoint)) is not None:
        check_sequence_length(shapes, recipe.sequence_length)
    return shapes


@dataclass(frozen=True)
class PrunedElsewhere:
    """A checkpoint that something else has pruned."""

    label: str
    checkpoint: Checkpoint
    num_parameters: int

    @classmethod
    def open(cls, external: External, recipe: Recipe) -> PrunedElsewhere:
        """Open it and check what can be checked.

        Raises:
            BlockPrunerError: if it cannot be measured.
        """
        checkpoint = opened(external.path)
        shapes = check_any_model(recipe, checkpoint)
        stored = sum(math.prod(entry.shape) for entry in checkpoint.tensors.values())
        _ = checkpoint.tokenizer_fingerprint
        return cls(external.label, checkpoint, stored if shapes is None else num_parameters(shapes))

    def has_other_tokenizer(self, model: Checkpoint) -> bool:
        """Whether its tokenizer's files are not the model's; it may cut texts alike all the same."""
        return self.checkpoint.tokenizer_fingerprint != model.tokenizer_fingerprint
