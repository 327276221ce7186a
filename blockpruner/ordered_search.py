"""Strategies that score everything once, in the unpruned model, and remove in the order of the scores.

The scores of the first step stand for all later ones; what a step measures is the perplexity of the model that it
leaves, at one forward pass, so that every strategy has a curve of perplexity over what was removed. Of candidates that
stay nothing is measured in later steps, and nothing is written.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch

from blockpruner.blocks import Block
from blockpruner.journal import SearchJournal
from blockpruner.perplexity import perplexity
from blockpruner.progress import Progress, ProgressCallback, silent
from blockpruner.scoring.interface import SurveyScorer
from blockpruner.scoring.layer_measures import LayerMeasure, block_influence, relative_magnitude
from blockpruner.scoring.metrics import Metric, metric_of
from blockpruner.scoring.table import ScoreTable
from blockpruner.search import Search, SearchTarget, rank, rank_scores, removed_by, throughput, with_units
from blockpruner.strategies import Importance
from blockpruner.trace import CandidateScore, SearchStep

Scores = dict[Block, float]

_MEASURES: Mapping[Importance, LayerMeasure] = {
    "block_influence": block_influence,
    "relative_magnitude": relative_magnitude,
}


class OrderedSearch(Search):
    """One scoring, then removals from the lowest score on.

    Resumable at every removal, and where the metric is what scores, at every score.
    """

    def __init__(
        self,
        scorer: SurveyScorer,
        sizes: Mapping[Block, int],
        num_parameters: int,
        journal: SearchJournal,
        progress: ProgressCallback = silent,
        metric: Metric | None = None,
        noise_nats: float = 0.0,
        *,
        importance: Importance = "metric",
        seed: int = 0,
    ) -> None:
        """Search among the blocks of `sizes`, judged by `importance`; `seed` is that of a draw."""
        super().__init__(sizes, num_parameters, journal, progress)
        self._scorer = scorer
        self._metric = metric or metric_of("perplexity")
        self._noise_nats = noise_nats if importance == "metric" else 0.0
        self._importance = importance
        self._seed = seed
        self._resumed = 0

    def _begin(self, steps: Sequence[SearchStep]) -> None:
        self._resumed = len(steps)

    def _next_step(self, steps: Sequence[SearchStep], target: SearchTarget) -> SearchStep:
        started, removed, units = time.monotonic(), removed_by(steps), self._remaining(steps, target)
        self._report(steps, target, "scoring" if not steps else f"step {len(steps) + 1}")
        choose = partial(target.repackable.choose, removed) if target.repackable else None
        if steps:
            scores = {each.block: each.score for each in steps[0].candidates if each.block in units}
            ranked = rank_scores(scores, self._nats(scores), self._noise_nats, choose)
        else:
            ranked = self._first_ranking(tuple(units), choose, partial(self._report, steps, target))
        ranked = with_units(ranked, units)
        best = next(candidate for candidate in ranked if candidate.chosen)
        measured = best.perplexity
        if measured is None:
            measured = perplexity(self._scorer.nll_without((*removed, *best.blocks)))
            ranked = tuple(
                each.model_copy(update={"perplexity": measured}) if each is best else each for each in ranked
            )
        return self._step(steps, ranked, perplexity=measured, seconds=time.monotonic() - started)

    def _first_ranking(
        self,
        candidates: tuple[Block, ...],
        choose: Callable[[Mapping[Block, float]], Block] | None,
        report: Callable[[str], None],
    ) -> tuple[CandidateScore, ...]:
        if self._importance == "metric":
            return rank(self._filled(candidates, report), self._metric, self._noise_nats, choose)
        scores = self._drawn(candidates) if self._importance == "chance" else self._measured(candidates)
        return rank_scores(scores, scores, self._noise_nats, choose)

    def _filled(self, candidates: tuple[Block, ...], report: Callable[[str], None]) -> ScoreTable:
        """The metric without each candidate."""
        table = self._journal.load_partial((), candidates, self._scorer.num_sequences)

        def on_update(table: ScoreTable) -> None:
            self._journal.save_partial((), table)
            report(f"{table.num_done} of {len(candidates)} candidates")

        self._scorer.fill((), table, on_update)
        return table

    def _measured(self, candidates: tuple[Block, ...]) -> Scores:
        """A measure of each candidate's layer, over all tokens of the calibration set."""
        values_L: torch.Tensor = self._scorer.measure_layers(_MEASURES[self._importance]).mean(dim=1)
        return {block: float(values_L[block.layer_index]) for block in candidates}

    def _drawn(self, candidates: tuple[Block, ...]) -> Scores:
        """For each block a number between 0 and 1 that depends on the seed and the block alone."""
        return {block: random.Random(f"{self._seed} {block}").random() for block in candidates}

    def _nats(self, scores: Scores) -> Scores:
        """A perplexity is compared by its logarithm."""
        if self._importance != "metric" or self._metric.divergence is not None:
            return scores
        return {block: math.log(score) if math.isfinite(score) else score for block, score in scores.items()}

    def _report(self, steps: Sequence[SearchStep], target: SearchTarget, note: str) -> None:
        total = max(len(steps) + 1, self._num_steps(steps, target))
        self._progress(Progress(len(steps), total, "steps", note, self._resumed, throughput(self._scorer.meter)))
