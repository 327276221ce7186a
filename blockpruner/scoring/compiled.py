"""torch.compile for the parts of a sweep that are bound by memory: norms, rotary positions, activations, losses.

Matrix products stay with the vendor's library. One compiled function serves all layers of a kind: first for one batch
size, and if another comes, for all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from blockpruner.scoring.decoder import RunLayer, run_layer
from blockpruner.scoring.loss import token_nll
from blockpruner.scoring.metrics import Divergence


def compiled_layer() -> RunLayer:
    """`run_layer`, compiled for the layers that it meets."""
    return cast(RunLayer, torch.compile(run_layer))


def compiled_losses(divergence: Divergence | None) -> tuple[Callable[[Tensor, Tensor], Tensor], Divergence | None]:
    """`token_nll` and a metric's divergence, compiled: the logits are read, and nothing of their size is written."""
    return torch.compile(token_nll), torch.compile(divergence) if divergence else None
