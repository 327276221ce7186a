"""Bypass blocks: a masked block adds nothing to the residual stream, and costs nothing to compute.

A bypass puts stand-ins in the place of the block's modules within its layer. No weight is touched: `masked` puts the
modules back, after an exception too; `layer_without` leaves the layer alone and gives a second view of it. Surgery,
which removes blocks for good, is elsewhere.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from blockpruner.architectures import Architecture
from blockpruner.blocks import Block, BlockKind


class Bypass(nn.Module):
    """Base of the stand-ins, so that a module can be told from one that is masked."""


class Unchanged(Bypass):
    """Stands in for a norm: what comes in goes out."""

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """The input."""
        return hidden_states


class Zeros(Bypass):
    """Stands in for a module whose output is added to the stream."""

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """Zeros in the shape of the input."""
        return torch.zeros_like(hidden_states)


class ZerosPair(Bypass):
    """Stands in for an attention that returns (output, weights)."""

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, None]:
        """Zeros in the shape of the input, and no weights."""
        return torch.zeros_like(hidden_states), None


@contextmanager
def masked(architecture: Architecture, model: nn.Module, blocks: Iterable[Block]) -> Iterator[None]:
    """Run the body with the given blocks as the identity on the residual stream.

    Nested masks add up. A block that is already masked stays so until the outer mask ends.
    """
    layers = architecture.decoder_layers(model)
    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(_bypassed(architecture, layers[block.layer_index], block.block_kind))
        yield


def layer_without(architecture: Architecture, layer: nn.Module, kinds: Collection[BlockKind]) -> nn.Module:
    """A view of a decoder layer in which the blocks of these kinds add nothing.

    The view shares all other modules with the layer, which stays as it is.
    """
    view = copy.copy(layer)
    view._modules = dict(layer._modules)
    for kind in kinds:
        view._modules.update(_stand_ins(architecture, layer, kind))
    return view


@contextmanager
def _bypassed(architecture: Architecture, layer: nn.Module, kind: BlockKind) -> Iterator[None]:
    stand_ins = _stand_ins(architecture, layer, kind)
    originals = {name: layer._modules[name] for name in stand_ins}
    layer._modules.update(stand_ins)
    try:
        yield
    finally:
        layer._modules.update(originals)


def _stand_ins(architecture: Architecture, layer: nn.Module, kind: BlockKind) -> dict[str, nn.Module | None]:
    """What takes the place of a block's modules, by their names; those that are masked already stay."""
    layout = architecture.block(kind)
    stand_ins: dict[str, nn.Module | None] = {name: Unchanged() for name in layout.passed}
    stand_ins[layout.compute] = ZerosPair() if layout.returns_pair else Zeros()
    return {name: stand_in for name, stand_in in stand_ins.items() if not isinstance(layer.get_submodule(name), Bypass)}
