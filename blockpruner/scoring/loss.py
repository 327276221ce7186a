"""Token losses from final hidden states, without the full logits of a batch ever existing.

Shapes: `N` sequences, `T` tokens, `D` hidden, `V` vocabulary, `M` tokens of one chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

LogitsOf = Callable[[Tensor], Tensor]
"""Final hidden states [M, D] to logits [M, V]."""


def token_nll(logits_MV: Tensor, targets_M: Tensor) -> Tensor:
    """Negative log-likelihood of each target in nats, float32 [M]: log-sum-exp minus the target's logit."""
    logits_MV = logits_MV.float()
    return logits_MV.logsumexp(dim=-1) - logits_MV.gather(-1, targets_M[:, None]).squeeze(-1)


def token_kl(reference_MV: Tensor, logits_MV: Tensor) -> Tensor:
    """Kullback-Leibler divergence KL(reference || model) of each token's distribution in nats, float32 [M]."""
    reference_MV = reference_MV.float().log_softmax(dim=-1)
    return (reference_MV.exp() * (reference_MV - logits_MV.float().log_softmax(dim=-1))).sum(dim=-1)


def token_js(reference_MV: Tensor, logits_MV: Tensor) -> Tensor:
    """Jensen-Shannon divergence of each token's distributions in nats, float32 [M]; at most ln 2."""
    reference_MV = reference_MV.float().log_softmax(dim=-1)
    logits_MV = logits_MV.float().log_softmax(dim=-1)
    mean_MV = torch.logaddexp(reference_MV, logits_MV) - torch.log(torch.tensor(2.0))
    left = (reference_MV.exp() * (reference_MV - mean_MV)).sum(dim=-1)
    right = (logits_MV.exp() * (logits_MV - mean_MV)).sum(dim=-1)
    return (left + right) / 2


def chunks(num_tokens: int, chunk_tokens: int) -> Iterator[slice]:
    """Slices that cover `num_tokens` tokens."""
    for start in range(0, num_tokens, chunk_tokens):
        yield slice(start, min(start + chunk_tokens, num_tokens))
