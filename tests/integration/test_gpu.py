"""On a GPU every way to compute gives the plain scorer's scores. Run it with `pytest --gpu` and this file's path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor.runtime.triton_heuristics import CachingAutotuner
from torch._inductor.utils import fresh_cache

from blockpruner.blocks import Block, all_blocks, mha, mlp
from blockpruner.checkpoint import Checkpoint
from blockpruner.loading import DtypeName, load_model, release_memory
from blockpruner.scoring import kernels
from blockpruner.scoring.build import build_scorer, device_memory
from blockpruner.scoring.compiled import warm_up
from blockpruner.scoring.interface import SurveyScorer
from blockpruner.scoring.kernels import nll_for
from blockpruner.scoring.loss import token_nll
from blockpruner.scoring.metrics import metric_of
from blockpruner.scoring.noise import noise_nats
from blockpruner.scoring.plan import SweepCut, SweepPlan
from blockpruner.scoring.settings import CompileChoice, MetricName, ScorerSettings
from blockpruner.scoring.sweep import SweepScorer
from blockpruner.scoring.table import ScoreTable
from tests.scorers import filled, row_of
from tests.tiny_models import save_tiny_model, tiny_model, tiny_token_ids

pytestmark = pytest.mark.gpu

NOISE_NATS: dict[DtypeName, float] = {"float32": 1e-5, "bfloat16": 2e-3}
CUT = SweepCut(micro_batch=5, branches_per_chunk=2, logit_elements=2**16)
"""Batches of several sizes, and not of many: each is compiled for itself."""
BLOCKS = all_blocks(8)
SEARCH: tuple[tuple[Block, ...], ...] = ((), (mha(6),), (mha(6), mlp(3)))
"""The removed blocks of three steps."""


@pytest.fixture(autouse=True)
def _memory() -> None:
    """Give back what other tests' models took, and forget what was compiled for them."""
    torch.compiler.reset()
    release_memory()


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return tiny_token_ids(16, 128, seed=3)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = Path(tmp_path_factory.mktemp("gpu"))
    return Checkpoint.open(str(save_tiny_model(folder / "model", num_hidden_layers=8, hidden_size=64)))


def tables(
    checkpoint: Checkpoint, tokens: Tensor, dtype: DtypeName, metric: MetricName, *, on: str = "cuda", **settings: Any
) -> tuple[list[ScoreTable], Any]:
    """Three steps of a search; with `on='cpu'` the weights are streamed."""
    plan = settings.pop("plan", None)
    model = load_model(checkpoint, device=on, dtype=dtype)
    choices = ScorerSettings(**{"compile": "off", **settings})
    scorer = build_scorer(row_of(model), model, tokens, "cuda", metric_of(metric), choices, cut=CUT)
    if plan is not None:
        assert isinstance(scorer, SweepScorer)
        scorer.use(plan)
    return [filled(scorer, gone, [block for block in BLOCKS if block not in gone]) for gone in SEARCH], scorer


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("metric", ["perplexity", "kl", "js"])
@pytest.mark.parametrize("way", ["resident", "streamed", "host snapshots", "compiled"])
def test_scores_are_those_of_the_plain_scorer(
    checkpoint: Checkpoint, tokens: Tensor, dtype: DtypeName, metric: MetricName, way: str
) -> None:
    settings: dict[str, Any] = {
        "resident": {},
        "streamed": {"on": "cpu"},
        "host snapshots": {"on": "cpu", "plan": SweepPlan(CUT, 2**28, snapshots_on_host=True)},
        "compiled": {"compile": "on"},
    }[way]
    expected, _ = tables(checkpoint, tokens, dtype, metric, scorer="plain")
    found, scorer = tables(checkpoint, tokens, dtype, metric, **settings)
    for mine, theirs in zip(found, expected, strict=True):
        means = [(table.nll_CB.mean(1), table.divergence_CB.mean(1)) for table in (mine, theirs)]
        for a_C, b_C in zip(*means, strict=True):
            torch.testing.assert_close(a_C, b_C, rtol=0, atol=NOISE_NATS[dtype], equal_nan=True)
    assert scorer.meter.flops_saved > 0


@pytest.mark.parametrize("family", ["gemma2", "qwen3", "mixtral", "qwen2_moe", "qwen3_moe"])
def test_a_familys_scores_move_by_half_its_noise_at_most(tokens: Tensor, family: str) -> None:
    found = []
    for settings in (ScorerSettings(scorer="plain"), ScorerSettings(compile="off")):
        model = tiny_model(family).to(device="cuda", dtype=torch.bfloat16)
        cut = None if settings.scorer == "plain" else CUT
        scorer = build_scorer(row_of(model), model, tokens, "cuda", metric_of("perplexity"), settings, cut=cut)
        found.append(filled(scorer, (), all_blocks(4)).nll_CB.mean(dim=1))
    assert float((found[0] - found[1]).abs().max()) <= noise_nats(model, "bfloat16") / 2


def test_a_budget_is_kept_and_given_back(checkpoint: Checkpoint, tokens: Tensor) -> None:
    budget = 256 * 2**20
    torch.cuda.reset_peak_memory_stats()
    with device_memory("cuda", budget):
        found, _ = tables(checkpoint, tokens, "float32", "perplexity", memory_budget=budget)
        assert torch.cuda.max_memory_reserved() <= budget
    expected, _ = tables(checkpoint, tokens, "float32", "perplexity", scorer="plain")
    torch.testing.assert_close(found[0].nll_CB, expected[0].nll_CB, rtol=0, atol=1e-5)
    torch.empty(2 * budget, dtype=torch.uint8, device="cuda")  # the cap is gone


def test_running_out_of_memory_changes_no_score(checkpoint: Checkpoint, tokens: Tensor) -> None:
    expected, _ = tables(checkpoint, tokens, "float32", "kl", scorer="plain")
    greedy = SweepPlan(SweepCut(micro_batch=16, branches_per_chunk=100, logit_elements=2**34), 2**40)
    budget = 128 * 2**20
    with device_memory("cuda", budget):
        found, scorer = tables(checkpoint, tokens, "float32", "kl", plan=greedy, memory_budget=budget)
    assert scorer.plan != greedy
    torch.testing.assert_close(found[2].divergence_CB, expected[2].divergence_CB, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab_size", [100, 8191, 8193, 32003])
def test_the_loss_kernel_gives_the_plain_loss(dtype: torch.dtype, vocab_size: int) -> None:
    from blockpruner.scoring.nll_kernel import fused_token_nll  # where there is no GPU there is no Triton

    generator = torch.Generator("cuda").manual_seed(vocab_size)
    logits_MV = (20 * torch.randn(64, vocab_size, generator=generator, device="cuda")).to(dtype)
    targets_M = torch.randint(vocab_size, (64,), generator=generator, device="cuda")
    logits_MV[0, : vocab_size // 2] = -torch.inf  # words that a model rules out
    logits_MV[1, 7], logits_MV[2, -2] = torch.nan, torch.inf
    targets_M[:3] = vocab_size - 1
    expected_M = token_nll(logits_MV, targets_M)
    assert not expected_M[1:3].isfinite().any()
    torch.testing.assert_close(fused_token_nll(logits_MV, targets_M), expected_M, rtol=1e-6, atol=1e-5, equal_nan=True)
    tried = nll_for(torch.device("cuda"), dtype, vocab_size, flops=1e18)
    assert torch.equal(tried(logits_MV[3:], targets_M[3:]), fused_token_nll(logits_MV[3:], targets_M[3:]))
    strided_MV = logits_MV.t().contiguous().t()
    torch.testing.assert_close(fused_token_nll(strided_MV, targets_M), expected_M, rtol=1e-6, atol=1e-5, equal_nan=True)


def test_a_compiled_search_that_is_gone_on_with_gives_the_same_bits(checkpoint: Checkpoint, tokens: Tensor) -> None:
    """Whoever goes on meets batches in another order of sizes, and the compiler makes what it meets first for that."""
    model = load_model(checkpoint, device="cuda", dtype="bfloat16")

    def scorer() -> SurveyScorer:
        torch.compiler.reset()
        settings = ScorerSettings(compile="on")
        return build_scorer(row_of(model), model, tokens, "cuda", metric_of("kl"), settings, cut=CUT)

    whole = scorer()
    for removed, num_done in zip(SEARCH, (5, 0, 15), strict=True):  # sequences of the step that were scored before
        candidates = [block for block in BLOCKS if block not in removed]
        expected = filled(whole, removed, candidates)
        table, done = ScoreTable.empty(candidates, len(tokens)), slice(0, num_done)
        table.fill(slice(None), done, expected.nll_CB[:, done], expected.divergence_CB[:, done])
        scorer().fill(removed, table, lambda _: None)
        assert torch.equal(table.nll_CB, expected.nll_CB)
        assert torch.equal(table.divergence_CB, expected.divergence_CB)


def test_no_compiled_kernel_is_chosen_by_timing(tokens: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process may find another kernel quicker, and would have other last bits."""
    timed: list[str] = []

    def time_all(self: CachingAutotuner, *arguments: Any, **keywords: Any) -> Any:
        timed.append(self.fn.__name__)
        return benchmark(self, *arguments, **keywords)

    benchmark = CachingAutotuner.benchmark_all_configs
    monkeypatch.setattr(CachingAutotuner, "benchmark_all_configs", time_all)
    wide = tiny_model(hidden_size=4096, num_attention_heads=32, num_hidden_layers=2)  # of a short row only one is tried
    model = wide.to(device="cuda", dtype=torch.bfloat16)
    settings = ScorerSettings(compile="on")
    with fresh_cache():
        scorer = build_scorer(row_of(model), model, tokens, "cuda", metric_of("kl"), settings, cut=CUT)
        filled(scorer, (), all_blocks(2))
        assert counters["inductor"]["fxgraph_cache_miss"] > 0
    assert not timed


def test_the_compilers_warm_up_leaves_the_default_dtype_to_whoever_loads_a_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    touched: list[torch.dtype] = []
    monkeypatch.setattr(torch, "set_default_dtype", touched.append)
    warm_up(torch.device("cuda"))
    assert not touched


@pytest.mark.skipif("torch.cuda.device_count() < 2")
@pytest.mark.parametrize("choice", ["off", "on"])
def test_a_gpu_that_is_not_the_first_gives_the_same_scores(
    checkpoint: Checkpoint, tokens: Tensor, choice: CompileChoice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "_WORTH_FLOPS", 0.0)
    monkeypatch.setattr(kernels, "_KERNEL_WORTH_FLOPS", 0.0)
    found = []
    for device in ("cuda:0", "cuda:1"):
        model = load_model(checkpoint, device=device, dtype="bfloat16")
        scorer = build_scorer(
            row_of(model), model, tokens, device, metric_of("kl"), ScorerSettings(compile=choice), cut=CUT
        )
        found.append(filled(scorer, (), BLOCKS))
        assert torch.cuda.current_device() == 0
    assert torch.equal(found[0].nll_CB, found[1].nll_CB)
    assert torch.equal(found[0].divergence_CB, found[1].divergence_CB)
