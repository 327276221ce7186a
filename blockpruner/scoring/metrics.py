"""What a block's removal is judged by: perplexity, or a divergence from the dense model's predictions.

Shapes: `M` tokens, `V` vocabulary, `B` sequences; leading dimensions broadcast.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from blockpruner.perplexity import perplexity
from blockpruner.scoring.settings import MetricName

Divergence = Callable[[Tensor, Tensor], Tensor]
"""(dense logits [..., V], pruned logits [..., V]) -> float32 [...], nats for each token."""


@dataclass(frozen=True)
class Metric:
    """A block's importance: the metric's value for the model without it. Lower means less important."""

    name: MetricName
    divergence: Divergence | None
    """None where the next token's likelihood is all that is needed."""

    def score(self, nll_B: Tensor, divergence_B: Tensor | None) -> float:
        """The importance from each sequence's mean over its tokens, NLL and divergence: perplexity, or mean nats."""
        return perplexity(nll_B) if self.divergence is None else self.mean_nats(nll_B, divergence_B)

    def mean_nats(self, nll_B: Tensor, divergence_B: Tensor | None) -> float:
        """The mean over sequences in nats a token: what scores are compared by where noise matters."""
        values_B = nll_B if self.divergence is None else divergence_B
        assert values_B is not None
        return float(values_B.double().mean())


def _log_softmax(logits: Tensor) -> Tensor:
    """In float32, without a float32 copy of 16-bit logits."""
    return torch.log_softmax(logits, dim=-1, dtype=torch.float32)


def kl_divergence(dense_logits: Tensor, pruned_logits: Tensor) -> Tensor:
    """Kullback-Leibler divergence from the dense model's next-token distribution P to the pruned one's Q.

    sum over the vocabulary of P (log P - log Q), in nats.
    """
    dense, pruned = _log_softmax(dense_logits), _log_softmax(pruned_logits)
    return (dense.exp() * (dense - pruned)).sum(-1)


def js_divergence(dense_logits: Tensor, pruned_logits: Tensor) -> Tensor:
    """Jensen-Shannon divergence, the paper's alternative importance (Zhong et al. 2025, ablation): symmetric, <= ln 2.

    Half of KL(P, M) and half of KL(Q, M) with M the mean of P and Q, in nats.
    """
    dense, pruned = _log_softmax(dense_logits), _log_softmax(pruned_logits)
    p, q = dense.exp(), pruned.exp()
    # log M; where both underflow to zero the products below are zero times a finite number.
    mean = (0.5 * (p + q)).clamp_min(1e-38).log()
    return 0.5 * (p * (dense - mean) + q * (pruned - mean)).sum(-1)


_METRICS: dict[MetricName, Metric] = {
    "perplexity": Metric("perplexity", None),
    "kl": Metric("kl", kl_divergence),
    "js": Metric("js", js_divergence),
}


def metric_of(name: MetricName) -> Metric:
    """The metric of this name."""
    return _METRICS[name]
