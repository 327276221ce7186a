"""torch.compile for the parts of a sweep that are bound by memory: norms, rotary positions, activations, losses.

Matrix products stay with the vendor's library. One compiled function serves all layers of a kind, at any batch size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from blockpruner.scoring.decoder import RunLayer, run_layer
from blockpruner.scoring.loss import token_nll
from blockpruner.scoring.metrics import Divergence

_COMPILE: dict[str, Any] = {"dynamic": None}


def compiled_layer() -> RunLayer:
    """`run_layer`, compiled for the layers that it meets."""
    run = cast(RunLayer, torch.compile(run_layer, **_COMPILE))

    def call(layer: nn.Module, hidden_NTD: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        torch._dynamo.maybe_mark_dynamic(hidden_NTD, 0)  # batches grow as branches fork: one function for all sizes
        return run(layer, hidden_NTD, args, kwargs)

    return call


def compiled_losses(divergence: Divergence | None) -> tuple[Callable[[Tensor, Tensor], Tensor], Divergence | None]:
    """`token_nll` and a metric's divergence, compiled: the logits are read, and nothing of their size is written."""
    nll = torch.compile(token_nll, dynamic=True)
    return nll, torch.compile(divergence, dynamic=True) if divergence else None
