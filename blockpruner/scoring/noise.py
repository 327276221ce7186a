"""How far apart two candidates' scores must lie to be told apart."""

from __future__ import annotations

from torch import nn

from blockpruner.loading import DtypeName

_NOISE_NATS: dict[DtypeName, float] = {"float32": 1e-5, "bfloat16": 2e-3}
"""In bfloat16 twice how far a score moved between plain scorer and sweep: up to 9.4e-4 over 2048 tokens (random small
Llama, Qwen3 and Gemma 2, H200, 2026-11-28). More tokens average more of it out. In float32 a score moved by 4e-7 at
most (small models of every family, on a CPU), and the tests allow 1e-5.
"""

_MIXTURE_NOISE_NATS = 1e-2
"""The same for mixtures of experts, whose router sends a token elsewhere where rounding turns two experts around: up to
4.5e-3 (Mixtral, Qwen2-MoE and Qwen3-MoE, likewise).
"""


def noise_nats(model: nn.Module, dtype: DtypeName) -> float:
    """How far apart, in nats a token, two candidates lie at most that another order of summation may turn around.

    Args:
        model: the model that is scored, or its modules on the meta device.
        dtype: what it computes in.
    """
    is_mixture = any(parameter.dim() == 3 for parameter in model.parameters())  # experts' matrices, stacked
    return _MIXTURE_NOISE_NATS if is_mixture and dtype == "bfloat16" else _NOISE_NATS[dtype]
