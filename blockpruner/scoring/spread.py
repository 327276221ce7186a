"""A scorer whose micro-batches are computed by several workers, wherever they are.

The driver hands out micro-batches as workers become free and enters what comes back. Which worker computed a value, and
in which order values came, changes no bit of it: every micro-batch is cut alike, and the table is reduced in its own
order. A worker that is lost is one less; its micro-batch is done again. Knows no process and no network: that is the
crew's business.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from blockpruner.blocks import Block, both_of
from blockpruner.errors import ConfigurationError, ExecutorError
from blockpruner.scoring.interface import TableCallback
from blockpruner.scoring.layer_measures import LayerMeasure
from blockpruner.scoring.metrics import Metric
from blockpruner.scoring.micro_batches import BatchRequest, BatchScores, Refused, Reply, TooLittleMemory
from blockpruner.scoring.plan import SweepCut
from blockpruner.scoring.sweep import TRUNK, ranking
from blockpruner.scoring.table import ScoreTable
from blockpruner.scoring.work import Meter

logger = logging.getLogger(__name__)

MOST_LOSSES = 3
"""Workers that one micro-batch may cost in a row; what takes more of them with it is no accident."""


@dataclass(frozen=True)
class Answered:
    """A worker is done with its request, and free."""

    worker: str
    reply: Reply


@dataclass(frozen=True)
class Joined:
    """A worker is there, and free."""

    worker: str


@dataclass(frozen=True)
class Lost:
    """A worker is gone, and its request with it."""

    worker: str
    reason: str


Event = Answered | Joined | Lost


class Crew(Protocol):
    """Workers that compute one request at a time each. Whoever is lost is replaced, where that is possible."""

    @property
    def workers(self) -> tuple[str, ...]:
        """The names of those that are there, busy or free. A name is used once."""
        ...

    def give(self, worker: str, request: BatchRequest) -> None:
        """Let a free worker compute a request."""
        ...

    def next_event(self) -> Event:
        """Wait until something happens.

        Raises:
            ExecutorError: if no worker is left, and none comes.
        """
        ...


@dataclass(frozen=True)
class _Task:
    request: BatchRequest
    table: ScoreTable


class SpreadScorer:
    """Scores all candidates of a step, each micro-batch on the worker that is free and knows it best."""

    def __init__(
        self,
        crew: Crew,
        num_sequences: int,
        num_layers: int,
        metric: Metric,
        cut: SweepCut,
        meter: Meter,
        on_cut: Callable[[SweepCut], None] = lambda _: None,
    ) -> None:
        """Score `num_sequences` calibration sequences with a crew, all of whose workers are to cut as `cut` says.

        The model has `num_layers`. `on_cut` is told when the cut had to shrink.
        """
        self._crew, self._num_sequences, self._num_layers, self._metric = crew, num_sequences, num_layers, metric
        self._cut, self._meter, self._on_cut = cut, meter, on_cut
        self._ranking: tuple[Block, ...] = ()
        self._tasks: dict[str, _Task] = {}
        self._home: dict[int, str] = {}
        """Who scored a micro-batch last, and has its snapshots."""
        self._losses: Counter[int] = Counter()

    @property
    def num_sequences(self) -> int:
        """Number of calibration sequences, B."""
        return self._num_sequences

    @property
    def meter(self) -> Meter:
        """What was computed so far by all, and how fast."""
        return self._meter

    @property
    def cut(self) -> SweepCut:
        """How all workers cut now."""
        return self._cut

    def dense_nll(self) -> Tensor:
        """Each sequence's mean token NLL in nats of the unpruned model: float64 [B] on the CPU."""
        return self.nll_without(())

    def nll_without(self, removed: tuple[Block, ...]) -> Tensor:
        """See `SurveyScorer.nll_without`."""
        table = ScoreTable.empty((TRUNK,), self._num_sequences)
        self._complete(table, partial(BatchRequest, removed=removed), lambda _: None)
        return table.nll_CB[0]

    def measure_layers(self, measure: LayerMeasure) -> Tensor:
        """See `SurveyScorer.measure_layers`."""
        layers = [both_of(layer_index)[0] for layer_index in range(self._num_layers)]
        table = ScoreTable.empty(layers, self._num_sequences)
        self._complete(table, partial(BatchRequest, measure=measure), lambda _: None)
        return table.nll_CB

    def fill(self, removed: tuple[Block, ...], table: ScoreTable, on_update: TableCallback) -> None:
        """See `Scorer.fill`.

        Raises:
            ConfigurationError: if a worker has too little memory for anything.
            ExecutorError: if no worker is left, or a micro-batch takes one after the other with it.
        """
        self._meter.start()
        asked = partial(BatchRequest, removed=removed, candidates=table.candidates, ranking=self._ranking)
        self._complete(table, asked, on_update)
        self._ranking = ranking(table, self._metric)

    def _complete(self, table: ScoreTable, asked: Callable[..., BatchRequest], on_update: TableCallback) -> None:
        """Hand out and enter until the table is complete."""
        while not table.is_complete:
            self._hand_out(table, asked)
            match self._crew.next_event():
                case Answered(worker, reply):
                    self._take(self._tasks.pop(worker), worker, reply, table, on_update)
                case Lost(worker, reason):
                    self._lose(worker, reason)
                case Joined():
                    pass

    def _take(self, task: _Task, worker: str, reply: Reply, table: ScoreTable, on_update: TableCallback) -> None:
        match reply:
            case BatchScores():
                self._home[task.request.start] = worker
                self._losses.pop(task.request.start, None)
                self._meter.add(reply.flops, reply.flops_saved, reply.tokens)
                task.table.fill(slice(None), task.request.batch, reply.nll_Cb, reply.divergence_Cb)
                if task.table is table:
                    on_update(table)
            case TooLittleMemory(smaller):
                self._shrink(smaller)
            case Refused(reason):
                raise ConfigurationError(reason)

    def _lose(self, worker: str, reason: str) -> None:
        task = self._tasks.pop(worker, None)
        if task is None:
            return
        request = task.request
        self._losses[request.start] += 1
        if self._losses[request.start] >= MOST_LOSSES:
            raise ExecutorError(
                f"{MOST_LOSSES} workers in a row were lost at sequences {request.start} to {request.stop - 1}; "
                f"the last: {reason}"
            )
        logger.warning("a worker was lost (%s): its part of the step is done again", reason)

    def _shrink(self, smaller: SweepCut) -> None:
        """One worker's memory decides for all; what was computed with the larger cut stays, as in one process."""
        cut = self._cut.within(smaller)
        if cut == self._cut:  # another worker's lack of memory has led there already
            return
        logger.warning("a worker's device is out of memory: all go on with smaller batches (%s)", cut)
        self._cut = cut
        self._home.clear()
        self._on_cut(cut)

    def _hand_out(self, table: ScoreTable, asked: Callable[..., BatchRequest]) -> None:
        """Give every free worker a micro-batch, first its own ones."""
        for choose in (self._own, self._other):
            for worker in self._crew.workers:
                if worker not in self._tasks and (batch := choose(worker, self._waiting(table))):
                    request = asked(cut=self._cut, start=batch.start, stop=batch.stop)
                    self._tasks[worker] = _Task(request, table)
                    self._crew.give(worker, request)

    def _waiting(self, table: ScoreTable) -> list[slice]:
        """The micro-batches that nobody has computed or is computing."""
        claimed_B = table.done_CB.all(dim=0)
        for task in self._tasks.values():
            if task.table is table:
                claimed_B[task.request.batch] = True
        size = self._cut.micro_batch
        numbers = torch.unique((~claimed_B).nonzero().flatten() // size)
        return [self._cut.batch_of(number * size, self._num_sequences) for number in numbers.tolist()]

    def _own(self, worker: str, waiting: list[slice]) -> slice | None:
        """The first that this worker has snapshots of."""
        return next((batch for batch in waiting if self._home.get(batch.start) == worker), None)

    def _other(self, worker: str, waiting: list[slice]) -> slice | None:
        """The first that nobody has snapshots of, else the last of whoever is furthest behind.

        A single one is left to the worker that has its snapshots: that worker is about to begin it.
        """
        there = self._crew.workers
        homes = {batch.start: self._home.get(batch.start) for batch in waiting}
        homeless = next((batch for batch in waiting if homes[batch.start] not in there), None)
        if homeless or not waiting:
            return homeless
        busiest, count = Counter(homes.values()).most_common(1)[0]
        return next(batch for batch in reversed(waiting) if homes[batch.start] == busiest) if count > 1 else None
