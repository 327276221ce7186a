"""The plain scorer: one full forward pass over all sequences for every candidate, as the paper's own code does.

Slow and obvious; the oracle for every faster scorer.

Shapes: `B` sequences, `b` of a batch, `T` tokens, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from blockpruner.architectures import Architecture
from blockpruner.blocks import Block, both_of
from blockpruner.masking import masked
from blockpruner.perplexity import batch_logits, default_batch_size, mean_token_nll, sequence_nll
from blockpruner.scoring.interface import TableCallback
from blockpruner.scoring.layer_measures import LayerMeasure
from blockpruner.scoring.metrics import Metric, metric_of
from blockpruner.scoring.table import ScoreTable
from blockpruner.scoring.work import Costs, Meter


class PlainScorer:
    """A forward per candidate."""

    def __init__(
        self,
        architecture: Architecture,
        model: PreTrainedModel,
        token_ids_BT: Tensor,
        batch_size: int | None = None,
        metric: Metric | None = None,
        meter: Meter | None = None,
        *,
        whole_layers: bool = False,
    ) -> None:
        """Score on token ids [B, T], `batch_size` sequences a forward (None: what the logits' size allows).

        With `whole_layers` a candidate stands for its layer.
        """
        self._whole_layers = whole_layers
        self._architecture = architecture
        self._model = model
        self._token_ids_BT = token_ids_BT
        vocab_size = model.config.get_text_config().vocab_size
        self._batch_size = batch_size or default_batch_size(token_ids_BT.shape[1], vocab_size)
        self._metric = metric or metric_of("perplexity")
        self._meter = meter or Meter()
        self._costs = Costs.of(architecture, model)

    @property
    def num_sequences(self) -> int:
        """Number of calibration sequences, B."""
        return int(self._token_ids_BT.shape[0])

    @property
    def meter(self) -> Meter:
        """What was computed so far, and how fast."""
        return self._meter

    def dense_nll(self) -> Tensor:
        """Each sequence's mean token NLL in nats of the unpruned model: float64 [B] on the CPU."""
        return sequence_nll(self._model, self._token_ids_BT, self._batch_size)

    @torch.inference_mode()
    def fill(self, removed: tuple[Block, ...], table: ScoreTable, on_update: TableCallback) -> None:
        """See `Scorer.fill`. Goes candidate by candidate, batch by batch."""
        self._meter.start()
        for row, candidate in enumerate(table.candidates):
            for start in range(0, self.num_sequences, self._batch_size):
                columns = slice(start, min(start + self._batch_size, self.num_sequences))
                if not bool(table.done_CB[row, columns].all()):
                    self._fill_cells(row, columns, (*removed, *self._leaving_with(candidate)), table)
                    on_update(table)

    def nll_without(self, removed: tuple[Block, ...]) -> Tensor:
        """See `SurveyScorer.nll_without`."""
        with masked(self._architecture, self._model, removed):
            return sequence_nll(self._model, self._token_ids_BT, self._batch_size)

    @torch.inference_mode()
    def measure_layers(self, measure: LayerMeasure) -> Tensor:
        """See `SurveyScorer.measure_layers`. The layers tell their inputs and outputs as the model calls them."""
        layers = self._architecture.decoder_layers(self._model)
        values_LB = torch.full((len(layers), self.num_sequences), torch.nan, dtype=torch.float64)
        columns = slice(0)

        def listen(index: int) -> Callable[..., None]:
            def heard(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
                entered = args[0] if args else kwargs["hidden_states"]
                left = output[0] if isinstance(output, tuple) else output
                values_LB[index, columns] = measure(entered, left).cpu()

            return heard

        hooks = [layer.register_forward_hook(listen(i), with_kwargs=True) for i, layer in enumerate(layers)]
        try:
            for start in range(0, self.num_sequences, self._batch_size):
                columns = slice(start, min(start + self._batch_size, self.num_sequences))
                self._model.base_model(input_ids=self._token_ids_BT[columns].to(self._model.device), use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        return values_LB

    def _leaving_with(self, block: Block) -> tuple[Block, ...]:
        return both_of(block.layer_index) if self._whole_layers else (block,)

    def _fill_cells(self, row: int, columns: slice, without: tuple[Block, ...], table: ScoreTable) -> None:
        token_ids_bT = self._token_ids_BT[columns].to(self._model.device)
        with masked(self._architecture, self._model, without):
            logits_bTV = batch_logits(self._model, token_ids_bT)
        divergence_b = self._divergence(logits_bTV, token_ids_bT)
        divergence = None if divergence_b is None else divergence_b[None]
        table.fill(slice(row, row + 1), columns, mean_token_nll(logits_bTV, token_ids_bT)[None], divergence)
        self._meter.add(self._costs.forward(without) * token_ids_bT.numel(), 0.0, token_ids_bT.numel())

    def _divergence(self, logits_bTV: Tensor, token_ids_bT: Tensor) -> Tensor | None:
        """Each sequence's mean over its predicting tokens: float64 [b]."""
        if self._metric.divergence is None:
            return None
        dense_bTV = batch_logits(self._model, token_ids_bT)
        return self._metric.divergence(dense_bTV[:, :-1], logits_bTV[:, :-1]).double().mean(dim=1)
