"""The plain scorer on real models, against hand-written forward passes; and the whole search against them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from blockpruner.architectures import architecture_of, block_sizes, num_parameters
from blockpruner.blocks import Block, BlockKinds, all_blocks, mha, mlp
from blockpruner.journal import SearchJournal
from blockpruner.scoring.metrics import metric_of
from blockpruner.scoring.plain import PlainScorer
from blockpruner.scoring.settings import MetricName
from blockpruner.scoring.table import ScoreTable
from blockpruner.search import GreedySearch, SearchTarget
from tests.oracles import oracle_divergence, oracle_logits, oracle_perplexity, oracle_sequence_nll
from tests.scorers import filled, plain_scorer, row_of
from tests.tiny_models import TINY_FAMILIES, tiny_model, tiny_token_ids

TOKENS = tiny_token_ids(3, 16, seed=9)
LLAMA = architecture_of("llama")


def ignore(_: ScoreTable) -> None:
    """No checkpoint."""


def scorer_of(family: str, batch_size: int | None = None) -> PlainScorer:
    model = tiny_model(family)
    return PlainScorer(row_of(model), model, TOKENS, batch_size)


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_scores_are_those_of_the_hand_written_forward(family: str) -> None:
    model = tiny_model(family)
    removed = (mlp(1), mha(2))
    candidates = [block for block in all_blocks(4) if block not in removed]
    table = ScoreTable.empty(candidates, 3)
    PlainScorer(row_of(model), model, TOKENS).fill(removed, table, ignore)
    assert table.is_complete
    assert table.nll_CB.dtype == torch.float64
    for row, candidate in enumerate(candidates):
        gone = {(block.layer_index, block.block_kind.value) for block in (*removed, candidate)}
        logits = oracle_logits(model.state_dict(), model.config.to_dict(), TOKENS, gone)
        assert (table.nll_CB[row] - oracle_sequence_nll(logits, TOKENS)).abs().max() <= 1e-5, candidate


@pytest.mark.parametrize("metric", ["kl", "js"])
@pytest.mark.parametrize("family", ["gemma2", "gpt2", "llama", "mixtral"])
def test_divergences_are_those_of_the_hand_written_forward(family: str, metric: MetricName) -> None:
    model = tiny_model(family)
    removed, candidates = (mlp(1),), (mha(0), mha(2), mlp(3))
    table = filled(plain_scorer(model, TOKENS, metric), removed, candidates)

    def logits(*gone: Block) -> torch.Tensor:
        names = {(block.layer_index, block.block_kind.value) for block in gone}
        return oracle_logits(model.state_dict(), model.config.to_dict(), TOKENS, names)

    for row, candidate in enumerate(candidates):
        expected_B = oracle_divergence(logits(), logits(*removed, candidate), metric)
        assert expected_B.min() > 1e-3
        assert (table.divergence_CB[row] - expected_B).abs().max() <= 1e-5, candidate


@pytest.mark.parametrize("metric", ["kl", "js"])
def test_divergences_of_predictions_that_are_as_good_as_certain(metric: MetricName) -> None:
    """Where probabilities of both are too small for float32."""
    divergence = metric_of(metric).divergence
    assert divergence is not None
    dense, pruned = torch.tensor([[0.0, -300.0, -1.0]]), torch.tensor([[0.0, -300.0, -2.0]])
    expected = oracle_divergence(dense.expand(1, 2, 3), pruned.expand(1, 2, 3), metric)
    torch.testing.assert_close(divergence(dense, pruned).double(), expected, rtol=1e-5, atol=0)
    assert divergence(dense, dense).tolist() == [0.0]
    apart = divergence(torch.tensor([[0.0, -300.0]]), torch.tensor([[-300.0, 0.0]]))
    assert apart.item() == pytest.approx(300.0 if metric == "kl" else math.log(2.0))


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_a_half_filled_table_ends_equal_to_a_fresh_one(batch_size: int) -> None:
    """Bit for bit, from any number of values; and what is done is not computed again."""
    candidates = (mha(0), mlp(2), mha(3))
    fresh = ScoreTable.empty(candidates, 3)
    updates = []
    scorer_of("llama", batch_size).fill((mlp(0),), fresh, lambda table: updates.append(int(table.done_CB.sum())))
    assert len(updates) == 3 * len(range(0, 3, batch_size))
    for done in updates:
        resumed = ScoreTable.empty(candidates, 3)
        kept = torch.arange(9).reshape(3, 3) < done
        resumed.nll_CB[kept], resumed.done_CB[kept] = fresh.nll_CB[kept], True
        later: list[ScoreTable] = []
        scorer_of("llama", batch_size).fill((mlp(0),), resumed, later.append)
        assert torch.equal(resumed.nll_CB, fresh.nll_CB)
        assert len(later) == len(updates) - 1 - updates.index(done)


def test_a_value_that_is_done_is_taken_as_it_is() -> None:
    table = ScoreTable.empty((mha(0), mha(1)), 3)
    table.fill(slice(0, 1), slice(0, 3), torch.tensor([[7.0, 8.0, 9.0]]))
    scorer_of("llama").fill((), table, ignore)
    assert table.nll_CB[0].tolist() == [7.0, 8.0, 9.0]
    assert table.is_complete


def test_the_default_batch_size_depends_on_shapes_alone() -> None:
    fresh, again = ScoreTable.empty((mha(0),), 3), ScoreTable.empty((mha(0),), 3)
    scorer_of("llama").fill((), fresh, ignore)
    scorer_of("llama").fill((), again, ignore)
    assert torch.equal(fresh.nll_CB, again.nll_CB)


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_model()
    before = model(input_ids=TOKENS).logits
    scorer = PlainScorer(LLAMA, model, TOKENS)

    def die(_: ScoreTable) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scorer.fill((mha(0),), ScoreTable.empty((mlp(0),), 3), die)
    assert torch.equal(model(input_ids=TOKENS).logits, before)
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize(
    ("family", "kinds", "num_blocks"),
    [
        *(("llama", "both", 5), ("qwen3-mixed-windows", "both", 4), ("mistral-window", "mha", 3), ("qwen2", "mlp", 3)),
        *(("gemma2", "both", 4), ("falcon-one-norm", "both", 5), ("qwen2_moe-mixed", "both", 3), ("opt", "both", 4)),
    ],
)
def test_a_search_equals_a_brute_force_greedy_over_hand_written_forwards(
    tmp_path: Path, family: str, kinds: BlockKinds, num_blocks: int
) -> None:
    model = tiny_model(family)
    tensors, config = model.state_dict(), model.config.to_dict()
    architecture = row_of(model)

    def oracle(blocks: list[Block]) -> float:
        gone = {(block.layer_index, block.block_kind.value) for block in blocks}
        return oracle_perplexity(oracle_sequence_nll(oracle_logits(tensors, config, TOKENS, gone), TOKENS))

    order: list[Block] = []
    perplexities: list[float] = []
    gaps = []
    for _ in range(num_blocks):
        scored = sorted((oracle([*order, block]), block) for block in all_blocks(4, kinds) if block not in order)
        order.append(scored[0][1])
        perplexities.append(scored[0][0])
        gaps.append(scored[1][0] / scored[0][0] - 1)
    assert min(gaps) > 1e-4, "a choice too close to hold against float32"

    all_sizes = block_sizes(architecture, model)
    sizes = {block: all_sizes[block] for block in all_blocks(4, kinds)}
    search = GreedySearch(
        PlainScorer(architecture, model, TOKENS, batch_size=2),
        sizes,
        num_parameters(model),
        SearchJournal(tmp_path, "0" * 64),
    )
    steps = search.run(SearchTarget(num_blocks=num_blocks))
    assert [step.block for step in steps] == order
    assert [step.perplexity for step in steps] == pytest.approx(perplexities, rel=1e-5)
    removed = [sum(all_sizes[block] for block in order[: count + 1]) for count in range(num_blocks)]
    assert [step.num_parameters_removed for step in steps] == removed
    assert [step.ratio for step in steps] == [count / num_parameters(model) for count in removed]
