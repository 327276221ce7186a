"""A causal LM taken apart into the pieces a sweep calls: embedding, each residual unit, final norm and head.

Nothing of a family's mathematics is written again: every piece is the model's own code. The decoder layers get the
keyword arguments that the model itself passes them (masks and position embeddings can differ from layer to layer),
captured once for a batch of one sequence; they broadcast over any number of sequences.

Shapes: `N` sequences of any branches, `T` tokens, `D` hidden, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from blockpruner.architectures import Architecture
from blockpruner.blocks import Block, BlockKind
from blockpruner.masking import masked

LayerCall = Callable[..., Any]


@dataclass(frozen=True)
class Unit:
    """A part of the stream that runs as one: half a layer, or a whole one where both blocks read the same input."""

    index: int
    """Position in the stream, from 0."""
    layer_index: int
    blocks: tuple[Block, ...]


class Decoder:
    """The pieces of a model for sequences of one length, without cache or padding."""

    def __init__(self, architecture: Architecture, model: PreTrainedModel, sequence_length: int) -> None:
        """Take `model` apart for sequences of `sequence_length` tokens."""
        self._architecture = architecture
        self._model = model
        self._layers = architecture.decoder_layers(model)
        self._kwargs = self._capture(sequence_length)
        self.units = tuple(self._units(parallel=architecture.is_parallel(model.config)))

    @property
    def device(self) -> torch.device:
        """Where the embeddings are, and the sweep's tensors with them."""
        return self._model.device

    def embed(self, token_ids_NT: Tensor) -> Tensor:
        """What the first decoder layer gets: [N, T, D]."""
        return self._run_base(token_ids_NT, None)[0]

    def final_hidden(self, hidden_NTD: Tensor) -> Tensor:
        """What the head gets, from the output of the last decoder layer: [N, T, D]."""
        token_ids_NT = torch.zeros(hidden_NTD.shape[:2], dtype=torch.long, device=hidden_NTD.device)
        return self._run_base(token_ids_NT, hidden_NTD)[1]

    def logits(self, final_MD: Tensor) -> Tensor:
        """Logits [M, V] of M tokens' final hidden states, with the model's own scaling and capping."""
        token_ids = torch.zeros((1, 1), dtype=torch.long, device=final_MD.device)
        output = BaseModelOutputWithPast(last_hidden_state=final_MD[None])
        with _forward_replaced(self._model.base_model, lambda *_, **__: output):
            logits: Tensor = self._model(input_ids=token_ids, use_cache=False).logits
        return logits[0]

    def run(self, unit: Unit, hidden_NTD: Tensor, without: Collection[Block] = ()) -> Tensor:
        """The stream after a unit: [N, T, D]; blocks of `without` add nothing."""
        layer = self._layers[unit.layer_index]
        skipped = {Block(layer_index=unit.layer_index, block_kind=kind) for kind in BlockKind} - set(unit.blocks)
        with masked(self._architecture, self._model, skipped.union(without)):
            output = layer(hidden_NTD, **self._kwargs[unit.layer_index])
        hidden: Tensor = output[0] if isinstance(output, tuple) else output
        return hidden

    def _units(self, *, parallel: bool) -> Iterator[Unit]:
        index = 0
        for layer_index in range(len(self._layers)):
            blocks = [Block(layer_index=layer_index, block_kind=kind) for kind in BlockKind]
            for group in [blocks] if parallel else [[block] for block in blocks]:
                yield Unit(index, layer_index, tuple(group))
                index += 1

    @torch.inference_mode()
    def _capture(self, sequence_length: int) -> list[dict[str, Any]]:
        """The keyword arguments that the model passes to each layer for one sequence."""
        captured: list[dict[str, Any]] = [{} for _ in self._layers]

        def record(index: int) -> LayerCall:
            def layer(hidden_states: Tensor, *_: Any, **kwargs: Any) -> Any:
                captured[index] = kwargs
                return self._architecture.layer_result(hidden_states)

            return layer

        token_ids = torch.zeros((1, sequence_length), dtype=torch.long, device=self._model.device)
        with _all_replaced(self._layers, record):
            self._model.base_model(input_ids=token_ids, use_cache=False)
        return captured

    def _run_base(self, token_ids_NT: Tensor, injected_NTD: Tensor | None) -> tuple[Tensor, Tensor]:
        """Run the base model around its layers: what enters the first, and what leaves the final norm.

        The layers do nothing; `injected_NTD`, if given, takes the place of the last one's output.
        """
        entered: list[Tensor] = []

        def stand_in(index: int) -> LayerCall:
            def layer(hidden_states: Tensor, *_: Any, **__: Any) -> Any:
                entered.append(hidden_states)
                return self._architecture.layer_result(hidden_states if injected_NTD is None else injected_NTD)

            return layer

        with _all_replaced(self._layers, stand_in):
            output = self._model.base_model(input_ids=token_ids_NT, use_cache=False)
        return entered[0], output.last_hidden_state


@contextmanager
def _all_replaced(layers: nn.ModuleList, make: Callable[[int], LayerCall]) -> Iterator[None]:
    calls: Mapping[nn.Module, LayerCall] = {layer: make(index) for index, layer in enumerate(layers)}
    for layer, call in calls.items():
        layer.forward = call
    try:
        yield
    finally:
        for layer in calls:
            del layer.forward


@contextmanager
def _forward_replaced(module: nn.Module, call: LayerCall) -> Iterator[None]:
    module.forward = call
    try:
        yield
    finally:
        del module.forward
