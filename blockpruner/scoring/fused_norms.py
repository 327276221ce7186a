"""RMS norms as PyTorch's one kernel, where layers are not compiled.

Model code writes an RMS norm as half a dozen operations in float32, each of which reads and writes the whole stream: on
a GPU nine times the memory traffic of the norm itself, and most of what compiling layers saves. A norm is known by what
it computes, not by its name: a module is replaced if it gives what PyTorch's operation gives. Gemma's norms, which
multiply by one more than the weight, and layer norms are none.

Shapes: `N` sequences of `T` tokens, `D` what a norm goes over.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from blockpruner.scoring.decoder import run_layer


class FusedNorms:
    """A `RunLayer` that runs layers as they are but for their RMS norms. No layer is changed; it calls views of them.

    Each result is rounded once, as it is where layers are compiled; the model's own code rounds before the weight too.
    """

    def __init__(self) -> None:
        """Begin without views; each layer's is made when it first runs, and its weights are there."""
        self._views: dict[nn.Module, nn.Module] = {}

    def __call__(self, layer: nn.Module, hidden_NTD: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """See `RunLayer`."""
        if layer not in self._views:
            self._views[layer] = with_fused_norms(layer)
        return run_layer(self._views[layer], hidden_NTD, args, kwargs)


class FusedRMSNorm(nn.Module):
    """Stands in for an RMS norm over the last dimension."""

    def __init__(self, norm: nn.Module, weight: nn.Parameter, eps: float) -> None:
        """Take the place of `norm`; its `weight` [D] is shared."""
        super().__init__()
        self.norm = norm
        self.weight = weight
        self.eps = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        """x / sqrt(mean(x^2) + eps) * weight, of [..., D]; of another dtype or width the norm's own result."""
        if hidden_states.dtype != self.weight.dtype or hidden_states.shape[-1:] != self.weight.shape:
            result: Tensor = self.norm(hidden_states)
            return result
        return functional.rms_norm(hidden_states, self.weight.shape, self.weight, self.eps)


def with_fused_norms(module: nn.Module) -> nn.Module:
    """A view of a module with fused norms in it, or in its place; the module itself where there is no RMS norm."""
    fused = _fused(module)
    if fused is not None:
        return fused
    children = {name: with_fused_norms(child) for name, child in module._modules.items() if child is not None}
    if all(child is module._modules[name] for name, child in children.items()):
        return module
    view = copy.copy(module)
    view._modules = {**module._modules, **children}
    return view


def _fused(norm: nn.Module) -> FusedRMSNorm | None:
    """What can stand in for an RMS norm with a weight; None for any other module, and for one that is hooked."""
    own = vars(norm)
    eps = own.get("variance_epsilon", own.get("eps"))
    parameters = dict(norm.named_parameters())
    weight = parameters.get("weight")
    is_hooked = bool(norm._forward_pre_hooks or norm._forward_hooks or "forward" in own)
    if not isinstance(eps, float) or weight is None or len(parameters) > 1 or weight.dim() != 1 or is_hooked:
        return None
    takes_more = len(inspect.signature(norm.forward).parameters) > 1  # a gate, say, if only where there is one
    return None if takes_more or not _is_rms_norm(norm, weight, eps) else FusedRMSNorm(norm, weight, eps)


@torch.inference_mode()
def _is_rms_norm(norm: nn.Module, weight: Tensor, eps: float) -> bool:
    """Whether a module gives the RMS norm, in float32, and its own dtype for its own dtype.

    Asked with numbers [1, 2, D] that have a mean, and with some as small as eps.
    """
    wave_D = torch.sin(torch.arange(weight.numel(), dtype=torch.float32, device=weight.device)) + 0.5
    probe_12D = torch.stack((wave_D, wave_D * eps**0.5))[None]
    try:
        wide, own = copy.deepcopy(norm).float()(probe_12D), norm(probe_12D.to(weight.dtype))
    except Exception:  # noqa: BLE001  # made for other input: no RMS norm, whatever it is
        return False
    if not isinstance(wide, Tensor) or own.dtype != weight.dtype:
        return False
    expected_12D = functional.rms_norm(probe_12D, weight.shape, weight.float(), eps)
    atol = 1e-6 * float(weight.abs().max())
    return wide.shape == expected_12D.shape and torch.allclose(wide, expected_12D, rtol=1e-4, atol=atol)
