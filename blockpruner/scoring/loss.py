"""Token losses, chunk by chunk, so that the logits of a whole batch never exist.

Shapes: `V` vocabulary, `M` tokens of one micro-batch, `m` of one chunk, `K` branches, `D` hidden.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from blockpruner.scoring.metrics import Divergence

NLL = Callable[[Tensor, Tensor], Tensor]
"""(logits [M, V], targets [M]) -> float32 [M], nats."""

Head = Callable[[Tensor], Tensor]
"""Final norm, language-model head, scaling and capping: [M, D] -> logits [M, V]."""


_WIDE_ELEMENTS = 2**25
"""Logits in float32 at one time, 128 MiB: with 2^23 a GPU waited for the host, 0.1 s in a search of 3.5 s with 8192
words (H200, 2026-11-28), and with more nothing was gained."""
_WIDE_ROWS = 512
"""But of at least so many tokens, which keep a large GPU busy."""


def token_nll(logits_MV: Tensor, targets_M: Tensor) -> Tensor:
    """Negative log-likelihood of each target in nats, float32 [M]: log-sum-exp minus the target's logit."""
    targets_M1 = targets_M[:, None]
    found_M1 = torch.empty(targets_M1.shape, dtype=torch.float32, device=logits_MV.device)
    for rows in chunks(len(targets_M), max(_WIDE_ROWS, _WIDE_ELEMENTS // logits_MV.shape[1])):
        log_probabilities_mV = torch.log_softmax(logits_MV[rows], dim=-1, dtype=torch.float32)
        torch.gather(log_probabilities_mV, -1, targets_M1[rows], out=found_M1[rows])
    return -found_M1.squeeze(-1)


@dataclass(frozen=True)
class TokenLosses:
    """Computes what a metric needs of each token, for several branches at a time."""

    head: Head
    divergence: Divergence | None
    logit_elements: int
    """Logits that exist at one time."""
    vocab_size: int
    nll: NLL = token_nll

    def of(self, hidden_KMD: Tensor, targets_M: Tensor, dense_MD: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """NLL, and divergence from the dense model where that is given, of every branch's tokens: float32 [K, M] each.

        Args:
            hidden_KMD: the last layer's output of K branches on the same M tokens.
            targets_M: the tokens that follow.
            dense_MD: the dense model's last layer's output on these tokens; None: no divergence.
        """
        num_branches, num_tokens, _ = hidden_KMD.shape
        most = max(1, self.logit_elements // (self.vocab_size * num_branches))
        # All of one size, if possible: a compiler makes a kernel for each.
        step = math.ceil(num_tokens / math.ceil(num_tokens / most))
        parts = [
            self._chunk(hidden_KMD[:, chunk], targets_M[chunk], None if dense_MD is None else dense_MD[chunk])
            for chunk in chunks(num_tokens, step)
        ]
        divergences = [divergence for _, divergence in parts if divergence is not None]
        return torch.cat([nll for nll, _ in parts], dim=1), torch.cat(divergences, dim=1) if divergences else None

    def _chunk(self, hidden_KmD: Tensor, targets_m: Tensor, dense_mD: Tensor | None) -> tuple[Tensor, Tensor | None]:
        num_branches, num_tokens, _ = hidden_KmD.shape
        logits = self.head(hidden_KmD.reshape(num_branches * num_tokens, -1))
        nll_Km = self.nll(logits, targets_m.repeat(num_branches)).view(num_branches, num_tokens)
        if dense_mD is None:
            return nll_Km, None
        assert self.divergence is not None
        logits_KmV = logits.view(num_branches, num_tokens, -1)
        return nll_Km, self.divergence(self.head(dense_mD), logits_KmV)


def chunks(num_tokens: int, chunk_tokens: int) -> Iterator[slice]:
    """Slices that cover `num_tokens` tokens."""
    for start in range(0, num_tokens, chunk_tokens):
        yield slice(start, min(start + chunk_tokens, num_tokens))
