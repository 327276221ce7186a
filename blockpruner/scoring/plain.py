"""The plain scorer: one full forward pass over all sequences for every candidate, as the paper's own code does.

Slow and obvious; the oracle for every faster scorer.
"""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel

from blockpruner.architectures import Architecture
from blockpruner.blocks import Block
from blockpruner.masking import masked
from blockpruner.perplexity import batch_nll, default_batch_size
from blockpruner.scoring.interface import TableCallback
from blockpruner.scoring.table import ScoreTable


class PlainScorer:
    """A forward per candidate."""

    def __init__(
        self, architecture: Architecture, model: PreTrainedModel, token_ids_BT: Tensor, batch_size: int | None = None
    ) -> None:
        """Score on token ids [B, T], `batch_size` sequences a forward (None: what the logits' size allows)."""
        self._architecture = architecture
        self._model = model
        self._token_ids_BT = token_ids_BT
        vocab_size = model.config.get_text_config().vocab_size
        self._batch_size = batch_size or default_batch_size(token_ids_BT.shape[1], vocab_size)

    @property
    def num_sequences(self) -> int:
        """Number of calibration sequences, B."""
        return int(self._token_ids_BT.shape[0])

    def fill(self, removed: tuple[Block, ...], table: ScoreTable, on_update: TableCallback) -> None:
        """See `Scorer.fill`. Goes candidate by candidate, batch by batch."""
        for row, candidate in enumerate(table.candidates):
            if bool(table.done_CB[row].all()):
                continue
            with masked(self._architecture, self._model, (*removed, candidate)):
                self._fill_row(row, table, on_update)

    def _fill_row(self, row: int, table: ScoreTable, on_update: TableCallback) -> None:
        for start in range(0, self.num_sequences, self._batch_size):
            columns = slice(start, min(start + self._batch_size, self.num_sequences))
            if not bool(table.done_CB[row, columns].all()):
                table.fill(slice(row, row + 1), columns, batch_nll(self._model, self._token_ids_BT[columns])[None])
                on_update(table)
