"""What a scorer fills: values for each candidate block and calibration sequence. Knows no model.

Shapes: `C` candidates, `B` sequences. Keeping the values per sequence makes a half-filled table a checkpoint, whichever
way a scorer walks (candidate by candidate, or micro-batch by micro-batch), and lets the reduction be one fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from blockpruner.blocks import Block


@dataclass(frozen=True)
class ScoreTable:
    """Per-sequence results for the candidates of one search step."""

    candidates: tuple[Block, ...]
    nll_CB: Tensor
    """float64 [C, B] on the CPU: mean token NLL in nats of each sequence without each candidate."""
    done_CB: Tensor
    """bool [C, B]: which values have been computed."""
    divergence_CB: Tensor
    """float64 [C, B] on the CPU: mean over the same tokens of the metric's divergence from the dense model, in nats;
    NaN where the metric has none."""

    @classmethod
    def empty(cls, candidates: Sequence[Block], num_sequences: int) -> ScoreTable:
        """A table with nothing computed."""
        shape = (len(candidates), num_sequences)
        nothing = torch.full(shape, torch.nan, dtype=torch.float64)
        return cls(tuple(candidates), nothing, torch.zeros(shape, dtype=torch.bool), nothing.clone())

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """All that was computed: `nll_CB`, `done_CB`, `divergence_CB`."""
        return self.nll_CB, self.done_CB, self.divergence_CB

    @property
    def is_complete(self) -> bool:
        """Whether every value has been computed."""
        return bool(self.done_CB.all())

    @property
    def num_done(self) -> int:
        """How many candidates' worth of values have been computed, rounded down."""
        return int(self.done_CB.sum()) // max(1, self.done_CB.shape[1])

    def fill(self, rows: slice, columns: slice, nll: Tensor, divergence: Tensor | None = None) -> None:
        """Enter computed values for a rectangle of the table."""
        self.nll_CB[rows, columns] = nll.double().cpu()
        if divergence is not None:
            self.divergence_CB[rows, columns] = divergence.double().cpu()
        self.done_CB[rows, columns] = True
