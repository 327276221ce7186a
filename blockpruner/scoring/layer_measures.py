"""How much a layer does, from its input and its output alone: what needs one pass and no removal.

Shapes: `N` sequences, `T` tokens, `D` hidden.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional

LayerMeasure = Callable[[Tensor, Tensor], Tensor]
"""(input [N, T, D], output [N, T, D]) of a layer -> float64 [N], the mean over each sequence's tokens; low: does
little."""


def block_influence(input_NTD: Tensor, output_NTD: Tensor) -> Tensor:
    """Block Influence (Men et al. 2024, ShortGPT, eq. 1): 1 - E[x . y / (|x| |y|)], of a layer that makes y of x."""
    cosine_NT = functional.cosine_similarity(input_NTD.float(), output_NTD.float(), dim=-1)
    return 1.0 - cosine_NT.double().mean(dim=1)


def relative_magnitude(input_NTD: Tensor, output_NTD: Tensor) -> Tensor:
    """Relative magnitude (Samragh et al. 2023; the baseline RM of ShortGPT): E[|f(x)| / |x + f(x)|].

    f is what a layer adds to the stream: its output, x + f(x), less its input.
    """
    output_NTD = output_NTD.float()
    added_NT = (output_NTD - input_NTD.float()).norm(dim=-1)
    magnitude_NT: Tensor = added_NT / output_NTD.norm(dim=-1)
    return magnitude_NT.double().mean(dim=1)
