"""Every strategy's order, on tiny models, against a brute force that shares no line with the library.

Each candidate of each step is a forward pass of the oracle without the removed blocks.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path

import pytest
import torch

from blockpruner.blocks import Block, all_blocks, mha, mlp
from blockpruner.errors import ConfigurationError
from blockpruner.journal import SearchJournal
from blockpruner.ordered_search import OrderedSearch
from blockpruner.scoring.build import build_scorer
from blockpruner.scoring.layer_measures import block_influence, relative_magnitude
from blockpruner.scoring.metrics import metric_of
from blockpruner.scoring.settings import MetricName, ScorerName, ScorerSettings
from blockpruner.scoring.table import ScoreTable
from blockpruner.search import GreedySearch, Search, SearchTarget
from blockpruner.strategies import STRATEGIES, StrategyName
from blockpruner.trace import SearchStep
from tests.oracles import oracle_logits, oracle_perplexity, oracle_sequence_nll
from tests.scorers import row_of
from tests.tiny_models import TINY_FAMILIES, tiny_model, tiny_token_ids

TOKENS = tiny_token_ids(5, 12, seed=1)
LAYERS = 6
SIZES = dict.fromkeys(all_blocks(LAYERS), 10)
ORDERED: list[StrategyName] = ["oneshot", "shortgpt", "rm", "random"]


@functools.cache
def perplexity_without(removed: frozenset[Block]) -> float:
    """Of the tiny Llama, by the oracle."""
    model = tiny_model(num_hidden_layers=LAYERS)
    gone = {(block.layer_index, block.block_kind.value) for block in removed}
    logits = oracle_logits(model.state_dict(), model.config.to_dict(), TOKENS, gone)
    return oracle_perplexity(oracle_sequence_nll(logits, TOKENS))


def layer(index: int) -> frozenset[Block]:
    return frozenset({mha(index), mlp(index)})


def search(
    folder: Path,
    strategy: StrategyName,
    *,
    scorer: ScorerName = "sweep",
    metric: MetricName = "perplexity",
    seed: int = 0,
    num_layers: int = LAYERS,
) -> Search:
    model = tiny_model(num_hidden_layers=num_layers)
    row = STRATEGIES[strategy]
    built = build_scorer(
        row_of(model),
        model,
        TOKENS,
        "cpu",
        metric_of(metric),
        ScorerSettings(scorer=scorer),
        2,
        whole_layers=row.whole_layers,
    )
    journal = SearchJournal(folder / f"{strategy} {metric} {seed}", "5" * 64, partial_interval_s=0)
    sizes = dict.fromkeys(all_blocks(num_layers), 10)
    if row.procedure == "greedy":
        return GreedySearch(built, sizes, 1000, journal, metric=metric_of(metric))
    return OrderedSearch(built, sizes, 1000, journal, metric=metric_of(metric), importance=row.importance, seed=seed)


def target(strategy: StrategyName, num_blocks: int) -> SearchTarget:
    return SearchTarget(num_blocks=num_blocks, whole_layers=STRATEGIES[strategy].whole_layers)


def without_seconds(steps: tuple[SearchStep, ...]) -> list[str]:
    return [step.model_copy(update={"seconds": 0.0, "work_saved": 0.0}).model_dump_json() for step in steps]


@pytest.mark.parametrize("scorer", ["sweep", "plain"])
def test_layers_is_a_greedy_search_over_whole_layers(tmp_path: Path, scorer: ScorerName) -> None:
    steps = search(tmp_path, "layers", scorer=scorer).run(target("layers", 8))
    removed: frozenset[Block] = frozenset()
    for number, step in enumerate(steps, start=1):
        left = [index for index in range(LAYERS) if mha(index) not in removed]
        expected = {index: perplexity_without(removed | layer(index)) for index in left}
        assert [each.blocks for each in step.candidates] == [(mha(index), mlp(index)) for index in left]
        assert [each.score for each in step.candidates] == pytest.approx(list(expected.values()), rel=1e-4)
        best = min(expected, key=lambda index: expected[index])
        assert set(step.blocks) == layer(best)
        removed |= layer(best)
        assert step.perplexity == step.score == pytest.approx(perplexity_without(removed), rel=1e-4)
        assert (step.num_parameters_removed, step.ratio) == (20 * number, 0.02 * number)
    assert len(steps) == 4


@pytest.mark.parametrize("family", sorted(TINY_FAMILIES))
def test_a_sweep_of_layers_equals_a_forward_per_layer(family: str) -> None:
    model = TINY_FAMILIES[family]()
    tables = []
    for name in ("sweep", "plain"):
        settings = ScorerSettings(scorer=name)  # type: ignore[arg-type]
        scorer = build_scorer(row_of(model), model, TOKENS, "cpu", metric_of("kl"), settings, 3, whole_layers=True)
        for gone in ((), (mha(1), mlp(1))):
            table = ScoreTable.empty([mha(index) for index in range(4) if mha(index) not in gone], 5)
            scorer.fill(gone, table, lambda _: None)
            tables.append(table)
            assert scorer.nll_without((*gone, mha(0), mlp(0))).tolist() == pytest.approx(
                table.nll_CB[0].tolist(), abs=1e-5
            )
    for fast, plain in zip(tables[:2], tables[2:], strict=True):
        torch.testing.assert_close(fast.nll_CB, plain.nll_CB, rtol=0, atol=1e-5)
        torch.testing.assert_close(fast.divergence_CB, plain.divergence_CB, rtol=0, atol=1e-5)


@pytest.mark.parametrize("scorer", ["sweep", "plain"])
def test_oneshot_removes_in_the_order_of_the_first_scores(tmp_path: Path, scorer: ScorerName) -> None:
    steps = search(tmp_path, "oneshot", scorer=scorer).run(target("oneshot", 5))
    alone = {block: perplexity_without(frozenset({block})) for block in all_blocks(LAYERS)}
    order = sorted(alone, key=lambda block: alone[block])[:5]
    assert [step.block for step in steps] == order
    for number, step in enumerate(steps, start=1):
        assert step.score == pytest.approx(alone[step.block], rel=1e-4)
        assert step.perplexity == pytest.approx(perplexity_without(frozenset(order[:number])), rel=1e-4)
        for each in step.candidates:
            assert each.score == pytest.approx(alone[each.block], rel=1e-4)
            if number == 1:
                assert each.perplexity == each.score
            else:
                assert each.perplexity == (step.perplexity if each.chosen else None)
    greedy = search(tmp_path, "blockpruner").run(target("blockpruner", 5))
    assert [step.block for step in greedy] != order, "so that the test tells the two apart"


@pytest.mark.parametrize("strategy", ["shortgpt", "rm"])
@pytest.mark.parametrize("scorer", ["sweep", "plain"])
def test_layer_measures_remove_the_layer_that_does_least(
    tmp_path: Path, strategy: StrategyName, scorer: ScorerName
) -> None:
    steps = search(tmp_path, strategy, scorer=scorer).run(target(strategy, 6))
    model = tiny_model(num_hidden_layers=LAYERS)
    streams: list[torch.Tensor] = []
    hooks = [
        each.register_forward_hook(lambda _, args, output: streams.extend((args[0], output)))
        for each in model.model.layers
    ]
    with torch.inference_mode():
        model(input_ids=TOKENS)
    for hook in hooks:
        hook.remove()
    measure = {"shortgpt": block_influence, "rm": relative_magnitude}[strategy]
    scores = [measure(streams[2 * i], streams[2 * i + 1]).mean().item() for i in range(LAYERS)]
    order = sorted(range(LAYERS), key=lambda index: scores[index])[:3]
    assert [step.blocks for step in steps] == [(mha(index), mlp(index)) for index in order]
    removed: frozenset[Block] = frozenset()
    for step in steps:
        assert [each.score for each in step.candidates] == pytest.approx(
            [scores[each.block.layer_index] for each in step.candidates], rel=1e-4
        )
        removed |= frozenset(step.blocks)
        assert step.perplexity == pytest.approx(perplexity_without(removed), rel=1e-4)
        assert [each.perplexity for each in step.candidates if not each.chosen] == [None] * (len(step.candidates) - 1)


def test_random_is_its_seeds_alone_and_every_block_can_be_first(tmp_path: Path) -> None:
    orders = {}
    for seed in range(20):
        steps = search(tmp_path, "random", seed=seed, num_layers=2).run(target("random", 1))
        orders[seed] = steps[0].block
    assert set(orders.values()) == set(all_blocks(2))
    again = search(tmp_path / "again", "random", seed=3, num_layers=2).run(target("random", 1))
    assert again[0].block == orders[3]
    assert again[0].score == min(each.score for each in again[0].candidates)
    assert all(0 <= each.score < 1 for each in again[0].candidates)


@pytest.mark.parametrize("strategy", ["layers", *ORDERED])
def test_a_search_to_more_goes_on_from_one_to_fewer_and_fewer_read_its_prefix(
    tmp_path: Path, strategy: StrategyName
) -> None:
    whole = search(tmp_path / "whole", strategy).run(target(strategy, 6))
    first = search(tmp_path / "parts", strategy).run(target(strategy, 2))
    then = search(tmp_path / "parts", strategy).run(target(strategy, 6))
    assert without_seconds(then) == without_seconds(whole)
    assert without_seconds(first) == without_seconds(whole)[: len(first)]
    prefix = search(tmp_path / "whole", strategy).run(target(strategy, 4))
    assert without_seconds(prefix) == without_seconds(whole)[: len(prefix)]
    by_ratio = search(tmp_path / "whole", strategy).run(
        SearchTarget(ratio=0.039, whole_layers=STRATEGIES[strategy].whole_layers)
    )
    assert without_seconds(by_ratio) == without_seconds(whole)[: len(by_ratio)]
    assert sum(len(step.blocks) for step in by_ratio) == 4


@pytest.mark.parametrize("strategy", ["oneshot", "layers"])
@pytest.mark.parametrize("metric", ["kl", "js"])
def test_another_metric_ranks_and_the_perplexity_is_there_as_well(
    tmp_path: Path, strategy: StrategyName, metric: MetricName
) -> None:
    steps = search(tmp_path, strategy, metric=metric).run(target(strategy, 4))
    plain = search(tmp_path / "plain", strategy, metric=metric, scorer="plain").run(target(strategy, 4))
    removed: frozenset[Block] = frozenset()
    for step, other in zip(steps, plain, strict=True):
        removed |= frozenset(step.blocks)
        assert step.blocks == other.blocks
        assert step.score == pytest.approx(other.score, rel=1e-3)
        assert step.perplexity == pytest.approx(perplexity_without(removed), rel=1e-4)
        assert step.score == min(each.score for each in step.candidates)


@pytest.mark.parametrize(
    ("num_blocks", "words"),
    [(3, "even number"), (12, "one layer must stay; give at most 10"), (11, "at most 10")],
)
def test_whole_layers_come_in_twos_and_one_stays(num_blocks: int, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        SearchTarget(num_blocks=num_blocks, whole_layers=True).check(SIZES, 1000)
    SearchTarget(num_blocks=10, whole_layers=True).check(SIZES, 1000)


def test_a_ratio_that_needs_the_last_layer_is_refused() -> None:
    SearchTarget(ratio=0.1, whole_layers=True).check(SIZES, 1000)
    with pytest.raises(ConfigurationError, match=r"all layers but one reaches 0\.1000"):
        SearchTarget(ratio=0.105, whole_layers=True).check(SIZES, 1000)
    SearchTarget(ratio=0.105).check(SIZES, 1000)


def test_scores_that_are_not_finite_go_last(tmp_path: Path) -> None:
    class Broken:
        num_sequences = 1

        def __init__(self, scorer: object) -> None:
            self._scorer = scorer

        def __getattr__(self, name: str) -> object:
            return getattr(self._scorer, name)

        def measure_layers(self, _: object) -> torch.Tensor:
            return torch.tensor([[math.nan], [3.0], [1.0], [math.inf]], dtype=torch.float64)

    model = tiny_model(num_hidden_layers=4)
    scorer = build_scorer(
        row_of(model), model, TOKENS, "cpu", metric_of("perplexity"), ScorerSettings(), 2, whole_layers=True
    )
    journal = SearchJournal(tmp_path, "5" * 64)
    sizes = dict.fromkeys(all_blocks(4), 10)
    broken = OrderedSearch(Broken(scorer), sizes, 1000, journal, importance="block_influence")  # type: ignore[arg-type]
    steps = broken.run(SearchTarget(num_blocks=6, whole_layers=True))
    assert [step.block for step in steps] == [mha(2), mha(1), mha(0)]
