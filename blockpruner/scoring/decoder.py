"""A causal LM taken apart into the pieces a sweep calls: embedding, each residual unit, and the head.

Nothing of a family's mathematics is written again: every piece is the model's own code, or what was seen to compute the
same (see `RunLayer`). The decoder layers get the arguments that the model itself passes them (masks and position
embeddings can differ from layer to layer), captured once for a batch of one sequence; they broadcast over any number of
sequences.

Shapes: `N` sequences of any branches, `M` tokens, `T` tokens of a sequence, `D` hidden, `V` vocabulary.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from blockpruner.architectures import Architecture
from blockpruner.blocks import Block, BlockKind
from blockpruner.masking import layer_without
from blockpruner.scoring.residency import LayerResidency, Resident

LayerCall = Callable[..., Any]
RunLayer = Callable[[nn.Module, Tensor, tuple[Any, ...], dict[str, Any]], Any]
"""Calls a layer, or the final norm, on hidden states with its captured arguments; where quicker ways step in."""


@dataclass(frozen=True)
class Unit:
    """A part of the stream that runs as one: half a layer, or a whole one.

    Whole where both blocks read the same input, and where only whole layers are removed.
    """

    index: int
    """Position in the stream, from 0."""
    layer_index: int
    blocks: tuple[Block, ...]
    leaves_whole: bool = False
    """Whether its blocks leave together; the first of them then stands for all."""

    def leaving_with(self, block: Block) -> frozenset[Block]:
        """What a branch skips that skips this block of the unit."""
        return frozenset(self.blocks) if self.leaves_whole else frozenset({block})


def run_layer(layer: nn.Module, hidden_NTD: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The plain `RunLayer`."""
    return layer(hidden_NTD, *args, **kwargs)


class Decoder:
    """The pieces of a model for sequences of one length, without cache or padding."""

    def __init__(
        self,
        architecture: Architecture,
        model: PreTrainedModel,
        sequence_length: int,
        residency: LayerResidency | None = None,
        run: RunLayer = run_layer,
        *,
        whole_layers: bool = False,
    ) -> None:
        """Take `model` apart for sequences of `sequence_length` tokens; with `whole_layers` no finer than that."""
        self._whole_layers = whole_layers
        self._architecture = architecture
        self._model = model
        self._layers = architecture.decoder_layers(model)
        norm = architecture.final_norm_of(model)
        self._norms = [norm] if norm is not None else []
        self._norm_views = [_without_hooks(norm) for norm in self._norms]
        self._residency = residency or Resident()
        self._run = run
        self._views: dict[tuple[int, frozenset[BlockKind]], nn.Module] = {}
        self._arguments = self._capture(sequence_length)
        self.units = tuple(self._units())

    @property
    def device(self) -> torch.device:
        """Where the embeddings are, and the sweep's tensors with them."""
        return self._model.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the hidden states."""
        return self._model.dtype

    @property
    def hidden_size(self) -> int:
        """D."""
        return int(self._model.config.get_text_config().hidden_size)

    def embed(self, token_ids_NT: Tensor) -> Tensor:
        """What the first decoder layer gets: [N, T, D]."""
        entered: list[Tensor] = []

        def first(hidden_states: Tensor) -> Tensor:
            entered.append(hidden_states)
            return hidden_states

        with self._one_layer(first):
            self._model.base_model(input_ids=token_ids_NT, use_cache=False)
        return entered[0]

    def logits(self, hidden_MD: Tensor) -> Tensor:
        """Logits [M, V] from the last layer's output: final norm and head with the model's own scaling and capping."""
        token_ids = torch.zeros((1, 1), dtype=torch.long, device=hidden_MD.device)
        # Given a cache, be it empty, transformers does not look for packed sequences, for which it waits for the GPU.
        cache = DynamicCache()
        with self._one_layer(lambda _: hidden_MD[None]), _all_replaced(self._norms, self._norm_run):
            logits: Tensor = self._model(input_ids=token_ids, past_key_values=cache, use_cache=False).logits
        return logits.reshape(hidden_MD.shape[0], -1)

    def _norm_run(self, index: int) -> LayerCall:
        """Runs the final norm as layers are run: it goes over what every branch ends with, and more than once."""
        return lambda hidden_states: self._run(self._norm_views[index], hidden_states, (), {})

    def run(self, unit: Unit, hidden_NTD: Tensor, without: frozenset[Block] = frozenset()) -> Tensor:
        """The stream after a unit: [N, T, D]; blocks of `without` add nothing."""
        self._residency.ensure(unit.layer_index)
        args, kwargs = self._arguments[unit.layer_index]
        output = self._run(self._view(unit, without), hidden_NTD, args, kwargs)
        hidden: Tensor = output[0] if isinstance(output, tuple) else output
        return hidden

    def expect(self, layer_indices: tuple[int, ...]) -> None:
        """Tell in which order the layers will be run next, so that weights that are elsewhere can be fetched ahead."""
        self._residency.expect(layer_indices)

    def _view(self, unit: Unit, without: frozenset[Block]) -> nn.Module:
        """The unit's layer with everything bypassed that is not the unit's, or is in `without`."""
        active = {block.block_kind for block in unit.blocks if block not in without}
        bypassed = frozenset(BlockKind) - active
        key = (unit.layer_index, bypassed)
        if key not in self._views:
            self._views[key] = layer_without(self._architecture, self._layers[unit.layer_index], bypassed)
        return self._views[key]

    def _units(self) -> Iterator[Unit]:
        index = 0
        for layer_index in range(len(self._layers)):
            blocks = [Block(layer_index=layer_index, block_kind=kind) for kind in BlockKind]
            is_one = self._whole_layers or self._architecture.is_parallel
            for group in [blocks] if is_one else [[block] for block in blocks]:
                yield Unit(index, layer_index, tuple(group), self._whole_layers)
                index += 1

    @torch.inference_mode()
    def _capture(self, sequence_length: int) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        """The arguments beside the hidden state that the model passes to each layer for one sequence."""
        captured: list[tuple[tuple[Any, ...], dict[str, Any]]] = [((), {}) for _ in self._layers]

        def record(index: int) -> LayerCall:
            def layer(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
                captured[index] = (args, kwargs)
                return self._architecture.layer_result(hidden_states)

            return layer

        token_ids = torch.zeros((1, sequence_length), dtype=torch.long, device=self._model.device)
        with _all_replaced(self._layers, record):
            self._model.base_model(input_ids=token_ids, use_cache=False)
        return captured

    @contextmanager
    def _one_layer(self, call: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Let a function of the hidden state stand in for all layers.

        Really for all: with a large vocabulary the head runs hundreds of times in a sweep, and calling every layer
        each time, if only to get its input back, was a sixth of a small model's search (1B, H200, 2026-11-24).
        """

        def layer(hidden_states: Tensor, *_: Any, **__: Any) -> Any:
            return self._architecture.layer_result(call(hidden_states))

        layers = self._layers
        all_layers, first = layers._modules, layers[0]
        layers._modules = {"0": first}
        try:
            with _all_replaced(layers, lambda _: layer):
                yield
        finally:
            layers._modules = all_layers


def _without_hooks(module: nn.Module) -> nn.Module:
    """A view of a module whose own hooks have run when it is called."""
    view = copy.copy(module)
    view._forward_pre_hooks, view._forward_hooks = OrderedDict(), OrderedDict()
    return view


@contextmanager
def _all_replaced(layers: Iterable[nn.Module], make: Callable[[int], LayerCall]) -> Iterator[None]:
    calls: Mapping[nn.Module, LayerCall] = {layer: make(index) for index, layer in enumerate(layers)}
    own = {layer: vars(layer)["forward"] for layer in calls if "forward" in vars(layer)}
    for layer, call in calls.items():
        layer.forward = call
    try:
        yield
    finally:
        for layer in calls:
            del layer.forward
        for layer, forward in own.items():
            layer.forward = forward
