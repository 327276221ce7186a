"""Token losses, chunk by chunk, so that the logits of a whole batch never exist.

Shapes: `V` vocabulary, `M` tokens of one chunk.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor


def token_nll(logits_MV: Tensor, targets_M: Tensor) -> Tensor:
    """Negative log-likelihood of each target in nats, float32 [M]: log-sum-exp minus the target's logit."""
    logits_MV = logits_MV.float()
    return logits_MV.logsumexp(dim=-1) - logits_MV.gather(-1, targets_M[:, None]).squeeze(-1)


def chunks(num_tokens: int, chunk_tokens: int) -> Iterator[slice]:
    """Slices that cover `num_tokens` tokens."""
    for start in range(0, num_tokens, chunk_tokens):
        yield slice(start, min(start + chunk_tokens, num_tokens))
