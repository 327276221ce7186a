"""The interface between the search and whatever computes scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from blockpruner.blocks import Block
from blockpruner.scoring.table import ScoreTable

TableCallback = Callable[[ScoreTable], None]
"""Called each time values were entered, so that the caller can keep a checkpoint and report progress."""


class Scorer(Protocol):
    """Computes the per-sequence NLL of the model without each candidate."""

    @property
    def num_sequences(self) -> int:
        """Number of calibration sequences, B."""
        ...

    def fill(self, removed: tuple[Block, ...], table: ScoreTable, on_update: TableCallback) -> None:
        """Compute every value of the table that is not done yet, with `removed` bypassed as well.

        The result does not depend on which values were done before: a resumed table ends equal to a fresh one.
        """
        ...
