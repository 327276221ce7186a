"""The greedy search of BlockPruner: score every remaining block, remove the least important, again and again.

Knows how to rank, when to stop and how to go on from a journal. How a score is computed is the scorer's business; where
the journal lies is the caller's.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from blockpruner.blocks import Block
from blockpruner.errors import ConfigurationError
from blockpruner.journal import SearchJournal
from blockpruner.perplexity import perplexity
from blockpruner.progress import Progress, ProgressCallback, Throughput, silent
from blockpruner.repackable import Repackable
from blockpruner.scoring.interface import Scorer
from blockpruner.scoring.metrics import Metric, metric_of
from blockpruner.scoring.table import ScoreTable
from blockpruner.scoring.work import Meter
from blockpruner.trace import CandidateScore, SearchStep

logger = logging.getLogger(__name__)


Choose = Callable[[Mapping[Block, float]], Block]
"""Chooses the block to remove by every candidate's score in nats a token."""


@dataclass(frozen=True)
class SearchTarget:
    """When a search is done: after `num_blocks` removals, or at the first step whose ratio reaches `ratio`.

    With `repackable`, the model must then be one that can be repacked into an unchanged model of its family: removals
    are chosen so that it will be, and a search for a ratio goes on until it is.
    """

    num_blocks: int | None = None
    ratio: float | None = None
    repackable: Repackable | None = None

    def __post_init__(self) -> None:
        if (self.num_blocks is None) == (self.ratio is None):
            raise ConfigurationError(
                "give either a number of blocks (--num-blocks) or a ratio (--ratio), not both or none"
            )
        if self.num_blocks is not None and self.num_blocks < 1:
            raise ConfigurationError(f"num_blocks is {self.num_blocks}; it must be at least 1")
        if self.ratio is not None and not 0 < self.ratio < 1:
            raise ConfigurationError(f"ratio is {self.ratio}; it must lie between 0 and 1, both excluded")

    def check(self, sizes: Mapping[Block, int], total: int) -> None:
        """Refuse a target that leaves no candidate block, or that no choice of blocks can end in.

        Args:
            sizes: parameters of every block that may be removed.
            total: parameters of the whole model.

        Raises:
            ConfigurationError: saying how far the search can go.
        """
        if self.num_blocks is not None and self.num_blocks >= len(sizes):
            raise ConfigurationError(
                f"num_blocks is {self.num_blocks}, but only {len(sizes)} blocks may be removed and one must stay; "
                f"give at most {len(sizes) - 1}"
            )
        if self.repackable is not None:
            self.repackable.check(sizes, self.num_blocks)
        reachable = (sum(sizes.values()) - max(sizes.values())) / total
        if self.ratio is not None and self.ratio > reachable:
            raise ConfigurationError(
                f"ratio is {self.ratio}, but removing all blocks but one reaches {reachable:.4f} of the parameters; "
                "give a smaller ratio"
            )

    def prefix(self, steps: Sequence[SearchStep]) -> tuple[SearchStep, ...] | None:
        """The first steps that reach the target, or None if they do not reach it yet."""
        for count, step in enumerate(steps, start=1):
            if count == self.num_blocks or (self.ratio is not None and step.ratio >= self.ratio):
                reached = tuple(steps[:count])
                if self.repackable is None or self.repackable.is_done([each.block for each in reached]):
                    return reached
        return None

    def num_steps(self, steps: Sequence[SearchStep], mean_ratio: float) -> int:
        """How many steps it will take in all: exact for `num_blocks`, for `ratio` estimated by a block's mean share."""
        if self.num_blocks is not None:
            return self.num_blocks
        assert self.ratio is not None
        reached = steps[-1].ratio if steps else 0.0
        return len(steps) + max(1, math.ceil((self.ratio - reached) / mean_ratio))


def rank(
    table: ScoreTable, metric: Metric, noise_nats: float = 0.0, choose: Choose | None = None
) -> tuple[CandidateScore, ...]:
    """Rank the candidates of a complete table by score, least important first, and choose.

    Ties go to the block that comes first in the stream; scores that are not finite rank last. The first is chosen,
    unless `choose` chooses another. A candidate whose score is within `noise_nats` of the chosen one's is marked as
    tied: on another machine it might have been chosen.
    """
    means = [metric.mean_nats(nll_B, divergence_B) for nll_B, divergence_B in _rows(table)]
    scores = [metric.score(nll_B, divergence_B) for nll_B, divergence_B in _rows(table)]
    order = sorted(
        range(len(scores)),
        key=lambda i: (not math.isfinite(scores[i]), scores[i] if math.isfinite(scores[i]) else 0.0, i),
    )
    ranks = {index: position for position, index in enumerate(order, start=1)}
    nats = dict(zip(table.candidates, means, strict=True))
    chosen = order[0] if choose is None else table.candidates.index(choose(nats))
    return tuple(
        CandidateScore(
            block=block,
            score=scores[index],
            perplexity=perplexity(table.nll_CB[index]),
            rank=ranks[index],
            chosen=index == chosen,
            tied=index != chosen and abs(means[index] - means[chosen]) <= noise_nats,
        )
        for index, block in enumerate(table.candidates)
    )


def _rows(table: ScoreTable) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(table.nll_CB, table.divergence_CB, strict=True)


class GreedySearch:
    """Algorithm 1 of the paper (Zhong et al. 2025, section 3.2), resumable at every score."""

    def __init__(
        self,
        scorer: Scorer,
        sizes: Mapping[Block, int],
        num_parameters: int,
        journal: SearchJournal,
        progress: ProgressCallback = silent,
        metric: Metric | None = None,
        noise_nats: float = 0.0,
    ) -> None:
        """Search among the blocks of `sizes` (with their numbers of parameters), keeping every step in `journal`.

        Candidates closer to the chosen one than `noise_nats`, the arithmetic's own uncertainty, are marked as ties.
        """
        self._metric = metric or metric_of("perplexity")
        self._noise_nats = noise_nats
        self._scorer = scorer
        self._sizes = dict(sorted(sizes.items()))
        self._num_parameters = num_parameters
        self._journal = journal
        self._progress = progress
        self._candidates_before = 0
        self._resumed = 0

    def run(self, target: SearchTarget) -> tuple[SearchStep, ...]:
        """Search until the target is reached; steps already in the journal are taken from it."""
        target.check(self._sizes, self._num_parameters)
        steps = self._journal.steps()
        self._candidates_before = self._resumed = sum(len(step.candidates) for step in steps)
        while (reached := target.prefix(steps)) is None:
            steps.append(self._next_step(steps, target))
            self._journal.append(steps[-1])
        return reached

    def _next_step(self, steps: Sequence[SearchStep], target: SearchTarget) -> SearchStep:
        started, work_before = time.monotonic(), copy(self._scorer.meter)
        removed = tuple(step.block for step in steps)
        candidates = tuple(block for block in self._sizes if block not in removed)
        table = self._journal.load_partial(removed, candidates, self._scorer.num_sequences)
        self._resumed += table.num_done
        total = self._candidates_before + sum(self._candidates_ahead(steps, target))

        def on_update(table: ScoreTable) -> None:
            self._journal.save_partial(removed, table)
            note = f"step {len(steps) + 1}"
            done = self._candidates_before + table.num_done
            self._progress(Progress(done, total, "candidates", note, self._resumed, _throughput(self._scorer.meter)))

        on_update(table)
        self._scorer.fill(removed, table, on_update)
        self._candidates_before += len(candidates)
        work_saved = self._scorer.meter.share_saved_since(work_before)
        return self._choose(steps, table, time.monotonic() - started, work_saved, target)

    def _choose(
        self,
        steps: Sequence[SearchStep],
        table: ScoreTable,
        seconds: float,
        work_saved: float,
        target: SearchTarget,
    ) -> SearchStep:
        assert table.is_complete
        removed_so_far = [step.block for step in steps]
        choose = partial(target.repackable.choose, removed_so_far) if target.repackable else None
        ranked = rank(table, self._metric, self._noise_nats, choose)
        _say_broken(len(steps) + 1, ranked)
        best = next(candidate for candidate in ranked if candidate.chosen)
        removed = (steps[-1].num_parameters_removed if steps else 0) + self._sizes[best.block]
        return SearchStep(
            step=len(steps) + 1,
            block=best.block,
            score=best.score,
            perplexity=best.perplexity,
            num_parameters_removed=removed,
            ratio=removed / self._num_parameters,
            seconds=seconds,
            work_saved=work_saved,
            candidates=ranked,
        )

    def _candidates_ahead(self, steps: Sequence[SearchStep], target: SearchTarget) -> Iterator[int]:
        """How many candidates each step from here to the target will score."""
        mean_ratio = sum(self._sizes.values()) / len(self._sizes) / self._num_parameters
        for done in range(len(steps), target.num_steps(steps, mean_ratio)):
            yield max(1, len(self._sizes) - done)


def _throughput(meter: Meter) -> Throughput | None:
    return Throughput(meter.tokens, meter.flops_per_s, meter.mfu) if meter.flops else None


def _say_broken(step: int, ranked: Sequence[CandidateScore]) -> None:
    broken = [str(candidate.block) for candidate in ranked if not math.isfinite(candidate.score)]
    if broken:
        logger.warning(
            "step %d: without %s the model's predictions are not finite; such blocks rank last", step, ", ".join(broken)
        )
