"""What is compiled or runs as a kernel of our own: started early, and with another way where it does not work."""

from __future__ import annotations

import gc
import logging
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._inductor.compile_fx import compile_fx
from torch.nn import functional

from blockpruner.scoring import compiled, kernels, loss
from blockpruner.scoring.build import build_scorer
from blockpruner.scoring.compiled import compiled_divergence, compiled_layer
from blockpruner.scoring.decoder import run_layer
from blockpruner.scoring.metrics import kl_divergence, metric_of
from blockpruner.scoring.settings import MetricName, ScorerSettings
from tests.scorers import row_of
from tests.tiny_models import tiny_model, tiny_token_ids


def test_where_our_loss_kernel_does_not_work_the_plain_loss_takes_its_place(caplog: pytest.LogCaptureFixture) -> None:
    logits_MV, targets_M = torch.randn(5, 8), torch.arange(5)
    tried = kernels._TriedKernel(torch.device("cpu"), torch.float32, 8)
    assert torch.equal(tried(logits_MV, targets_M), loss.token_nll(logits_MV, targets_M))
    assert "going on without our Triton kernel" in caplog.text


def test_a_device_that_is_full_says_nothing_of_our_loss_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last bits are others than the plain loss's: which is taken must not hang on the memory of a moment."""
    full = [True]

    def kernel(logits_MV: Tensor, targets_M: Tensor) -> Tensor:
        if full.pop():
            raise torch.OutOfMemoryError("out of memory")
        return torch.full(targets_M.shape, 7.0)

    monkeypatch.setitem(sys.modules, "blockpruner.scoring.nll_kernel", SimpleNamespace(fused_token_nll=kernel))
    tried = kernels._TriedKernel(torch.device("cpu"), torch.float32, 8)
    tried._trial.join()
    full.append(False)
    assert tried(torch.zeros(2, 8), torch.zeros(2, dtype=torch.long)).tolist() == [7.0, 7.0]


def test_what_cannot_be_compiled_here_runs_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_compiler(*_: object) -> object:
        raise BackendCompilerFailed(None, RuntimeError("no compiler"), None)

    monkeypatch.setattr(torch, "compile", lambda _, **__: no_compiler)
    divergence = compiled_divergence(kl_divergence)
    dense_MV, pruned_MV = torch.randn(3, 7), torch.randn(3, 7)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert torch.equal(divergence(dense_MV, pruned_MV), kl_divergence(dense_MV, pruned_MV))
    assert len(caplog.records) == 1
    assert "torch.compile" in caplog.text


def _compile_with(
    compile_: Callable[..., Any], backend: Callable[..., Any], function: Any, *, dynamic: bool, options: object
) -> Any:
    return compile_(function, backend=backend, dynamic=dynamic)


class Layer(nn.Module):
    """One of many kinds."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + len(self.kind)


# As in a thread that has not imported ours.
@torch._dynamo.config.patch(recompile_limit=8, accumulated_recompile_limit=8)
def test_layers_of_many_kinds_are_compiled_and_each_anew_for_every_size_of_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", partial(_compile_with, torch.compile, backend))
    run = compiled_layer(run_layer)
    for length in range(12):
        run(Layer("a" * length), torch.zeros(2), (), {})
    assert len(graphs) == 12
    for size in (3, 4, 5, 2, 4):
        run(Layer("a"), torch.zeros(size), (), {})
    assert len(graphs) == 12 + 3, "or else what a batch gets depends on the sizes before it"


def begin(settings: ScorerSettings, device: str) -> None:
    kernels.prepare(device, settings, "perplexity", num_layers=32, num_parameters=10**10, num_tokens=10**5)


@pytest.mark.parametrize(
    ("settings", "device", "starts"),
    [
        (ScorerSettings(), "cuda", True),
        (ScorerSettings(), "cuda:1", True),
        (ScorerSettings(compile="off"), "cuda", False),
        (ScorerSettings(compile="on"), "cpu", False),
        (ScorerSettings(), "cpu", False),
        (ScorerSettings(scorer="plain", compile="on"), "cuda", False),
    ],
)
def test_the_compiler_is_started_early_where_it_will_be_used(
    settings: ScorerSettings, device: str, starts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    imported: list[str] = []
    started: list[torch.device] = []

    def module(name: str) -> object:
        imported.append(name)
        return compiled

    monkeypatch.setattr(kernels, "import_module", module)
    monkeypatch.setattr(compiled, "warm_up", started.append)
    begin(settings, device)
    kernels.await_preparation()
    assert imported == (["blockpruner.scoring.compiled"] if starts else [])
    assert started == ([torch.device(device)] if starts else [])


def test_whoever_builds_a_scorer_waits_for_the_compiler_that_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """And meanwhile no garbage is looked for; afterwards it is."""
    seen: list[bool] = []

    def slow(_: torch.device) -> None:
        time.sleep(0.2)
        seen.append(gc.isenabled())

    monkeypatch.setattr(compiled, "warm_up", slow)
    model, tokens = tiny_model(), tiny_token_ids(2, 8)
    begin(ScorerSettings(compile="on"), "cuda")
    build_scorer(row_of(model), model, tokens, "cpu", metric_of("perplexity"), ScorerSettings(compile="on"))
    assert seen == [False]
    assert gc.isenabled()


def test_a_compiler_that_cannot_start_early_is_noted_and_no_more(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(_: torch.device) -> None:
        raise RuntimeError("no compiler")

    uncaught: list[threading.ExceptHookArgs] = []
    monkeypatch.setattr(threading, "excepthook", uncaught.append)
    monkeypatch.setattr(compiled, "warm_up", broken)
    with caplog.at_level(logging.DEBUG, "blockpruner"):
        begin(ScorerSettings(compile="on"), "cuda")
        kernels.await_preparation()
    assert not uncaught
    assert "no compiler" in caplog.text
    assert {record.levelno for record in caplog.records} == {logging.DEBUG}
    assert gc.isenabled()


def test_the_compiler_warms_up_on_a_norm_a_product_and_an_activation(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list[torch.fx.GraphModule] = []
    ran: list[tuple[Tensor, ...]] = []

    def as_it_is(
        graph: torch.fx.GraphModule, inputs: list[Tensor], options: dict[str, object]
    ) -> Callable[..., tuple[Tensor, ...]]:
        assert options == compiled._OPTIONS
        graphs.append(graph)
        return lambda *tensors: ran.append(tensors) or graph(*tensors)

    monkeypatch.setattr(torch._inductor, "compile", as_it_is)
    compiled.warm_up(torch.device("cpu"))
    assert len(ran) == 1, "a kernel is built when it first runs"
    hidden_MD, weight_DD = torch.randn(3, 5), torch.randn(5, 5)
    normed_MD = functional.rms_norm(hidden_MD, (5,), eps=0.0)
    expected_MD = functional.silu(normed_MD @ weight_DD) * hidden_MD
    (active_MD,) = graphs[0](hidden_MD, weight_DD)
    torch.testing.assert_close(active_MD, expected_MD)


def test_the_warm_up_leaves_the_default_dtype_to_whoever_loads_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it but the making of kernels, which takes a C++ compiler ten seconds; `test_gpu` has that too."""
    touched: list[torch.dtype] = []

    def as_it_is(graph: torch.fx.GraphModule, *_: object, **__: object) -> Callable[..., tuple[Tensor, ...]]:
        return lambda tensors: graph(*tensors)

    def without_kernels(graph: torch.fx.GraphModule, inputs: list[Tensor], _: object) -> Callable[..., Any]:
        return compile_fx(graph, inputs, inner_compile=boxed(as_it_is))

    def boxed(make: Callable[..., Any]) -> Callable[..., Any]:
        def inner(*arguments: Any, **settings: Any) -> Any:
            function = make(*arguments, **settings)
            function._boxed_call = True
            return function

        return inner

    monkeypatch.setattr(torch._inductor, "compile", without_kernels)
    monkeypatch.setattr(torch, "set_default_dtype", touched.append)
    compiled.warm_up(torch.device("cpu"))
    assert not touched
    torch.compile(lambda tensor: tensor + 1, backend="eager")(torch.ones(1))
    assert touched, "it would have been seen"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wide_elements", [1, 11, 3 * 11 + 5, 10**6])
def test_the_plain_loss_is_the_cross_entropy_in_float32_however_many_rows_go_together(
    dtype: torch.dtype, wide_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "_WIDE_ELEMENTS", wide_elements)
    monkeypatch.setattr(loss, "_WIDE_ROWS", 1)
    logits_MV, targets_M = 5 * torch.randn(7, 11).to(dtype), torch.arange(7)
    expected_M = functional.cross_entropy(logits_MV.float(), targets_M, reduction="none")
    torch.testing.assert_close(loss.token_nll(logits_MV, targets_M), expected_M)


@pytest.mark.parametrize(
    ("device", "flops", "has_kernel", "compiles"),
    [
        ("cuda", 1e13, False, ()),
        ("cuda", 1e14, True, ()),
        ("cuda", 2e15, True, ("kl", "js")),
        ("cuda", 1e16, True, ("perplexity", "kl", "js")),
        ("cpu", 1e16, False, ()),
    ],
)
def test_our_loss_kernel_pays_for_smaller_models_than_the_compiler(
    device: str, flops: float, has_kernel: bool, compiles: tuple[MetricName, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "find_spec", lambda _: True)
    monkeypatch.setattr(kernels, "_TriedKernel", lambda *_: "ours")
    assert (kernels.nll_for(torch.device(device), torch.float32, 11, flops) == "ours") == has_kernel
    metrics: tuple[MetricName, ...] = ("perplexity", "kl", "js")
    assert tuple(name for name in metrics if kernels.compiles("auto", torch.device(device), flops, name)) == compiles


@pytest.mark.parametrize("metric", ["perplexity", "kl"])
@pytest.mark.parametrize("compiles", [True, False])
def test_a_scorer_is_built_of_what_its_device_metric_and_work_ask_for(
    metric: MetricName, compiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, asked, ran = tiny_model(), [], []

    def decide(*arguments: object) -> bool:
        asked.append(arguments)
        return compiles

    def way(name: str) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            ran.append(name)
            return run_layer(*arguments)

        return run

    def nll_for(*arguments: object) -> Callable[..., Tensor]:
        asked.append(arguments)
        return loss.token_nll

    monkeypatch.setattr(kernels, "compiles", decide)
    monkeypatch.setattr(kernels, "compiled", lambda metric, device: (way(f"compiled {device}"), metric.divergence))
    monkeypatch.setattr(kernels, "uncompiled", lambda device: way(f"uncompiled {device}"))
    monkeypatch.setattr(kernels, "nll_for", nll_for)
    scorers = {}
    for num_sequences in (2, 6):
        tokens = tiny_token_ids(num_sequences, 8)
        settings = ScorerSettings(compile="on")
        scorers[num_sequences] = build_scorer(row_of(model), model, tokens, "cpu", metric_of(metric), settings)
    (*_, two, _), (*_, two_too), (*_, six, _), (*_, six_too) = asked
    assert asked[0] == ("on", torch.device("cpu"), two, metric)
    assert asked[1] == (torch.device("cpu"), torch.float32, model.config.vocab_size, two)
    assert (six, six_too) == (3 * two, 3 * two_too), "the work of all sequences"
    scorers[2].dense_nll()
    assert set(ran) == {"compiled cpu" if compiles else "uncompiled cpu"}


def test_where_compiling_does_not_work_norms_are_fused_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(*_: object) -> object:
        raise BackendCompilerFailed(None, RuntimeError("no compiler"), None)

    monkeypatch.setattr(torch, "compile", lambda _, **__: no_compiler)
    ran: list[object] = []
    monkeypatch.setattr(kernels, "FusedNorms", lambda: lambda *arguments: ran.append(arguments))
    run, _ = kernels.compiled(metric_of("perplexity"), torch.device("cuda"))
    run(nn.Identity(), torch.zeros(1), (), {})
    assert len(ran) == 1


def test_where_the_loss_kernel_does_not_work_the_plain_loss_takes_its_place(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(kernels, "find_spec", lambda _: True)
    monkeypatch.setitem(sys.modules, "blockpruner.scoring.nll_kernel", None)  # as where it cannot be imported
    nll = kernels.nll_for(torch.device("cuda"), torch.float32, 11, flops=1e18)
    logits_MV, targets_M = torch.randn(5, 11), torch.arange(5)
    torch.testing.assert_close(
        nll(logits_MV, targets_M), functional.cross_entropy(logits_MV, targets_M, reduction="none")
    )
    assert "kernel" in caplog.text
    assert len(caplog.records) == 1


def test_the_heads_chunks_are_of_one_size_where_they_can_be() -> None:
    """Each size is compiled anew."""
    sizes: list[int] = []

    def head(hidden_MD: Tensor) -> Tensor:
        sizes.append(len(hidden_MD))
        return hidden_MD

    losses = loss.TokenLosses(head, None, logit_elements=8 * 7, vocab_size=7)
    hidden_KMD, targets_M = torch.randn(1, 18, 7), torch.arange(18) % 7
    nll_KM, _ = losses.of(hidden_KMD, targets_M, None)
    assert sizes == [6, 6, 6], "and not 8, 8, 2"
    torch.testing.assert_close(nll_KM[0], functional.cross_entropy(hidden_KMD[0], targets_M, reduction="none"))
    sizes.clear()
    losses.of(hidden_KMD[:, :17], targets_M[:17], None)
    assert sizes == [6, 6, 5]
