"""How far apart two scores must lie to be told apart."""

from __future__ import annotations

from torch import nn

from blockpruner.loading import DtypeName

_NOISE_NATS: dict[DtypeName, float] = {"float32": 1e-5, "bfloat16": 2e-3}
"""How far the scores of two orders of summation lie apart at most, as the tests hold them to."""

_MIXTURE_NOISE_NATS = 5e-3
"""The same for mixtures of experts in bfloat16, whose router sends a token elsewhere where rounding turns two experts
around: up to 4.5e-3 over 2048 tokens (random Mixtral, Qwen2-MoE and Qwen3-MoE, H200, 2026-11-28). More tokens average
more of it out.
"""


def noise_nats(model: nn.Module, dtype: DtypeName) -> float:
    """How far the scores of two orders of summation lie apart at most, in nats a token.

    Args:
        model: the model that is scored, or its modules on the meta device.
        dtype: what it computes in.
    """
    is_mixture = any(parameter.dim() == 3 for parameter in model.parameters())  # experts' matrices, stacked
    return _MIXTURE_NOISE_NATS if is_mixture and dtype == "bfloat16" else _NOISE_NATS[dtype]
