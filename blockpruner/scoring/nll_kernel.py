"""Token losses on a GPU in one reading of the logits: a Triton kernel. Triton comes with PyTorch's GPU builds.

PyTorch's own operations, compiled or not, read the logits more than once; with a vocabulary of 128k the head is a
third of a small model's work, and reading its logits is what it waits for.

Shapes: `V` vocabulary, `M` tokens.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_LANES = 1024
_WIDE = 8
_WARPS = 8
"""Logits that a program takes at a time: in each of so many lanes as many as one load brings, in two bytes each. Of 24
choices on an H200 the quickest with a vocabulary of 128k, 0.360 ms for 6141 tokens where a sum over the logits takes as
long, and within two per cent of the quickest with 32k (2026-11-28).
"""
_LOWEST = -3.0e38
"""Below any logit, and finite: where all logits so far are -inf the sum of exponentials must be 0, not NaN."""


@triton.jit  # type: ignore[untyped-decorator]
def _nll_kernel(  # type: ignore[no-untyped-def]
    logits,
    targets,
    losses,
    row_stride,
    lowest,
    vocab_size: tl.constexpr,
    lanes: tl.constexpr,
    wide: tl.constexpr,
):
    """One row of logits for each program: log of the sum of exponentials, kept relative to the largest so far.

    Each lane keeps its own, so that threads wait for each other only once, at the end.
    """
    row = tl.program_id(0).to(tl.int64)
    row_logits = logits + row * row_stride
    tile = tl.arange(0, lanes)[:, None] * wide + tl.arange(0, wide)[None, :]
    largest, total = tl.full([lanes], lowest, tl.float32), tl.zeros([lanes], tl.float32)
    for start in range(0, vocab_size, lanes * wide):
        columns = start + tile
        values = tl.load(row_logits + columns, mask=columns < vocab_size, other=float("-inf")).to(tl.float32)
        largest_now = tl.maximum(largest, tl.max(values, axis=1))
        total = total * tl.exp(largest - largest_now) + tl.sum(tl.exp(values - largest_now[:, None]), axis=1)
        largest = largest_now
    largest_of_all = tl.max(largest, axis=0)
    total_of_all = tl.sum(total * tl.exp(largest - largest_of_all), axis=0)
    target = tl.load(row_logits + tl.load(targets + row)).to(tl.float32)
    tl.store(losses + row, largest_of_all + tl.log(total_of_all) - target)


def fused_token_nll(logits_MV: Tensor, targets_M: Tensor) -> Tensor:
    """`loss.token_nll` of logits on a GPU: float32 [M], nats."""
    num_tokens, vocab_size = logits_MV.shape
    losses_M = torch.empty(num_tokens, dtype=torch.float32, device=logits_MV.device)
    if num_tokens > 0:
        logits_MV = logits_MV if logits_MV.stride(1) == 1 else logits_MV.contiguous()
        sizes = {"vocab_size": vocab_size, "lanes": _LANES, "wide": _WIDE, "num_warps": _WARPS}
        with torch.cuda.device(logits_MV.device):  # Triton launches on the current device, wherever the tensors are
            _nll_kernel[(num_tokens,)](logits_MV, targets_M, losses_M, logits_MV.stride(0), _LOWEST, **sizes)
    return losses_M
