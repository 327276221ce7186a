"""The greedy search of BlockPruner: score every remaining block, remove the least important, again and again.

Knows how to rank, when to stop and how to go on from a journal. How a score is computed is the scorer's business; where
the journal lies is the caller's. `Search` is what all strategies share; `ordered_search`, `collapse` hold the others.
"""

from __future__ import annotations

import logging
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from blockpruner.blocks import Block, removal_units
from blockpruner.errors import ConfigurationError
from blockpruner.journal import SearchJournal
from blockpruner.perplexity import perplexity
from blockpruner.progress import Progress, ProgressCallback, Throughput, silent
from blockpruner.repackable import Repackable
from blockpruner.scoring.interface import Scorer
from blockpruner.scoring.metrics import Metric, metric_of
from blockpruner.scoring.table import ScoreTable
from blockpruner.scoring.work import Meter
from blockpruner.trace import CandidateScore, LayerMerge, SearchStep

logger = logging.getLogger(__name__)


Choose = Callable[[Mapping[Block, float]], Block]
"""Chooses the block to remove by every candidate's score in nats a token."""


@dataclass(frozen=True)
class SearchTarget:
    """When a search is done: after `num_blocks` removals, or at the first step whose ratio reaches `ratio`.

    With `repackable`, the model must then be one that can be repacked into an unchanged model of its family: removals
    are chosen so that it will be, and a search for a ratio goes on until it is. With `whole_layers` both blocks of a
    layer leave together; where several layers do, the search may end with more than `num_blocks`.
    """

    num_blocks: int | None = None
    ratio: float | None = None
    repackable: Repackable | None = None
    whole_layers: bool = False

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
        units = [sum(sizes[block] for block in unit) for unit in self.units(sizes).values()]
        most, unit = (len(sizes) - 2, "layer") if self.whole_layers else (len(sizes) - 1, "block")
        if self.num_blocks is not None and self.num_blocks > most:
            raise ConfigurationError(
                f"num_blocks is {self.num_blocks}, but only {len(sizes)} blocks may be removed and one {unit} must "
                f"stay; give at most {most}"
            )
        if self.num_blocks is not None and self.whole_layers and self.num_blocks % 2:
            raise ConfigurationError(
                f"num_blocks is {self.num_blocks}, and this strategy removes whole layers, two blocks each; give an "
                "even number, or a ratio"
            )
        if self.repackable is not None:
            self.repackable.check(sizes, self.num_blocks)
        reachable = (sum(units) - max(units)) / total
        if self.ratio is not None and self.ratio > reachable:
            raise ConfigurationError(
                f"ratio is {self.ratio}, but removing all {unit}s but one reaches {reachable:.4f} of the parameters; "
                "give a smaller ratio"
            )

    def units(self, blocks: Iterable[Block]) -> dict[Block, tuple[Block, ...]]:
        """What leaves in one step, by the first block of it, in stream order."""
        return removal_units(blocks, whole_layers=self.whole_layers)

    def prefix(self, steps: Sequence[SearchStep]) -> tuple[SearchStep, ...] | None:
        """The first steps that reach the target, or None if they do not reach it yet."""
        num_removed = 0
        for count, step in enumerate(steps, start=1):
            num_removed += len(step.blocks)
            has_blocks = self.num_blocks is not None and num_removed >= self.num_blocks
            if has_blocks or (self.ratio is not None and step.ratio >= self.ratio):
                reached = tuple(steps[:count])
                if self.repackable is None or self.repackable.is_done(removed_by(reached)):
                    return reached
        return None

    def num_steps(self, steps: Sequence[SearchStep], mean_ratio: float) -> int:
        """How many steps it will take in all: exact for `num_blocks`, for `ratio` estimated by a step's mean share."""
        if self.num_blocks is not None:
            return math.ceil(self.num_blocks / (2 if self.whole_layers else 1))
        assert self.ratio is not None
        reached = steps[-1].ratio if steps else 0.0
        return len(steps) + max(1, math.ceil((self.ratio - reached) / mean_ratio))


def removed_by(steps: Sequence[SearchStep]) -> tuple[Block, ...]:
    """All blocks that are gone after some steps, in the order of their removal."""
    return tuple(block for step in steps for block in step.blocks)


def rank(
    table: ScoreTable, metric: Metric, noise_nats: float = 0.0, choose: Choose | None = None
) -> tuple[CandidateScore, ...]:
    """Rank the candidates of a complete table by score, least important first, and choose; see `rank_scores`."""
    means = [metric.mean_nats(nll_B, divergence_B) for nll_B, divergence_B in _rows(table)]
    scores = [metric.score(nll_B, divergence_B) for nll_B, divergence_B in _rows(table)]
    ranked = rank_scores(
        dict(zip(table.candidates, scores, strict=True)),
        dict(zip(table.candidates, means, strict=True)),
        noise_nats,
        choose,
    )
    return tuple(
        candidate.model_copy(update={"perplexity": perplexity(nll_B)})
        for candidate, nll_B in zip(ranked, table.nll_CB, strict=True)
    )


def rank_scores(
    scores: Mapping[Block, float], nats: Mapping[Block, float], noise_nats: float = 0.0, choose: Choose | None = None
) -> tuple[CandidateScore, ...]:
    """Rank candidates by score, least important first, and choose.

    Ties go to the block that comes first in the stream; scores that are not finite rank last. The first is chosen,
    unless `choose` chooses another. A candidate whose score is within `noise_nats` of the chosen one's is marked as
    tied: on another machine it might have been chosen.

    Args:
        scores: of every candidate, in stream order.
        nats: the same on the scale on which noise is measured.
        noise_nats: how far two scores lie apart that the arithmetic cannot tell apart.
        choose: chooses by `nats`.
    """
    order = sorted(
        enumerate(scores.values()),
        key=lambda each: (not math.isfinite(each[1]), each[1] if math.isfinite(each[1]) else 0.0, each[0]),
    )
    ranks = {index: position for position, (index, _) in enumerate(order, start=1)}
    chosen = list(scores)[order[0][0]] if choose is None else choose(nats)
    return tuple(
        CandidateScore(
            block=block,
            score=score,
            perplexity=None,
            rank=ranks[index],
            chosen=block == chosen,
            tied=block != chosen and abs(nats[block] - nats[chosen]) <= noise_nats,
        )
        for index, (block, score) in enumerate(scores.items())
    )


def _rows(table: ScoreTable) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(table.nll_CB, table.divergence_CB, strict=True)


class Search(ABC):
    """What all strategies share: step after step until the target is reached, each kept in a journal.

    A strategy tells the next step from those before it alone, and never from the target, so that a search to more
    blocks begins with one to fewer. (Removals for `SearchTarget.repackable` are the exception; its searches have an
    identity of their own for every target.)
    """

    def __init__(
        self,
        sizes: Mapping[Block, int],
        num_parameters: int,
        journal: SearchJournal,
        progress: ProgressCallback = silent,
    ) -> None:
        """Search among the blocks of `sizes` (with their numbers of parameters), keeping every step in `journal`."""
        self._sizes = dict(sorted(sizes.items()))
        self._num_parameters = num_parameters
        self._journal = journal
        self._progress = progress

    def run(self, target: SearchTarget) -> tuple[SearchStep, ...]:
        """Search until the target is reached; steps already in the journal are taken from it.

        Raises:
            ConfigurationError: if the target cannot be reached.
        """
        target.check(self._sizes, self._num_parameters)
        steps = self._journal.steps()
        self._begin(steps)
        while (reached := target.prefix(steps)) is None:
            steps.append(self._next_step(steps, target))
            self._journal.append(steps[-1])
        return reached

    @abstractmethod
    def _begin(self, steps: Sequence[SearchStep]) -> None:
        """Told once which steps were taken from the journal."""

    @abstractmethod
    def _next_step(self, steps: Sequence[SearchStep], target: SearchTarget) -> SearchStep:
        """Choose and score the next removal."""

    def _remaining(self, steps: Sequence[SearchStep], target: SearchTarget) -> dict[Block, tuple[Block, ...]]:
        """What can leave in the next step, by the first block of it."""
        removed = frozenset(removed_by(steps))
        return {block: unit for block, unit in target.units(self._sizes).items() if block not in removed}

    def _step(
        self,
        steps: Sequence[SearchStep],
        ranked: Sequence[CandidateScore],
        *,
        perplexity: float,
        seconds: float,
        work_saved: float = 0.0,
        merge: LayerMerge | None = None,
    ) -> SearchStep:
        """The step that follows from ranked candidates."""
        _say_broken(len(steps) + 1, ranked)
        best = next(candidate for candidate in ranked if candidate.chosen)
        before = steps[-1].num_parameters_removed if steps else 0
        removed = before + sum(self._sizes[block] for block in best.blocks)
        return SearchStep(
            step=len(steps) + 1,
            block=best.block,
            also=best.also,
            score=best.score,
            perplexity=perplexity,
            num_parameters_removed=removed,
            ratio=removed / self._num_parameters,
            seconds=seconds,
            work_saved=work_saved,
            candidates=tuple(ranked),
            merge=merge,
        )

    def _num_steps(self, steps: Sequence[SearchStep], target: SearchTarget) -> int:
        """How many steps it will take in all."""
        mean_ratio = sum(self._sizes.values()) / len(target.units(self._sizes)) / self._num_parameters
        return target.num_steps(steps, mean_ratio)


class GreedySearch(Search):
    """Algorithm 1 of the paper (Zhong et al. 2025, section 3.2), resumable at every score.

    With a target of whole layers, and a scorer of them, it is the search of SLEB (Song et al. 2024, Algorithm 1).
    """

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
        super().__init__(sizes, num_parameters, journal, progress)
        self._metric = metric or metric_of("perplexity")
        self._noise_nats = noise_nats
        self._scorer = scorer
        self._candidates_before = 0
        self._resumed = 0

    def _begin(self, steps: Sequence[SearchStep]) -> None:
        self._candidates_before = self._resumed = sum(len(step.candidates) for step in steps)

    def _next_step(self, steps: Sequence[SearchStep], target: SearchTarget) -> SearchStep:
        started, work_before = time.monotonic(), copy(self._scorer.meter)
        removed, units = removed_by(steps), self._remaining(steps, target)
        table = self._journal.load_partial(removed, tuple(units), self._scorer.num_sequences)
        self._resumed += table.num_done
        total = self._candidates_before + sum(self._candidates_ahead(steps, target))

        def on_update(table: ScoreTable) -> None:
            self._journal.save_partial(removed, table)
            note = f"step {len(steps) + 1}"
            done = self._candidates_before + table.num_done
            self._progress(Progress(done, total, "candidates", note, self._resumed, throughput(self._scorer.meter)))

        on_update(table)
        self._scorer.fill(removed, table, on_update)
        assert table.is_complete
        self._candidates_before += len(units)
        choose = partial(target.repackable.choose, removed) if target.repackable else None
        ranked = with_units(rank(table, self._metric, self._noise_nats, choose), units)
        best = next(candidate for candidate in ranked if candidate.chosen)
        assert best.perplexity is not None
        return self._step(
            steps,
            ranked,
            perplexity=best.perplexity,
            seconds=time.monotonic() - started,
            work_saved=self._scorer.meter.share_saved_since(work_before),
        )

    def _candidates_ahead(self, steps: Sequence[SearchStep], target: SearchTarget) -> Iterator[int]:
        """How many candidates each step from here to the target will score."""
        num_units = len(target.units(self._sizes))
        for done in range(len(steps), self._num_steps(steps, target)):
            yield max(1, num_units - done)


def with_units(
    ranked: Sequence[CandidateScore], units: Mapping[Block, tuple[Block, ...]]
) -> tuple[CandidateScore, ...]:
    """Candidates with the blocks that leave with them."""
    return tuple(each.model_copy(update={"also": units[each.block][1:]}) for each in ranked)


def throughput(meter: Meter) -> Throughput | None:
    """How fast a scorer works, once it has worked."""
    return Throughput(meter.tokens, meter.flops_per_s, meter.mfu) if meter.flops else None


def _say_broken(step: int, ranked: Sequence[CandidateScore]) -> None:
    broken = [str(candidate.block) for candidate in ranked if not math.isfinite(candidate.score)]
    if broken:
        logger.warning(
            "step %d: without %s the model's predictions are not finite; such blocks rank last", step, ", ".join(broken)
        )
