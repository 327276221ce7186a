"""The interface between the search and whatever computes scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from blockpruner.blocks import Block
from blockpruner.scoring.layer_measures import LayerMeasure
from blockpruner.scoring.table import ScoreTable
from blockpruner.scoring.work import Meter

TableCallback = Callable[[ScoreTable], None]
"""Called each time values were entered, so that the caller can keep a checkpoint and report progress."""


class Scorer(Protocol):
    """Computes what the model without each candidate predicts of every calibration sequence."""

    @property
    def num_sequences(self) -> int:
        """Number of calibration sequences, B."""
        ...

    @property
    def meter(self) -> Meter:
        """What was computed so far, and how fast."""
        ...

    def dense_nll(self) -> Tensor:
        """Each sequence's mean token NLL in nats of the unpruned model: float64 [B] on the CPU."""
        ...

    def fill(self, removed: tuple[Block, ...], table: ScoreTable, on_update: TableCallback) -> None:
        """Compute every value of the table that is not done yet, with `removed` bypassed as well.

        A scorer of whole layers takes a candidate for its layer. The result does not depend on which values were done
        before: a resumed table ends equal to a fresh one.
        """
        ...


class SurveyScorer(Scorer, Protocol):
    """A scorer that also tells what is asked once, or of one pruned model."""

    def nll_without(self, removed: tuple[Block, ...]) -> Tensor:
        """Each sequence's mean token NLL in nats without the removed blocks: float64 [B] on the CPU. One forward."""
        ...

    def measure_layers(self, measure: LayerMeasure) -> Tensor:
        """A measure of every layer's input and output in the unpruned model: float64 [L, B] on the CPU. One forward."""
        ...
