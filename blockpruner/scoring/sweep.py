"""The sweep: score every candidate in one walk through the network. Exact, and the search's default.

The stream before a fork is computed once for all, half the work of a forward per candidate is saved, weights are read
once for a large batch, and what the last removal left as it was is taken from snapshots. The numbers are those of a
forward per candidate.

Shapes: `B` sequences, `b` of a micro-batch, `K` branches, `T` tokens, `M` = b (T - 1) predicted tokens, `D` hidden.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from blockpruner.blocks import Block, BlockKind, both_of
from blockpruner.errors import ConfigurationError
from blockpruner.scoring.decoder import Decoder, Unit
from blockpruner.scoring.front import Chunk, Front, Walk
from blockpruner.scoring.host_memory import HostCopies
from blockpruner.scoring.interface import TableCallback
from blockpruner.scoring.layer_measures import LayerMeasure
from blockpruner.scoring.loss import TokenLosses
from blockpruner.scoring.metrics import Metric
from blockpruner.scoring.plan import SweepCut, SweepPlan
from blockpruner.scoring.snapshots import SnapshotStore, choose_positions
from blockpruner.scoring.table import ScoreTable
from blockpruner.scoring.work import Costs, Meter

logger = logging.getLogger(__name__)

MakeLosses = Callable[[SweepCut], TokenLosses]


class SweepScorer:
    """Scores all candidates of a step in one sweep for each micro-batch of sequences."""

    def __init__(
        self,
        decoder: Decoder,
        token_ids_BT: Tensor,
        metric: Metric,
        plan: SweepPlan,
        costs: Costs,
        make_losses: MakeLosses,
        meter: Meter,
        on_plan: Callable[[SweepPlan], None] = lambda _: None,
        num_workers: int = 1,
    ) -> None:
        """Score on token ids [B, T], cut as `plan` says. `scoring.build` puts the parts together.

        `on_plan` is told when the plan had to shrink. Where `num_workers` scorers share the micro-batches of a search,
        each keeps snapshots of its share of them only.
        """
        self._on_plan = on_plan
        self._num_workers = num_workers
        self._decoder = decoder
        self._token_ids_BT = token_ids_BT
        self.metric = metric
        self.costs = costs
        self._make_losses = make_losses
        self._meter = meter
        self._dense_BTD: Tensor | None = None
        self._is_dense_known_B = torch.zeros(len(token_ids_BT), dtype=torch.bool)
        self._rank_before: dict[Block, int] = {}
        self.use(plan)

    @property
    def num_sequences(self) -> int:
        """Number of calibration sequences, B."""
        return int(self._token_ids_BT.shape[0])

    @property
    def meter(self) -> Meter:
        """What was computed so far, and how fast."""
        return self._meter

    @property
    def units(self) -> tuple[Unit, ...]:
        """The parts of the model that a sweep goes through, in order."""
        return self._decoder.units

    @property
    def plan(self) -> SweepPlan:
        """How the sweep is cut now."""
        return self._plan

    def dense_nll(self) -> Tensor:
        """Each sequence's mean token NLL in nats of the unpruned model: float64 [B] on the CPU."""
        return self.nll_without(())

    def nll_without(self, removed: tuple[Block, ...]) -> Tensor:
        """See `SurveyScorer.nll_without`."""
        table = ScoreTable.empty((TRUNK,), self.num_sequences)
        while not table.is_complete:
            self.trunk_batch(removed, self._next_batch(table), table)
        return table.nll_CB[0]

    def measure_layers(self, measure: LayerMeasure) -> Tensor:
        """See `SurveyScorer.measure_layers`; needs a decoder of whole layers."""
        table = ScoreTable.empty([unit.blocks[0] for unit in self.units], self.num_sequences)
        while not table.is_complete:
            self.measured_batch(measure, self._next_batch(table), table)
        return table.nll_CB

    def fill(self, removed: tuple[Block, ...], table: ScoreTable, on_update: TableCallback) -> None:
        """See `Scorer.fill`. Goes micro-batch by micro-batch, all candidates of one at once."""
        self._meter.start()
        while not table.is_complete:
            if self.score_batch(removed, self._next_batch(table), table):
                on_update(table)
        self.rank_by(ranking(table, self.metric))

    @torch.inference_mode()
    def score_batch(self, removed: tuple[Block, ...], batch: slice, table: ScoreTable) -> bool:
        """Compute and enter the values of all of a table's candidates for one micro-batch.

        Returns:
            Whether it was done; if not, the device had too little memory, and the plan is smaller now.

        Raises:
            ConfigurationError: if no plan is small enough.
        """
        return self._attempt(partial(self._fill_columns, removed, batch, table))

    @torch.inference_mode()
    def trunk_batch(self, removed: tuple[Block, ...], batch: slice, table: ScoreTable) -> bool:
        """`score_batch` for the model without the removed blocks, which is the only row of the table."""
        return self._attempt(partial(self._trunk_columns, removed, batch, table))

    @torch.inference_mode()
    def measured_batch(self, measure: LayerMeasure, batch: slice, table: ScoreTable) -> bool:
        """`score_batch` for a measure of every layer, each a row of the table; needs a decoder of whole layers."""
        assert all(unit.blocks == both_of(unit.layer_index) for unit in self.units)
        return self._attempt(partial(self._measured_columns, measure, batch, table))

    def rank_by(self, ranking: Sequence[Block]) -> None:
        """Expect the next removals among the first of these; it decides where snapshots are kept, and no score."""
        ranks = {block: rank for rank, block in enumerate(ranking, start=1)}
        if ranks != self._rank_before:
            self._rank_before = ranks
            self._steps.clear()

    def use(self, plan: SweepPlan) -> None:
        """Go on with another plan, and without the snapshots there are."""
        self._plan = plan
        self._steps: dict[tuple[object, ...], _Step] = {}
        self._losses = self._make_losses(plan.cut)
        host = HostCopies(self._decoder.device, plan.snapshot_bytes) if plan.snapshots_on_host else None
        self.snapshots = SnapshotStore(self._decoder.units, host)

    def _next_batch(self, table: ScoreTable) -> slice:
        """The next sequences that a table lacks values of, as many as go together."""
        first = int((~table.done_CB.all(dim=0)).nonzero()[0])
        return self._plan.cut.batch_of(first, self.num_sequences)

    def _attempt(self, compute: Callable[[], None]) -> bool:
        """Whether it was computed; if not, the device had too little memory, and there is a smaller plan.

        Raises:
            ConfigurationError: if no plan is small enough.
        """
        try:
            compute()
        except torch.OutOfMemoryError as error:
            plan = self._plan.smaller(self.snapshots.device_bytes, self._losses.vocab_size)
            if plan is None:
                raise ConfigurationError(
                    "the device has too little memory for one sequence and one branch; give a larger "
                    f"--memory-budget or a smaller --sequence-length ({_first_sentence(error)})"
                ) from error
        else:
            return True
        # Here, where the exception no longer holds the frames and their tensors.
        logger.warning("the device is out of memory: going on with smaller batches (%s)", plan)
        self.snapshots.close()
        self.use(plan)
        self._on_plan(plan)
        if self._decoder.device.type == "cuda":
            torch.cuda.empty_cache()
        return False

    def _step(self, removed: tuple[Block, ...], candidates: tuple[Block, ...], held: frozenset[int]) -> _Step:
        """What the micro-batches of one step share that have valid snapshots at the same positions."""
        key = (removed, candidates, held)
        if key not in self._steps:
            if not any(known[:2] == key[:2] for known in self._steps):
                self._steps.clear()  # those of the step before
            self._steps[key] = self._planned_step(removed, candidates, held)
        return self._steps[key]

    def _planned_step(self, removed: tuple[Block, ...], candidates: tuple[Block, ...], held: frozenset[int]) -> _Step:
        units, costs = self._decoder.units, self.costs.walk(self._decoder.units, removed, candidates)
        branches, sizes = 0, {}
        for unit in units:
            reachable = unit.index in held or unit.index > max(held, default=0)
            if reachable and not frozenset(removed).issuperset(unit.blocks):
                sizes[unit.index] = (branches + 1) * self._kept_stream_bytes
            branches += len(frozenset(candidates).intersection(unit.blocks))
        # Steep: on large shapes most removals were among the first three of the step before (H200, 2026-11-24).
        weights = [
            sum(1.0 / self._rank_before.get(block, 1) ** 2 for block in unit.blocks if block in candidates)
            for unit in units
        ]
        wanted = choose_positions(weights, costs, sizes, self._plan.snapshot_bytes)
        return _Step(Walk(self._decoder, removed, candidates, self._plan.cut.branches_per_chunk), costs, wanted)

    @property
    def _num_batches_kept(self) -> int:
        """Micro-batches of which snapshots are kept here: all, or one worker's share."""
        return math.ceil(math.ceil(self.num_sequences / self._plan.cut.micro_batch) / self._num_workers)

    @property
    def _kept_stream_bytes(self) -> int:
        """Of the hidden states, without branches, of the sequences of which snapshots are kept here."""
        num_sequences = min(self.num_sequences, self._num_batches_kept * self._plan.cut.micro_batch)
        hidden = self._decoder.hidden_size * self._decoder.dtype.itemsize
        return num_sequences * int(self._token_ids_BT.shape[1]) * hidden

    def _fill_columns(self, removed: tuple[Block, ...], batch: slice, table: ScoreTable) -> None:
        """Compute and enter a micro-batch's values."""
        if self.metric.divergence is not None and not bool(self._is_dense_known_B[batch].all()):
            self._trunk_columns((), batch, ScoreTable.empty((TRUNK,), self.num_sequences))
        token_ids_bT = self._token_ids_BT[batch].to(self._decoder.device)
        held = self.snapshots.positions(batch.start, removed, table.candidates)
        step = self._step(removed, table.candidates, held)
        front = self.snapshots.front_at(batch.start, max(held)) if held else step.walk.start(token_ids_bT)
        self.snapshots.drop_except(batch.start, held & step.wanted)
        self.snapshots.drop_oldest(self._num_batches_kept)
        begun = front.position

        def keep(passed: Front) -> None:
            if passed.position in step.wanted - held:
                self.snapshots.keep(batch.start, passed, removed)

        front = step.walk.run(front, keep)
        assert front.skipped == table.candidates  # branches fork in stream order, the order of the table's rows
        losses = [self._chunk_losses(chunk, batch, token_ids_bT) for chunk in front.chunks if chunk.skipped]
        table.fill(slice(None), batch, *_stacked(losses))
        tokens, saved = token_ids_bT.numel(), step.costs[begun]
        self._meter.add((step.costs[-1] - saved) * tokens, saved * tokens, tokens * len(table.candidates))

    def _trunk_columns(self, removed: tuple[Block, ...], batch: slice, table: ScoreTable) -> None:
        """Enter the pruned model's NLL; of the dense one keep the last layer's output where a divergence needs it."""
        token_ids_bT = self._token_ids_BT[batch].to(self._decoder.device)
        walk = Walk(self._decoder, removed, (), self._plan.cut.branches_per_chunk)
        hidden_bTD = walk.run(walk.start(token_ids_bT), lambda _: None).chunks[-1].hidden
        trunk = Chunk((TRUNK,), hidden_bTD)
        nll_Kb, _ = self._chunk_losses(trunk, batch, token_ids_bT, divergent=False)
        table.fill(slice(None), batch, nll_Kb)
        if self.metric.divergence is not None and not removed:
            self._keep_dense(batch, hidden_bTD)

    def _keep_dense(self, batch: slice, hidden_bTD: Tensor) -> None:
        if self._dense_BTD is None:
            shape = (*self._token_ids_BT.shape, self._decoder.hidden_size)
            self._dense_BTD = torch.empty(shape, dtype=self._decoder.dtype)
        self._dense_BTD[batch] = hidden_bTD.cpu()
        self._is_dense_known_B[batch] = True

    def _measured_columns(self, measure: LayerMeasure, batch: slice, table: ScoreTable) -> None:
        """Enter a measure of every layer of the dense model."""
        hidden_bTD = self._decoder.embed(self._token_ids_BT[batch].to(self._decoder.device))
        self._decoder.expect(tuple(unit.layer_index for unit in self.units))
        for row, unit in enumerate(self.units):
            output_bTD = self._decoder.run(unit, hidden_bTD)
            table.fill(slice(row, row + 1), batch, measure(hidden_bTD, output_bTD)[None])
            hidden_bTD = output_bTD

    def _chunk_losses(
        self, chunk: Chunk, batch: slice, token_ids_bT: Tensor, *, divergent: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """Means over each sequence's predicted tokens, NLL and divergence: float64 [K, b] each, on the device."""
        num_sequences, num_branches = len(token_ids_bT), len(chunk.skipped)
        branches = chunk.hidden[: num_branches * num_sequences]
        hidden_KMD = branches[:, :-1].reshape(num_branches, -1, branches.shape[-1])
        dense_MD = self._dense_hidden(batch) if divergent else None
        losses = self._losses.of(hidden_KMD, token_ids_bT[:, 1:].flatten(), dense_MD)
        nll, divergence = (
            None if values is None else values.view(num_branches, num_sequences, -1).double().mean(-1)
            for values in losses
        )
        assert nll is not None
        return nll, divergence

    def _dense_hidden(self, batch: slice) -> Tensor | None:
        """The dense model's last layer's output on a micro-batch's predicting tokens: [M, D]."""
        if self.metric.divergence is None:
            return None
        assert self._dense_BTD is not None
        return self._dense_BTD[batch, :-1].flatten(0, 1).to(self._decoder.device)


@dataclass(frozen=True)
class _Step:
    """What all micro-batches of one step share."""

    walk: Walk
    costs: list[int]
    """Operations a token before each unit, and in all."""
    wanted: frozenset[int]
    """Where to keep snapshots."""


TRUNK = Block(layer_index=0, block_kind=BlockKind.MHA)
"""Names the only row of a table for one model."""


def _stacked(losses: list[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, Tensor | None]:
    divergences = [divergence for _, divergence in losses if divergence is not None]
    return torch.cat([nll for nll, _ in losses]), torch.cat(divergences) if divergences else None


def ranking(table: ScoreTable, metric: Metric) -> tuple[Block, ...]:
    """The candidates of a complete table by their scores: the first are likely to be the next to go."""
    rows = zip(table.nll_CB, table.divergence_CB, table.candidates, strict=True)
    order = sorted((metric.mean_nats(nll_B, divergence_B), block) for nll_B, divergence_B, block in rows)
    return tuple(block for _, block in order)


def _first_sentence(error: BaseException) -> str:
    return str(error).partition(". ")[0]
