"""What a model must answer: forward passes and perplexity written out by hand, in plain torch.

Reads only tensors (a state dict) and numbers (config.json as a dictionary). Shares no line with transformers and none
with the library under test, so that agreement means something. Slow and plain on purpose: loops over layers, heads and
sequences, whole attention matrices. The forward passes are in `oracle_families.py`, their parts in `oracle_parts.py`.

Shapes: `B` sequences, `T` tokens of a sequence, `V` vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from tests.oracle_families import ORACLES
from tests.oracle_parts import Config, Reader, RemovedBlocks


def oracle_logits(
    tensors: Mapping[str, Tensor],
    config: Config,
    token_ids_BT: Tensor,
    removed: RemovedBlocks = frozenset(),
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The logits [B, T, V] of a model without the removed blocks.

    Args:
        tensors: the model's state dict, by the names of a checkpoint.
        config: its configuration; `model_type` picks the row of `ORACLES`.
        token_ids_BT: token ids [B, T] without padding (give a padded row alone, without its pads).
        removed: the blocks to leave out; nothing of them is read.
        dtype: float32 or float64; all arithmetic is done in it.
    """
    read = Reader(tensors, dtype)
    forward = ORACLES[config["model_type"]]
    return torch.stack([forward(read, config, token_ids_T, removed) for token_ids_T in token_ids_BT])


def oracle_sequence_nll(logits_BTV: Tensor, token_ids_BT: Tensor) -> Tensor:
    """Each sequence's mean negative log-likelihood per predicted token, in nats: float64 [B]."""
    means = []
    for logits_TV, token_ids_T in zip(logits_BTV.double(), token_ids_BT.tolist(), strict=True):
        nats = []
        for position, next_token in enumerate(token_ids_T[1:]):
            scores_V = logits_TV[position] - logits_TV[position].max()
            nats.append(math.log(float(scores_V.exp().sum())) - float(scores_V[next_token]))
        means.append(math.fsum(nats) / len(nats))
    return torch.tensor(means, dtype=torch.float64)


def oracle_divergence(dense_BTV: Tensor, pruned_BTV: Tensor, metric: str) -> Tensor:
    """Each sequence's mean divergence over the tokens that predict another, in nats: float64 [B].

    Args:
        dense_BTV: logits of the dense model [B, T, V], whose predictions are P.
        pruned_BTV: logits of the pruned one, whose predictions are Q.
        metric: 'kl' (of P from Q), or 'js' (the mean of what P and what Q diverge from their mean).
    """
    means = []
    for dense_TV, pruned_TV in zip(dense_BTV.double(), pruned_BTV.double(), strict=True):
        nats = []
        for dense_V, pruned_V in zip(dense_TV[:-1].softmax(-1), pruned_TV[:-1].softmax(-1), strict=True):
            p, q = dense_V.tolist(), pruned_V.tolist()
            middle = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
            nats.append(_divergence(p, q) if metric == "kl" else (_divergence(p, middle) + _divergence(q, middle)) / 2)
        means.append(math.fsum(nats) / len(nats))
    return torch.tensor(means, dtype=torch.float64)


def _divergence(p: list[float], q: list[float]) -> float:
    return math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def oracle_perplexity(nll_B: Tensor) -> float:
    """exp of the mean over sequences of each sequence's mean token NLL."""
    return math.exp(math.fsum(nll_B.tolist()) / len(nll_B))
