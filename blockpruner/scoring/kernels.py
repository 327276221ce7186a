"""Which parts of a sweep are compiled or run as kernels of our own, and how these are made ready early.

Decides by how much work a sweep is. The compiler, and Triton with it, are imported only where they are used.
"""

from __future__ import annotations

import gc
import logging
from importlib import import_module
from importlib.util import find_spec
from threading import Thread

import torch
from torch import Tensor

from blockpruner.errors import one_line
from blockpruner.scoring.decoder import RunLayer, run_layer
from blockpruner.scoring.fused_norms import FusedNorms
from blockpruner.scoring.loss import NLL, token_nll
from blockpruner.scoring.metrics import Divergence, Metric
from blockpruner.scoring.settings import CompileChoice, MetricName, ScorerSettings

logger = logging.getLogger(__name__)

_WORTH_FLOPS = 3e15
"""Work of one sweep from which compiling pays: seconds of start-up, 4 to 8, against a few per cent of every sweep. A
search of eight sweeps of 1.8e15 took 22 to 27 s with it, and 21 s without (H200, 2026-11-28)."""
_DIVERGENCE_WORTH_FLOPS = 1e15
"""The same where there is a divergence to compile, which uncompiled goes over all logits again and again: a sweep of
1.8e15 with KL takes 5.9 s compiled and 8.3 s not (H200, 2026-11-28)."""
_KERNEL_WORTH_FLOPS = 2e13
"""Of one from which our loss kernel pays, which is built beside the first: of the 0.54 s of a sweep of 7e13 the plain
loss took 0.05 (H200, 2026-11-28)."""


_preparing: list[Thread] = []


def prepare(
    device: str,
    settings: ScorerSettings,
    metric: MetricName,
    *,
    num_layers: int,
    num_parameters: int,
    num_tokens: int,
) -> None:
    """Begin to start the compiler, if a scorer on a GPU will want it: seconds, in which a model can load.

    Not for a CPU: it would take a C++ compiler ten seconds there, and who asks for it loads a small model.

    Compiles none of the model: what does sets torch's default dtype back when it is done, and a model that is being
    loaded sets it too. Until it is done no module may be called (see `compiled.warm_up`), which transformers' own
    loading does not do; whoever compiles, measures or runs the model calls `await_preparation` first.

    Args:
        device: where the scorer will compute.
        settings: how it will compute.
        metric: what it will judge by.
        num_layers: decoder layers of the model.
        num_parameters: of the whole model.
        num_tokens: of the calibration set.
    """
    flops, where = float(2 * num_layers + 1) * num_parameters * num_tokens, torch.device(device)
    if settings.scorer == "sweep" and where.type == "cuda" and compiles(settings.compile, where, flops, metric):
        thread = Thread(target=_start_compiler, args=(where,))
        thread.start()
        _preparing.append(thread)


def await_preparation() -> None:
    """Wait until what `prepare` began is done: it would disturb what is compiled or measured meanwhile."""
    for thread in tuple(_preparing):
        thread.join()
        _preparing.remove(thread)


def compiles(choice: CompileChoice, device: torch.device, flops: float, metric: MetricName) -> bool:
    """Whether layers, and the metric's divergence, are compiled for sweeps of so much work."""
    if choice == "auto":
        worth = _WORTH_FLOPS if metric == "perplexity" else _DIVERGENCE_WORTH_FLOPS
        return device.type == "cuda" and flops > worth
    return choice == "on"


def compiled(metric: Metric, device: torch.device) -> tuple[RunLayer, Divergence | None]:
    """What calls a layer, and the metric's divergence, both compiled."""
    from blockpruner.scoring.compiled import compiled_divergence, compiled_layer  # importing the compiler takes seconds

    return compiled_layer(uncompiled(device)), compiled_divergence(metric.divergence) if metric.divergence else None


def uncompiled(device: torch.device) -> RunLayer:
    """What calls a layer on this device where none is compiled."""
    return FusedNorms() if device.type == "cuda" else run_layer


def nll_for(device: torch.device, dtype: torch.dtype, vocab_size: int, flops: float) -> NLL:
    """The token losses of logits on this device, for sweeps of so much work."""
    has_kernel = device.type == "cuda" and flops > _KERNEL_WORTH_FLOPS and find_spec("triton") is not None
    return _TriedKernel(device, dtype, vocab_size) if has_kernel else token_nll


class _TriedKernel:
    """Our loss kernel, tried on one token in a thread while the first layers run; the plain loss where it fails.

    It fails where there is no C compiler, for one: Triton builds a small module with it on a machine's first use.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, vocab_size: int) -> None:
        """Begin to try it."""
        self._nll: NLL = token_nll
        self._trial = Thread(target=self._try, args=(device, dtype, vocab_size))
        self._trial.start()

    def __call__(self, logits_MV: Tensor, targets_M: Tensor) -> Tensor:
        """See `NLL`."""
        self._trial.join()
        return self._nll(logits_MV, targets_M)

    def _try(self, device: torch.device, dtype: torch.dtype, vocab_size: int) -> None:
        try:
            from blockpruner.scoring.nll_kernel import fused_token_nll

            self._nll = fused_token_nll
            logits_MV = torch.zeros((1, vocab_size), dtype=dtype, device=device)
            fused_token_nll(logits_MV, torch.zeros(1, dtype=torch.long, device=device))
        except torch.OutOfMemoryError:  # says nothing of the kernel; the sweep will have its own answer to it
            return
        except Exception as error:  # noqa: BLE001  (compiler, linker, driver: whatever fails, there is another way)
            self._nll = token_nll
            logger.warning(
                "going on without our Triton kernel, which does not work on this machine: %s", one_line(error)
            )


def _start_compiler(device: torch.device) -> None:
    """Import the compiler and let it do once what it does once, the start of Triton included."""
    collects = gc.isenabled()
    # Half a million objects come to stay: to look through them for garbage again and again is a fifth of the time.
    gc.disable()
    try:
        import_module("blockpruner.scoring.compiled").warm_up(device)
    except Exception:  # whoever needs it meets the same error, and says so
        logger.debug("the compiler did not start early", exc_info=True)
    finally:
        if collects:
            gc.enable()
