"""The greedy search of BlockPruner: score every remaining block, remove the least important, again and again.

Knows how to rank, when to stop and how to go on from a journal. How a score is computed is the scorer's business; where
the journal lies is the caller's.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from blockpruner.blocks import Block
from blockpruner.errors import ConfigurationError
from blockpruner.journal import SearchJournal
from blockpruner.perplexity import perplexity
from blockpruner.progress import Progress, ProgressCallback, silent
from blockpruner.scoring.interface import Scorer
from blockpruner.scoring.table import ScoreTable
from blockpruner.trace import CandidateScore, SearchStep


@dataclass(frozen=True)
class SearchTarget:
    """When a search is done: after `num_blocks` removals, or at the first step whose ratio reaches `ratio`."""

    num_blocks: int | None = None
    ratio: float | None = None

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
        """Refuse a target that leaves no candidate block.

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
                return tuple(steps[:count])
        return None

    def num_steps(self, steps: Sequence[SearchStep], mean_ratio: float) -> int:
        """How many steps it will take in all: exact for `num_blocks`, for `ratio` estimated by a block's mean share."""
        if self.num_blocks is not None:
            return self.num_blocks
        assert self.ratio is not None
        reached = steps[-1].ratio if steps else 0.0
        return len(steps) + max(1, math.ceil((self.ratio - reached) / mean_ratio))


def rank(table: ScoreTable, scores: Sequence[float]) -> tuple[CandidateScore, ...]:
    """Rank the candidates of a complete table by score, least important first.

    Ties go to the block that comes first in the stream; scores that are not finite rank last.
    """
    order = sorted(
        range(len(scores)),
        key=lambda i: (not math.isfinite(scores[i]), scores[i] if math.isfinite(scores[i]) else 0.0, i),
    )
    ranks = {index: position for position, index in enumerate(order, start=1)}
    return tuple(
        CandidateScore(
            block=block,
            score=scores[index],
            perplexity=perplexity(table.nll_CB[index]),
            rank=ranks[index],
            chosen=ranks[index] == 1,
        )
        for index, block in enumerate(table.candidates)
    )


class GreedySearch:
    """Algorithm 1 of the paper (Zhong et al. 2025, section 3.2), resumable at every score."""

    def __init__(
        self,
        scorer: Scorer,
        sizes: Mapping[Block, int],
        num_parameters: int,
        journal: SearchJournal,
        progress: ProgressCallback = silent,
    ) -> None:
        """Search among the blocks of `sizes` (with their numbers of parameters), keeping every step in `journal`."""
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
        started = time.monotonic()
        removed = tuple(step.block for step in steps)
        candidates = tuple(block for block in self._sizes if block not in removed)
        table = self._journal.load_partial(removed, candidates, self._scorer.num_sequences)
        self._resumed += table.num_done
        total = self._candidates_before + sum(self._candidates_ahead(steps, target))

        def on_update(table: ScoreTable) -> None:
            self._journal.save_partial(removed, table)
            note = f"step {len(steps) + 1}"
            done = self._candidates_before + table.num_done
            self._progress(Progress(done, total, "candidates", note, self._resumed))

        on_update(table)
        self._scorer.fill(removed, table, on_update)
        self._candidates_before += len(candidates)
        return self._choose(steps, table, time.monotonic() - started)

    def _choose(self, steps: Sequence[SearchStep], table: ScoreTable, seconds: float) -> SearchStep:
        assert table.is_complete
        ranked = rank(table, [perplexity(nll_B) for nll_B in table.nll_CB])
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
            candidates=ranked,
        )

    def _candidates_ahead(self, steps: Sequence[SearchStep], target: SearchTarget) -> Iterator[int]:
        """How many candidates each step from here to the target will score."""
        mean_ratio = sum(self._sizes.values()) / len(self._sizes) / self._num_parameters
        for done in range(len(steps), target.num_steps(steps, mean_ratio)):
            yield max(1, len(self._sizes) - done)
