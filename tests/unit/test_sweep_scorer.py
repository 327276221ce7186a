"""The sweep against the plain scorer, which other tests hold against a forward written out by hand."""

from __future__ import annotations

import random
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from blockpruner.blocks import Block, all_blocks, mha, mlp
from blockpruner.errors import ConfigurationError
from blockpruner.scoring.build import build_scorer
from blockpruner.scoring.decoder import Decoder, run_layer
from blockpruner.scoring.metrics import metric_of
from blockpruner.scoring.plan import SweepPlan, Team
from blockpruner.scoring.settings import MetricName, ScorerSettings
from blockpruner.scoring.sweep import SweepScorer, ranking
from blockpruner.scoring.table import ScoreTable
from tests.scorers import filled, plain_scorer, row_of, sweep_scorer
from tests.tiny_models import TINY_FAMILIES, tiny_model, tiny_token_ids

NUM_SEQUENCES, SEQUENCE_LENGTH = 5, 12
TOKENS = tiny_token_ids(NUM_SEQUENCES, SEQUENCE_LENGTH, seed=1)


@pytest.mark.parametrize("family", sorted(TINY_FAMILIES))
@pytest.mark.parametrize(("micro_batch", "branches_per_chunk"), [(1, 1), (3, 2), (5, 100)])
def test_sweep_equals_a_forward_per_candidate(family: str, micro_batch: int, branches_per_chunk: int) -> None:
    model = TINY_FAMILIES[family]()
    draw = random.Random(f"{family} {micro_batch}")
    blocks = all_blocks(model.config.num_hidden_layers)
    plain = plain_scorer(model, TOKENS)
    sweep = sweep_scorer(model, TOKENS, micro_batch=micro_batch, branches_per_chunk=branches_per_chunk)
    for num_removed in (0, 1, 3, len(blocks) - 2):
        removed = draw.sample(blocks, num_removed)
        there = [block for block in blocks if block not in removed]
        candidates = [block for block in there if draw.random() < 0.8] or there[:1]
        expected, table = filled(plain, removed, candidates), filled(sweep, removed, candidates)
        assert table.is_complete
        torch.testing.assert_close(table.nll_CB, expected.nll_CB, rtol=0, atol=1e-5)
    torch.testing.assert_close(sweep.dense_nll(), plain.dense_nll(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", sorted(TINY_FAMILIES))
def test_every_family_goes_on_from_snapshots(family: str) -> None:
    model = TINY_FAMILIES[family]()
    blocks = all_blocks(model.config.num_hidden_layers)
    plain, sweep = plain_scorer(model, TOKENS), sweep_scorer(model, TOKENS, snapshot_bytes=10**9)
    removed: list[Block] = []
    for block in random.Random(family).sample(blocks[1:], 3):
        candidates = [each for each in blocks if each not in removed]
        expected, table = filled(plain, removed, candidates), filled(sweep, removed, candidates)
        torch.testing.assert_close(table.nll_CB, expected.nll_CB, rtol=0, atol=1e-5)
        removed.append(block)
    assert sweep.meter.flops_saved > 0


@torch.inference_mode()
def test_hooks_of_the_final_norm_run_once_and_a_forward_of_its_own_stays() -> None:
    model = tiny_model()
    norm = row_of(model).final_norm_of(model)
    assert norm is not None
    forward, runs = norm.forward, []
    norm.register_forward_hook(lambda *_: runs.append(1))
    norm.forward = lambda hidden: 2.0 * forward(hidden)
    hidden_MD = torch.randn(7, model.config.hidden_size)
    decoder = Decoder(row_of(model), model, SEQUENCE_LENGTH)
    runs.clear()
    torch.testing.assert_close(decoder.logits(hidden_MD), model.get_output_embeddings()(2.0 * forward(hidden_MD)))
    assert runs == [1]
    torch.testing.assert_close(norm(hidden_MD), 2.0 * forward(hidden_MD))


def test_a_model_without_a_final_norm_is_scored_as_well() -> None:
    model = tiny_model("opt", _remove_final_layer_norm=True)
    assert row_of(model).final_norm_of(model) is None
    blocks = all_blocks(model.config.num_hidden_layers)
    expected, table = filled(plain_scorer(model, TOKENS), (), blocks), filled(sweep_scorer(model, TOKENS), (), blocks)
    torch.testing.assert_close(table.nll_CB, expected.nll_CB, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", sorted(TINY_FAMILIES))
@torch.inference_mode()
def test_no_layer_changes_its_input(family: str) -> None:
    """The sweep hands the same hidden state to several branches, and keeps it."""
    model = tiny_model(family)
    decoder = Decoder(row_of(model), model, SEQUENCE_LENGTH)
    hidden_NTD = decoder.embed(TOKENS)
    for unit in decoder.units:
        before_NTD, follows_NTD = hidden_NTD.clone(), hidden_NTD
        for count in range(len(unit.blocks) + 1):
            for without in combinations(unit.blocks, count):
                output_NTD = decoder.run(unit, hidden_NTD, frozenset(without))
                follows_NTD = follows_NTD if without else output_NTD
                assert torch.equal(hidden_NTD, before_NTD), (unit, without)
        hidden_NTD = follows_NTD


@pytest.mark.parametrize("family", sorted(TINY_FAMILIES))
@torch.inference_mode()
def test_the_final_norm_is_run_the_way_the_layers_are(family: str) -> None:
    model, ran = tiny_model(family), []

    def run(module: nn.Module, hidden_MD: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        ran.append(module)
        return 3.0 * run_layer(module, hidden_MD, args, kwargs)

    hidden_MD = torch.randn(7, model.config.hidden_size)
    with_run = Decoder(row_of(model), model, SEQUENCE_LENGTH, run=run).logits(hidden_MD)
    assert [type(norm).__name__.endswith("Norm") for norm in ran] == [True]
    weight, before = ran[0].weight, ran[0].weight.clone()
    without_run = Decoder(row_of(model), model, SEQUENCE_LENGTH)
    assert not torch.equal(without_run.logits(hidden_MD), with_run)
    scale = 3.0 * (1.0 + before) - 1.0 if "Gemma" in type(ran[0]).__name__ else 3.0 * before
    weight.copy_(scale)
    if getattr(ran[0], "bias", None) is not None:
        ran[0].bias.mul_(3.0)
    torch.testing.assert_close(without_run.logits(hidden_MD), with_run)


@pytest.mark.parametrize("metric", ["perplexity", "kl", "js"])
@pytest.mark.parametrize("snapshot_bytes", [0, 20_000, 10**9])
def test_a_search_with_snapshots_gives_the_scores_of_one_without(metric: MetricName, snapshot_bytes: int) -> None:
    model = tiny_model()
    plain = plain_scorer(model, TOKENS, metric)
    sweep = sweep_scorer(model, TOKENS, metric, snapshot_bytes=snapshot_bytes)
    fresh = sweep_scorer(model, TOKENS, metric)
    removed: list[object] = []
    for block in (mlp(3), mha(2), mlp(1), mha(3), mha(0)):
        candidates = [each for each in all_blocks(4) if each not in removed]
        table = filled(sweep, removed, candidates)
        expected = filled(plain, removed, candidates)
        torch.testing.assert_close(table.nll_CB, expected.nll_CB, rtol=0, atol=1e-5)
        torch.testing.assert_close(table.divergence_CB, expected.divergence_CB, rtol=0, atol=1e-5, equal_nan=True)
        assert torch.equal(table.nll_CB, filled(fresh, removed, candidates).nll_CB), "bit for bit"
        removed.append(block)
    assert (sweep.meter.flops_saved > 0) == (snapshot_bytes > 0)


@pytest.mark.parametrize("block", [mha(1), mlp(3)])
def test_snapshots_lie_where_the_next_removal_is_expected(block: Block) -> None:
    others = [each for each in all_blocks(4) if each != block]
    stream_bytes = TOKENS.numel() * 32 * 4  # of hidden states [B, T, D] in float32
    saved = []
    for expected in ([block, *others], [*others, block]):
        scorer = sweep_scorer(tiny_model(), TOKENS, snapshot_bytes=8 * stream_bytes)  # room for the largest front alone
        scorer.rank_by(expected)
        filled(scorer, (), all_blocks(4))
        filled(scorer, (block,), others)
        saved.append(scorer.meter.flops_saved)
    assert saved[0] > saved[1]


@pytest.mark.parametrize("metric", ["perplexity", "kl"])
def test_the_next_removal_is_expected_among_the_least_important(metric: MetricName) -> None:
    table = filled(plain_scorer(tiny_model(), TOKENS, metric), (), all_blocks(4))
    means = dict(zip(table.candidates, table.divergence_CB if metric == "kl" else table.nll_CB, strict=True))
    assert ranking(table, metric_of(metric)) == tuple(sorted(means, key=lambda block: float(means[block].mean())))


def test_snapshots_that_are_not_wanted_any_more_are_given_back() -> None:
    budget = 61_440
    scorer = sweep_scorer(tiny_model(), TOKENS, snapshot_bytes=budget)
    for search in range(12):  # in some of them what the step before kept leaves no room for what is wanted now
        removed: list[Block] = []
        for block in (mlp(3), mha(3), mlp(2)):
            candidates = [each for each in all_blocks(4) if each not in removed]
            scorer.rank_by(random.Random(search * 7 + len(removed)).sample(candidates, len(candidates)))
            filled(scorer, removed, candidates)
            assert scorer.snapshots.device_bytes <= budget
            removed.append(block)


def test_a_sequence_counts_as_scored_only_with_all_of_its_candidates() -> None:
    """Another scorer may have gone candidate by candidate."""
    scorer, candidates = sweep_scorer(tiny_model(), TOKENS), all_blocks(4)
    whole = filled(scorer, (), candidates)
    begun = ScoreTable.empty(candidates, NUM_SEQUENCES)
    begun.fill(slice(0, 1), slice(None), whole.nll_CB[:1])
    scorer.fill((), begun, lambda _: None)
    assert torch.equal(begun.nll_CB, whole.nll_CB)


@pytest.mark.parametrize(("num_workers", "micro_batch"), [(1, 5), (3, 2), (5, 1)])
def test_a_new_scorer_is_cut_for_those_who_share_the_work(num_workers: int, micro_batch: int) -> None:
    model, settings = tiny_model(), ScorerSettings()
    scorer = build_scorer(
        row_of(model), model, TOKENS, "cpu", metric_of("perplexity"), settings, team=Team(num_workers)
    )
    assert isinstance(scorer, SweepScorer)
    assert scorer.plan.cut.micro_batch == micro_batch


def test_what_is_computed_and_what_is_saved_are_a_whole_sweep() -> None:
    scorer, removed = sweep_scorer(tiny_model(), TOKENS, snapshot_bytes=10**9), list[Block]()
    for block in (mlp(3), mha(2), mlp(0)):
        before = (scorer.meter.flops, scorer.meter.flops_saved)
        table = filled(scorer, removed, [each for each in all_blocks(4) if each not in removed])
        computed, saved = scorer.meter.flops - before[0], scorer.meter.flops_saved - before[1]
        assert computed + saved == scorer.costs.walk(scorer.units, removed, table.candidates)[-1] * TOKENS.numel()
        assert (saved > 0) == bool(removed)
        removed.append(block)


def test_no_more_logits_exist_at_one_time_than_the_cut_says(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, made = Decoder.logits, list[int]()

    def counted(self: Decoder, hidden_MD: Tensor) -> Tensor:
        logits = whole(self, hidden_MD)
        made.append(logits.numel())
        return logits

    monkeypatch.setattr(Decoder, "logits", counted)
    scorer = sweep_scorer(tiny_model(), TOKENS, branches_per_chunk=4, logit_elements=128 * 20)
    filled(scorer, (), all_blocks(4))
    assert max(made) == 128 * 20  # as many of four branches' tokens as that is


def test_a_layer_of_which_nothing_is_left_is_not_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    expected: list[tuple[int, ...]] = []
    monkeypatch.setattr(Decoder, "expect", lambda _, layers: expected.append(layers))
    filled(sweep_scorer(tiny_model(), TOKENS, micro_batch=5), (mha(1), mlp(1), mha(3)), [mha(0), mlp(2)])
    assert expected == [(0, 2, 3)]


def test_a_resumed_sweep_is_bit_identical() -> None:
    model = tiny_model()
    scorer = sweep_scorer(model, TOKENS)
    removed, candidates = (mlp(0),), [mha(0), mha(1), mlp(1), mha(2)]
    whole = filled(scorer, removed, candidates)
    resumed = ScoreTable.empty(candidates, NUM_SEQUENCES)
    resumed.fill(slice(0, 4), slice(0, 2), whole.nll_CB[:, :2])
    columns_done = []
    scorer.fill(removed, resumed, lambda table: columns_done.append(int(table.done_CB[0].sum())))
    assert columns_done == [4, 5]  # the first micro-batch was not computed again
    assert torch.equal(resumed.nll_CB, whole.nll_CB)
    assert "forward" not in vars(row_of(model).decoder_layers(model)[0])


@pytest.mark.parametrize("metric", ["perplexity", "kl", "js"])
@pytest.mark.parametrize(("micro_batch", "fitting"), [(5, 2), (4, 3), (3, 1), (7, 4)])
def test_too_little_memory_shrinks_the_plan_and_changes_no_score(
    monkeypatch: pytest.MonkeyPatch, metric: MetricName, micro_batch: int, fitting: int
) -> None:
    """Also in the pass of the dense model, whose predictions the divergences are measured from."""
    token_ids_BT = tiny_token_ids(12, 8, seed=6)
    model = tiny_model()
    expected = filled(plain_scorer(model, token_ids_BT, metric), (), all_blocks(4))
    told: list[SweepPlan] = []
    batches = {"micro_batch": micro_batch, "branches_per_chunk": 4, "snapshot_bytes": 10**6}
    scorer = sweep_scorer(model, token_ids_BT, metric, **batches, on_plan=told.append)
    layer = type(row_of(model).decoder_layers(model)[2])
    whole = layer.forward
    calls = 0

    def small_device(self: torch.nn.Module, hidden_states: torch.Tensor, *args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        if calls > 12 and hidden_states.shape[0] > fitting:  # other programs take the memory a moment after the start
            raise torch.OutOfMemoryError("out of memory. Try less.")
        return whole(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(layer, "forward", small_device)
    table = filled(scorer, (), all_blocks(4))
    torch.testing.assert_close(table.nll_CB, expected.nll_CB, rtol=0, atol=1e-5)
    torch.testing.assert_close(table.divergence_CB, expected.divergence_CB, rtol=0, atol=1e-5, equal_nan=True)
    assert scorer.plan.cut.micro_batch < micro_batch
    assert told[-1] == scorer.plan  # what a search goes on with


def test_a_device_that_is_too_small_for_anything_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    scorer = sweep_scorer(model, TOKENS)

    def no_device(*_: object, **__: object) -> object:
        raise torch.OutOfMemoryError("out of memory. Try less.")

    monkeypatch.setattr(type(row_of(model).decoder_layers(model)[2]), "forward", no_device)
    with pytest.raises(ConfigurationError, match="--memory-budget") as caught:
        filled(scorer, (), all_blocks(4))
    assert "\n" not in str(caught.value)
