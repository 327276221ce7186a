"""torch.compile for the parts of a sweep that are bound by memory: norms, rotary positions, activations, divergences.

Matrix products stay with the vendor's library. One compiled function serves all layers of a kind, for one batch size.
The compiler's way, one function for all sizes from the second on, would make the last bits depend on which sizes came
first: a search that is gone on with meets them in another order.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from typing import Any, TypeVar, cast

import torch
import torch._dynamo.config
import torch._inductor.compile_fx  # torch.compile imports it when first called; `kernels.prepare` wants it before
from torch import fx, nn
from torch._dynamo.exc import TorchDynamoException

from blockpruner.errors import one_line
from blockpruner.scoring.decoder import RunLayer, run_layer
from blockpruner.scoring.metrics import Divergence

logger = logging.getLogger(__name__)

_OPTIONS: dict[str, str | int | bool | Callable[..., Any]] = {
    # A search compiles a handful of kernels; to start the compiler's worker processes takes longer than to compile
    # them here: 7 s of start-up in place of 11 (1B, H200, 2026-11-24).
    "compile_threads": 1,
    # To read the patterns and to try other sizes of blocks takes a second more than it saved there (2026-11-28).
    "pattern_matcher": False,
    "triton.autotune_pointwise": False,
    # Of the ways to add up a long row, the compiler times two and takes the quicker: another process may find the other
    # quicker, and has other last bits then.
    "deterministic": True,
}

_VARIANTS = 1024
"""Of one function, at most. Layers differ in their kind of attention and in what is bypassed, batches in size: with the
compiler's own limits of 8 and 256 whatever comes later would run uncompiled, without a word and with other last bits.
"""

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled_layer(otherwise: RunLayer) -> RunLayer:
    """`run_layer`, compiled for the layers that it meets; `otherwise` where that does not work."""
    return _with_fallback(cast(RunLayer, run_layer), otherwise)


def compiled_divergence(divergence: Divergence) -> Divergence:
    """A metric's divergence, compiled: the logits are read, and nothing of their size is written."""
    return _with_fallback(divergence, divergence)


@torch.inference_mode()
def warm_up(device: torch.device) -> None:
    """Compile and run something small: the compiler's first graph takes it seconds that are not the graph's.

    Of the 3.3 s of a first layer, 1.6 s (H200, 2026-11-28). Can run while a model is loaded: goes past the part of
    torch.compile that sets torch's default dtype back when it is done, which whoever loads a model has changed. In
    other threads it sets the state of torch's own random numbers back, and for a moment of it modules cannot be called:
    the compiler traces a function of its own, and fx then takes every module for that function's.

    Raises:
        Exception: whatever the compiler raises where it does not work.
    """
    with suppress(ImportError):  # a PyTorch without it does without it
        import_module("torch.distributed.tensor.experimental")  # torch.compile imports it for its first function
    hidden_MD = torch.zeros((64, 1024), dtype=torch.float16, device=device)
    weight_DD = torch.zeros((1024, 1024), dtype=torch.float16, device=device)
    torch._inductor.compile(_small_graph(), [hidden_MD, weight_DD], _OPTIONS)(hidden_MD, weight_DD)


def _small_graph() -> fx.GraphModule:
    """A norm, a matrix product and an activation of hidden [M, D] and weight [D, D].

    Put together by hand, to trace no more than the compiler does.
    """
    graph = fx.Graph()
    hidden, weight = graph.placeholder("hidden_MD"), graph.placeholder("weight_DD")
    wide = graph.call_method("float", (hidden,))
    mean_square = graph.call_method("mean", (graph.call_function(torch.square, (wide,)), -1, True))
    scale = graph.call_function(torch.rsqrt, (mean_square,))
    normed = graph.call_method("type_as", (graph.call_function(torch.mul, (wide, scale)), hidden))
    product = graph.call_function(torch.matmul, (normed, weight))
    active = graph.call_function(nn.functional.silu, (product,))
    graph.output((graph.call_function(torch.mul, (active, hidden)),))
    return fx.GraphModule(nn.Module(), graph)


def _with_fallback(function: Function, otherwise: Function) -> Function:
    """The compiled function; another one from when it cannot be compiled on this machine.

    For the thread that asks for it: from torch 2.13 on the limits of variants are a thread's own.
    """
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, _VARIANTS)
    limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, _VARIANTS)
    compiled = cast(Function, torch.compile(function, dynamic=False, options=_OPTIONS))
    works = True

    def call(*arguments: Any) -> Any:
        nonlocal works
        if works:
            try:
                return compiled(*arguments)
            except TorchDynamoException as error:
                works = False
                logger.warning(
                    "going on without torch.compile, which does not work on this machine: %s", one_line(error)
                )
        return otherwise(*arguments)

    return cast(Function, call)
