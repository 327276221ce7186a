"""Bypass blocks for a moment: a masked block adds nothing to the residual stream, and costs nothing to compute.

Masking swaps the `forward` of the block's modules on those instances; weights are not touched, so leaving the
context restores the model exactly, after an exception too. Surgery, which removes blocks for good, is elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from blockpruner.architectures import Architecture
from blockpruner.blocks import Block


@contextmanager
def masked(architecture: Architecture, model: nn.Module, blocks: Iterable[Block]) -> Iterator[None]:
    """Run the body with the given blocks as the identity on the residual stream.

    Nested masks add up. A block that is already masked stays so until the outer mask ends.
    """
    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(_bypassed(architecture, model, block))
        yield


@contextmanager
def _bypassed(architecture: Architecture, model: nn.Module, block: Block) -> Iterator[None]:
    layout = architecture.block(block.block_kind)
    layer = architecture.decoder_layers(model)[block.layer_index]
    compute = layer.get_submodule(layout.compute)
    if "forward" in vars(compute):  # masked by an outer context, which will restore it
        yield
        return
    norms = [layer.get_submodule(name) for name in layout.norms]
    compute.forward = _zeros_pair if layout.returns_pair else _zeros
    for norm in norms:
        norm.forward = _unchanged
    try:
        yield
    finally:
        for module in (compute, *norms):
            del module.forward


def _unchanged(hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return hidden_states


def _zeros(hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return torch.zeros_like(hidden_states)


def _zeros_pair(hidden_states: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, None]:
    return torch.zeros_like(hidden_states), None
