"""One micro-batch of a search step as a request and its answer: plain data that can go to another process.

Whoever answers needs to know nothing of the search: a request says what is removed, what is asked for and how it is
cut. Nothing here knows how requests travel.

Shapes: `C` candidates, `b` sequences of a micro-batch.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, replace

from torch import Tensor

from blockpruner.blocks import Block
from blockpruner.errors import BlockPrunerError
from blockpruner.scoring.layer_measures import LayerMeasure
from blockpruner.scoring.plan import SweepCut
from blockpruner.scoring.sweep import TRUNK, SweepScorer
from blockpruner.scoring.table import ScoreTable
from blockpruner.scoring.work import Meter


@dataclass(frozen=True)
class BatchRequest:
    """What one worker is to compute."""

    cut: SweepCut
    start: int
    """The micro-batch's first sequence."""
    stop: int
    removed: tuple[Block, ...] = ()
    candidates: tuple[Block, ...] = ()
    """None of them: the NLL without the removed blocks is asked for, or a measure of the layers."""
    ranking: tuple[Block, ...] = ()
    """The candidates as they ranked in the step before."""
    measure: LayerMeasure | None = None
    """Asked for of every layer of the unpruned model."""

    @property
    def batch(self) -> slice:
        """The micro-batch's sequences."""
        return slice(self.start, self.stop)


@dataclass(frozen=True)
class BatchScores:
    """A micro-batch's values, and what they took."""

    nll_Cb: Tensor
    """float64, mean token NLL in nats of each sequence without each candidate; one row where there is none, and the
    measure where one was asked for, a row a layer."""
    divergence_Cb: Tensor
    """float64, in nats; NaN where the metric has none."""
    flops: float
    flops_saved: float
    tokens: int


@dataclass(frozen=True)
class TooLittleMemory:
    """The device cannot do it with this cut."""

    smaller: SweepCut
    """The next one to try."""


@dataclass(frozen=True)
class Refused:
    """It cannot be done, for a reason that the user can do something about."""

    reason: str


Reply = BatchScores | TooLittleMemory | Refused


def answer(scorer: SweepScorer, request: BatchRequest) -> Reply:
    """Compute what a request asks for, with its cut. Snapshots are given up for it, if need be; the cut is not."""
    if scorer.plan.cut != request.cut:
        scorer.snapshots.close()
        scorer.use(replace(scorer.plan, cut=request.cut))
    scorer.rank_by(request.ranking)
    rows = request.candidates or ((TRUNK,) if request.measure is None else [unit.blocks[0] for unit in scorer.units])
    table = ScoreTable.empty(rows, scorer.num_sequences)
    before = copy(scorer.meter)
    try:
        while not _entered(scorer, request, table):
            if scorer.plan.cut != request.cut:
                return TooLittleMemory(scorer.plan.cut)
    except BlockPrunerError as error:
        return Refused(str(error))
    return _scores(table, request.batch, before, scorer.meter)


def _entered(scorer: SweepScorer, request: BatchRequest, table: ScoreTable) -> bool:
    if request.candidates:
        return scorer.score_batch(request.removed, request.batch, table)
    if request.measure is not None:
        return scorer.measured_batch(request.measure, request.batch, table)
    return scorer.trunk_batch(request.removed, request.batch, table)


def _scores(table: ScoreTable, batch: slice, before: Meter, after: Meter) -> BatchScores:
    return BatchScores(
        nll_Cb=table.nll_CB[:, batch].clone(),
        divergence_Cb=table.divergence_CB[:, batch].clone(),
        flops=after.flops - before.flops,
        flops_saved=after.flops_saved - before.flops_saved,
        tokens=after.tokens - before.tokens,
    )
