"""Perplexity of a causal LM on token ids, as the paper counts it. Knows no masking and no files.

Shapes: `B` sequences, `T` tokens of a sequence, `V` vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from blockpruner.progress import Progress, ProgressCallback, silent

_LOGIT_BUDGET = 2**24
"""Logits of one forward pass at most (64 MiB in float32) where the batch size is ours to choose."""


def sequence_nll(
    model: PreTrainedModel, token_ids_BT: Tensor, batch_size: int | None = None, progress: ProgressCallback = silent
) -> Tensor:
    """Each sequence's mean negative log-likelihood per predicted token, in nats.

    Args:
        model: a causal LM in eval mode.
        token_ids_BT: token ids [B, T], T at least 2; on any device.
        batch_size: sequences in one forward pass; None chooses by the size of the logits.
        progress: told after every batch.

    Returns:
        float64 [B] on the CPU; sums over tokens are taken in float64.
    """
    num_sequences, sequence_length = token_ids_BT.shape
    step = batch_size or default_batch_size(sequence_length, model.config.get_text_config().vocab_size)
    parts = []
    for start in range(0, num_sequences, step):
        parts.append(batch_nll(model, token_ids_BT[start : start + step]))
        progress(Progress(min(start + step, num_sequences), num_sequences, "sequences"))
    return torch.cat(parts)


def default_batch_size(sequence_length: int, vocab_size: int) -> int:
    """Sequences whose logits fit the budget; at least one."""
    return max(1, _LOGIT_BUDGET // (sequence_length * vocab_size))


@torch.inference_mode()
def batch_nll(model: PreTrainedModel, token_ids_BT: Tensor) -> Tensor:
    """`sequence_nll` of one batch in one forward pass: float64 [B] on the CPU."""
    token_ids_BT = token_ids_BT.to(model.device)
    return mean_token_nll(batch_logits(model, token_ids_BT), token_ids_BT).cpu()


def batch_logits(model: PreTrainedModel, token_ids_BT: Tensor) -> Tensor:
    """The logits [B, T, V] of one full forward pass, in the model's dtype."""
    logits_BTV: Tensor = model(input_ids=token_ids_BT, use_cache=False).logits
    return logits_BTV


def mean_token_nll(logits_BTV: Tensor, token_ids_BT: Tensor) -> Tensor:
    """Each sequence's mean NLL per predicted token from its logits: float64 [B]."""
    token_nll = [
        functional.cross_entropy(logits_TV[:-1].float(), token_ids_T[1:], reduction="none")
        for logits_TV, token_ids_T in zip(logits_BTV, token_ids_BT, strict=True)
    ]
    return torch.stack(token_nll).double().mean(dim=1)


def perplexity(nll_B: Tensor) -> float:
    """exp of the mean over sequences of each sequence's mean token NLL.

    This is the paper's importance (Zhong et al. 2025, section 3.2) and the number of its tables. Overflow gives inf.

    Args:
        nll_B: float64 [B], nats per token.
    """
    mean = float(nll_B.double().mean())
    try:
        return math.exp(mean)
    except OverflowError:
        return math.inf
