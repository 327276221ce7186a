"""The greedy search: which block goes at each step, when it stops, and how it goes on.

The scores here come from a scorer of this file, so that the ranking is held against a brute-force greedy that shares no
line with the library; `test_plain_scorer` does the same on real models.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pytest
import torch

from blockpruner.blocks import Block, BlockKinds, all_blocks, mha, mlp
from blockpruner.errors import ConfigurationError
from blockpruner.journal import SearchJournal
from blockpruner.progress import Progress
from blockpruner.repackable import Repackable
from blockpruner.scoring.interface import TableCallback
from blockpruner.scoring.metrics import metric_of
from blockpruner.scoring.table import ScoreTable
from blockpruner.scoring.work import Meter
from blockpruner.search import GreedySearch, SearchTarget, rank
from blockpruner.trace import SearchStep

IDENTITY = "5" * 64

NllFunction = Callable[[frozenset[Block]], Sequence[float]]
"""The NLL of every sequence without the given blocks."""


class InterruptionError(Exception):
    """Stands for a process that is killed."""


class FakeScorer:
    """Fills a table from a function, value by value; counts what it computed; dies after so many updates."""

    def __init__(self, nll: NllFunction, num_sequences: int = 1, dies_after: int | None = None) -> None:
        self._nll, self._num_sequences, self._dies_after = nll, num_sequences, dies_after
        self.num_computed = 0
        self.meter = Meter()

    @property
    def num_sequences(self) -> int:
        return self._num_sequences

    def dense_nll(self) -> torch.Tensor:
        return torch.tensor(self._nll(frozenset()), dtype=torch.float64)

    def fill(self, removed: tuple[Block, ...], table: ScoreTable, on_update: TableCallback) -> None:
        for row, candidate in enumerate(table.candidates):
            values = torch.tensor(self._nll(frozenset({*removed, candidate})), dtype=torch.float64)
            for column in range(self._num_sequences):
                if table.done_CB[row, column]:
                    continue
                table.fill(slice(row, row + 1), slice(column, column + 1), values[column : column + 1][None])
                self.num_computed += 1
                on_update(table)
                if self.num_computed == self._dies_after:
                    raise InterruptionError


def random_nll(seed: int, num_sequences: int = 1) -> NllFunction:
    """Arbitrary values, the same for the same set of blocks: nothing like a sum over blocks, so order matters."""

    def nll(gone: frozenset[Block]) -> list[float]:
        generator = random.Random(f"{seed} {' '.join(map(str, sorted(gone)))}")
        return [generator.uniform(1.0, 3.0) for _ in range(num_sequences)]

    return nll


def constant_nll(values: dict[Block, float], otherwise: float = 1.0) -> NllFunction:
    """The sum of a fixed value for every block that is gone."""
    return lambda gone: [sum(values.get(block, otherwise) for block in gone)]


def search(
    folder: Path,
    scorer: FakeScorer,
    *,
    num_layers: int = 4,
    kinds: BlockKinds = "both",
    progress: Callable[[Progress], None] = lambda _: None,
    sizes: dict[Block, int] | None = None,
    total: int = 1000,
    partial_interval_s: float = 0,
) -> GreedySearch:
    sizes = sizes or dict.fromkeys(all_blocks(num_layers, kinds), 10)
    return GreedySearch(scorer, sizes, total, SearchJournal(folder, IDENTITY, partial_interval_s), progress)


def without_seconds(steps: Iterable[SearchStep]) -> list[str]:
    """Everything that must be equal, NaN included; how long a step took must not."""
    return [step.model_copy(update={"seconds": 0.0, "work_saved": 0.0}).model_dump_json() for step in steps]


def brute_force(nll: NllFunction, candidates: Sequence[Block], num_blocks: int) -> list[tuple[Block, float]]:
    """Algorithm 1 as the paper states it."""
    order: list[tuple[Block, float]] = []
    for _ in range(num_blocks):
        gone = {block for block, _ in order}
        scored = []
        for block in candidates:
            if block not in gone:
                values = nll(frozenset(gone | {block}))
                scored.append((math.exp(sum(values) / len(values)), 2 * block.layer_index + (block in mlps), block))
        perplexity, _, best = min(scored)
        order.append((best, perplexity))
    return order


mlps = frozenset(mlp(index) for index in range(100))


@pytest.mark.parametrize("kinds", ["both", "mha", "mlp"])
@pytest.mark.parametrize("seed", range(4))
def test_order_and_perplexities_are_those_of_a_brute_force_greedy(tmp_path: Path, kinds: BlockKinds, seed: int) -> None:
    nll = random_nll(seed, num_sequences=3)
    steps = search(tmp_path, FakeScorer(nll, 3), num_layers=5, kinds=kinds).run(SearchTarget(num_blocks=4))
    expected = brute_force(nll, all_blocks(5, kinds), 4)
    assert [step.block for step in steps] == [block for block, _ in expected]
    assert [step.perplexity for step in steps] == pytest.approx([value for _, value in expected], rel=1e-12)
    assert [step.step for step in steps] == [1, 2, 3, 4]


def test_every_candidate_of_every_step_is_kept_with_its_rank(tmp_path: Path) -> None:
    nll = random_nll(7)
    steps = search(tmp_path, FakeScorer(nll)).run(SearchTarget(num_blocks=5))
    for done, step in enumerate(steps):
        before = frozenset(earlier.block for earlier in steps[:done])
        assert [c.block for c in step.candidates] == [block for block in all_blocks(4) if block not in before]
        scores = [math.exp(nll(before | {c.block})[0]) for c in step.candidates]
        assert [c.score for c in step.candidates] == pytest.approx(scores, rel=1e-12)
        assert [c.perplexity for c in step.candidates] == [c.score for c in step.candidates]
        assert [c.rank for c in step.candidates] == [1 + sum(other < mine for other in scores) for mine in scores]
        assert [c.block for c in step.candidates if c.chosen] == [step.block]
        assert (step.score, step.perplexity) == (min(c.score for c in step.candidates),) * 2


@pytest.mark.parametrize(("num_layers", "num_blocks", "evaluations"), [(32, 17, 952), (40, 24, 1644)])
def test_number_of_evaluations_is_the_papers(
    tmp_path: Path, num_layers: int, num_blocks: int, evaluations: int
) -> None:
    """Llama-2-7B and 13B; the sum over steps of the candidates that remain."""
    scorer = FakeScorer(random_nll(0))
    reports: list[Progress] = []
    searching = search(tmp_path, scorer, num_layers=num_layers, progress=reports.append, partial_interval_s=60)
    searching.run(SearchTarget(num_blocks=num_blocks))
    assert scorer.num_computed == evaluations
    assert {report.total for report in reports} == {evaluations}
    assert reports[-1].done == evaluations


def test_ties_go_to_the_first_block_of_the_stream(tmp_path: Path) -> None:
    steps = search(tmp_path, FakeScorer(lambda _: [1.5])).run(SearchTarget(num_blocks=4))
    assert [step.block for step in steps] == [mha(0), mlp(0), mha(1), mlp(1)]
    assert [candidate.rank for candidate in steps[0].candidates] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_candidates_come_in_stream_order_whatever_the_order_of_the_sizes(tmp_path: Path) -> None:
    sizes = dict.fromkeys(reversed(all_blocks(3)), 10)
    steps = search(tmp_path, FakeScorer(lambda _: [1.5]), sizes=sizes).run(SearchTarget(num_blocks=1))
    assert [candidate.block for candidate in steps[0].candidates] == list(all_blocks(3))
    assert steps[0].block == mha(0)


def test_scores_that_are_not_finite_rank_last_and_are_kept(tmp_path: Path) -> None:
    bad = {mha(0): math.nan, mlp(0): math.inf, mha(1): 1000.0}  # exp(1000) overflows
    steps = search(tmp_path, FakeScorer(constant_nll(bad)), num_layers=2).run(SearchTarget(num_blocks=1))
    assert steps[0].block == mlp(1)
    again = SearchJournal(tmp_path, IDENTITY).steps()
    for step in (steps[0], again[0]):
        assert [candidate.rank for candidate in step.candidates] == [2, 3, 4, 1]
        scores = [candidate.score for candidate in step.candidates]
        assert math.isnan(scores[0])
        assert scores[1:3] == [math.inf, math.inf]
        assert scores[3] == pytest.approx(math.e)


def test_candidates_within_the_noise_of_the_chosen_one_are_marked_as_tied() -> None:
    """In nats a token, whatever the metric; the chosen one itself and those that are broken are not."""
    nats = [2.0, 2.0009, 2.0011, math.nan, 1.9999]
    table = ScoreTable.empty(all_blocks(3)[:5], 1)
    table.fill(slice(0, 5), slice(0, 1), torch.tensor(nats)[:, None], torch.tensor(nats)[:, None])
    for metric in ("perplexity", "kl"):
        ranked = rank(table, metric_of(metric), noise_nats=1e-3)
        assert [candidate.tied for candidate in ranked] == [True, False, False, False, False]
        assert [candidate.chosen for candidate in ranked] == [False, False, False, False, True]
        assert not any(candidate.tied for candidate in rank(table, metric_of(metric)))
    assert [c.score for c in rank(table, metric_of("kl"))][:3] == pytest.approx(nats[:3])


def test_a_negative_infinity_never_wins(tmp_path: Path) -> None:
    """A perplexity of exactly 0 is finite; a NaN mean that comes of inf - inf is not."""
    steps = search(
        tmp_path, FakeScorer(lambda gone: [math.inf, -math.inf] if mha(0) in gone else [2.0, 2.0], 2), num_layers=2
    ).run(SearchTarget(num_blocks=1))
    assert steps[0].block == mlp(0)


def test_a_search_whose_scores_are_all_broken_still_ends(tmp_path: Path) -> None:
    steps = search(tmp_path, FakeScorer(lambda _: [math.nan]), num_layers=2).run(SearchTarget(num_blocks=2))
    assert [step.block for step in steps] == [mha(0), mlp(0)]
    assert all(math.isnan(step.perplexity) for step in steps)


SIZES = {mha(0): 30, mlp(0): 50, mha(1): 30, mlp(1): 50, mha(2): 30, mlp(2): 50}
ORDERED = constant_nll({mlp(2): 0.1, mha(0): 0.2, mlp(0): 0.3, mha(2): 0.4, mha(1): 0.5, mlp(1): 0.6})
CUMULATIVE = [0.05, 0.08, 0.13, 0.16, 0.19]
"""Ratios of 1000 parameters after each removal in that order."""


@pytest.mark.parametrize(
    ("ratio", "num_steps"), [(0.001, 1), (0.05, 1), (0.0501, 2), (0.08, 2), (0.1, 3), (0.13, 3), (0.19, 5)]
)
def test_ratio_stops_at_the_first_step_that_reaches_it(tmp_path: Path, ratio: float, num_steps: int) -> None:
    scorer = FakeScorer(ORDERED)
    steps = search(tmp_path, scorer, sizes=SIZES).run(SearchTarget(ratio=ratio))
    assert [step.ratio for step in steps] == CUMULATIVE[:num_steps]
    assert [step.num_parameters_removed for step in steps] == [round(1000 * value) for value in CUMULATIVE[:num_steps]]
    assert scorer.num_computed == sum(6 - done for done in range(num_steps))


def test_ratio_is_of_all_parameters_and_may_ask_for_all_blocks_but_one(tmp_path: Path) -> None:
    target = SearchTarget(ratio=0.190001)  # 240 of 1000 lie in blocks, and the largest of 50 may have to stay
    with pytest.raises(ConfigurationError, match=r"reaches 0\.1900"):
        search(tmp_path, FakeScorer(ORDERED), sizes=SIZES).run(target)


@pytest.mark.parametrize(
    ("num_blocks", "ratio", "word"),
    [
        (0, None, "at least 1"),
        (-3, None, "-3"),
        (None, 0.0, "between 0 and 1"),
        (None, 1.0, "between 0 and 1"),
        (None, -0.2, "-0.2"),
        (None, 1.5, "1.5"),
        (None, math.nan, "nan"),
        (None, None, "either"),
        (3, 0.2, "not both"),
    ],
)
def test_a_target_that_cannot_be_is_refused(num_blocks: int | None, ratio: float | None, word: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        SearchTarget(num_blocks, ratio)
    assert word in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("num_blocks", "kinds", "most"), [(8, "both", 7), (9, "both", 7), (4, "mha", 3), (7, "mlp", 3)]
)
def test_a_target_of_all_blocks_is_refused_before_anything_is_scored(
    tmp_path: Path, num_blocks: int, kinds: BlockKinds, most: int
) -> None:
    scorer = FakeScorer(random_nll(0))
    with pytest.raises(ConfigurationError, match=f"at most {most}") as caught:
        search(tmp_path, scorer, kinds=kinds).run(SearchTarget(num_blocks=num_blocks))
    assert "\n" not in str(caught.value)
    assert scorer.num_computed == 0


def test_all_blocks_but_one_can_go(tmp_path: Path) -> None:
    steps = search(tmp_path, FakeScorer(random_nll(0))).run(SearchTarget(num_blocks=7))
    assert len({step.block for step in steps}) == 7


def test_more_blocks_later_continue_and_fewer_read_the_prefix(tmp_path: Path) -> None:
    nll = random_nll(11, num_sequences=2)
    whole = search(tmp_path / "whole", FakeScorer(nll, 2)).run(SearchTarget(num_blocks=6))
    first, second, third = FakeScorer(nll, 2), FakeScorer(nll, 2), FakeScorer(nll, 2)
    short = search(tmp_path / "parts", first).run(SearchTarget(num_blocks=2))
    long = search(tmp_path / "parts", second).run(SearchTarget(num_blocks=6))
    prefix = search(tmp_path / "parts", third).run(SearchTarget(num_blocks=4))
    assert without_seconds(short) == without_seconds(whole)[:2]
    assert without_seconds(long) == without_seconds(whole)
    assert without_seconds(prefix) == without_seconds(whole)[:4]
    assert (first.num_computed, second.num_computed, third.num_computed) == (2 * 15, 2 * (6 + 5 + 4 + 3), 0)


def test_a_ratio_reads_the_steps_of_a_search_by_number(tmp_path: Path) -> None:
    search(tmp_path, FakeScorer(ORDERED), sizes=SIZES).run(SearchTarget(num_blocks=5))
    scorer = FakeScorer(ORDERED)
    steps = search(tmp_path, scorer, sizes=SIZES).run(SearchTarget(ratio=0.1))
    assert [step.ratio for step in steps] == CUMULATIVE[:3]
    assert scorer.num_computed == 0


@pytest.mark.parametrize("dies_after", [1, 5, 16, 17, 30, 44])
def test_a_killed_search_goes_on_and_ends_with_the_same_trace(tmp_path: Path, dies_after: int) -> None:
    """Eight candidates of two sequences: 16 updates in the first step, 14 in the second, 12, 10."""
    nll = random_nll(3, num_sequences=2)
    whole = search(tmp_path / "whole", FakeScorer(nll, 2)).run(SearchTarget(num_blocks=4))
    killed = search(tmp_path / "killed", FakeScorer(nll, 2, dies_after=dies_after))
    with pytest.raises(InterruptionError):
        killed.run(SearchTarget(num_blocks=4))
    resumed = FakeScorer(nll, 2)
    steps = search(tmp_path / "killed", resumed).run(SearchTarget(num_blocks=4))
    assert without_seconds(steps) == without_seconds(whole)
    # What was reported was kept: nothing is computed twice.
    assert resumed.num_computed == 16 + 14 + 12 + 10 - dies_after


def test_a_search_killed_again_and_again_ends_with_the_same_trace(tmp_path: Path) -> None:
    nll = random_nll(4, num_sequences=2)
    whole = search(tmp_path / "whole", FakeScorer(nll, 2)).run(SearchTarget(num_blocks=4))
    deaths = 0
    while True:
        try:
            steps = search(tmp_path / "killed", FakeScorer(nll, 2, dies_after=3)).run(SearchTarget(num_blocks=4))
        except InterruptionError:
            deaths += 1
        else:
            break
    assert deaths == (16 + 14 + 12 + 10) // 3
    assert without_seconds(steps) == without_seconds(whole)


def test_progress_counts_up_to_its_total_and_says_what_was_taken_over(tmp_path: Path) -> None:
    nll = random_nll(5)
    with pytest.raises(InterruptionError):
        search(tmp_path, FakeScorer(nll, dies_after=11)).run(SearchTarget(num_blocks=3))
    reports: list[Progress] = []
    search(tmp_path, FakeScorer(nll), progress=reports.append).run(SearchTarget(num_blocks=3))
    assert [report.done for report in reports] == [11, 12, 13, 14, 15, 15, 16, 17, 18, 19, 20, 21]
    assert {report.total for report in reports} == {8 + 7 + 6}
    assert {report.resumed for report in reports} == {11}
    assert (reports[0].note, reports[-1].note) == ("step 2", "step 3")


@pytest.mark.parametrize("is_parallel", [False, True])
@pytest.mark.parametrize("num_blocks", [2, 4, 6])
def test_a_search_held_to_it_ends_with_what_can_be_repacked(tmp_path: Path, num_blocks: int, is_parallel: bool) -> None:
    repackable = Repackable(4, is_parallel)
    steps = search(tmp_path, FakeScorer(random_nll(3))).run(SearchTarget(num_blocks, repackable=repackable))
    removed: list[Block] = []
    for number, step in enumerate(steps, start=1):
        nats = {c.block: math.log(c.score) for c in step.candidates}
        assert step.block == repackable.choose(removed, nats)
        assert [c.block for c in step.candidates if c.chosen] == [step.block]
        assert sorted(c.rank for c in step.candidates) == list(range(1, len(step.candidates) + 1))
        removed.append(step.block)
        assert repackable.is_done(removed) == (number % 2 == 0)


def test_a_ratio_goes_on_until_the_model_can_be_repacked(tmp_path: Path) -> None:
    repackable = Repackable(4, is_parallel=False)
    free = search(tmp_path / "free", FakeScorer(random_nll(5))).run(SearchTarget(ratio=0.025))
    assert not repackable.is_done([step.block for step in free]), "else this shows nothing"
    steps = search(tmp_path / "held", FakeScorer(random_nll(5))).run(SearchTarget(ratio=0.025, repackable=repackable))
    assert repackable.is_done([step.block for step in steps])
    assert steps[-1].ratio >= 0.025
    assert not any(
        repackable.is_done([step.block for step in steps[:count]]) and steps[count - 1].ratio >= 0.025
        for count in range(1, len(steps))
    ), "it stops at the first step that is both"


@pytest.mark.parametrize(("num_blocks", "kinds"), [(3, "both"), (2, "mha")])
def test_what_cannot_end_repackable_is_refused(num_blocks: int, kinds: BlockKinds) -> None:
    sizes = dict.fromkeys(all_blocks(4, kinds), 10)
    with pytest.raises(ConfigurationError, match="stock_compatible") as caught:
        SearchTarget(num_blocks, repackable=Repackable(4, is_parallel=False)).check(sizes, 1000)
    assert "\n" not in str(caught.value)
