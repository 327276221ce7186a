"""The sweep: score every candidate in one walk through the network.

The trunk is the model as pruned so far. At every candidate block a branch forks that skips the block; all branches go
through each later block together, in large batches. So the stream before a fork is computed once for all, half the work
of a forward per candidate is saved, and weights are read once. The numbers are those of a forward per candidate.

Tensors are never changed in place, so a branch that forks is a reference to the trunk.

Shapes: `B` sequences, `b` of a micro-batch, `T` tokens, `D` hidden.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from blockpruner.architectures import Architecture
from blockpruner.blocks import Block
from blockpruner.scoring.decoder import Decoder, Unit
from blockpruner.scoring.interface import TableCallback
from blockpruner.scoring.loss import chunks, token_nll
from blockpruner.scoring.table import ScoreTable

_CPU_FRONT_BYTES = 2**29
"""Memory for trunk and branches of a micro-batch on a CPU; more would not be faster."""
_CPU_BATCH_ELEMENTS = 2**20
"""Hidden-state elements that run as one batch on a CPU: what its caches can serve."""
_CUDA_BATCH_ELEMENTS = 2**27
"""Hidden-state elements that run as one batch on a GPU: enough to keep its matrix units busy."""
_MICRO_BATCHES = 8
"""A step has at least so many, where there are so many sequences: each is a checkpoint and a report of progress."""
_LOGIT_ELEMENTS = 2**23
"""Logits that exist at one time."""


@dataclass(frozen=True)
class Branches:
    """Some branches that run as one batch."""

    skipped: tuple[Block, ...]
    """The block that each branch skips, in stream order."""
    hidden: Tensor
    """[len(skipped) * b, T, D], branch by branch."""


@dataclass(frozen=True)
class Front:
    """The stream of the trunk and of all branches forked so far, between two units."""

    trunk_bTD: Tensor
    branches: tuple[Branches, ...] = ()


class Sweep:
    """One walk for one micro-batch, with the removed blocks and candidates of one search step."""

    def __init__(
        self, decoder: Decoder, removed: Collection[Block], candidates: Collection[Block], branches_per_batch: int
    ) -> None:
        """Walk with `removed` skipped by all, a branch for each candidate, so many branches in one batch."""
        self._decoder = decoder
        self._removed = frozenset(removed)
        self._candidates = frozenset(candidates)
        self._branches_per_batch = branches_per_batch

    def run(self, token_ids_bT: Tensor) -> tuple[Branches, ...]:
        """Every candidate's branch after the last layer."""
        front = Front(self._decoder.embed(token_ids_bT))
        for unit in self._decoder.units:
            front = self._advance(unit, front)
        return front.branches

    def _advance(self, unit: Unit, front: Front) -> Front:
        gone = self._removed.intersection(unit.blocks)
        forks = [block for block in unit.blocks if block in self._candidates and block not in gone]
        branches = list(front.branches)
        trunk_bTD = front.trunk_bTD
        if len(gone) < len(unit.blocks):
            branches = [Branches(part.skipped, self._decoder.run(unit, part.hidden, gone)) for part in branches]
            trunk_bTD = self._decoder.run(unit, trunk_bTD, gone)
        for block in forks:
            self._append(branches, block, self._forked(unit, front.trunk_bTD, gone, block))
        return Front(trunk_bTD, tuple(branches))

    def _forked(self, unit: Unit, trunk_bTD: Tensor, gone: frozenset[Block], block: Block) -> Tensor:
        """The trunk after the unit without `block`: unchanged, where the block is all that is left of the unit."""
        without = gone.union({block})
        return trunk_bTD if without.issuperset(unit.blocks) else self._decoder.run(unit, trunk_bTD, without)

    def _append(self, branches: list[Branches], block: Block, hidden_bTD: Tensor) -> None:
        if branches and len(branches[-1].skipped) < self._branches_per_batch:
            last = branches.pop()
            branches.append(Branches((*last.skipped, block), torch.cat([last.hidden, hidden_bTD])))
        else:
            branches.append(Branches((block,), hidden_bTD))


class SweepScorer:
    """Scores all candidates of a step in one sweep for each micro-batch of sequences."""

    def __init__(
        self, architecture: Architecture, model: PreTrainedModel, token_ids_BT: Tensor, batch_size: int | None = None
    ) -> None:
        """Score on token ids [B, T], `batch_size` sequences in a micro-batch (None: what memory allows)."""
        self._decoder = Decoder(architecture, model, int(token_ids_BT.shape[1]))
        self._token_ids_BT = token_ids_BT
        text_config = model.config.get_text_config()
        self._vocab_size: int = text_config.vocab_size
        self._sequence_elements: int = int(token_ids_BT.shape[1]) * text_config.hidden_size
        self._element_bytes = model.dtype.itemsize
        self._batch_size = batch_size

    @property
    def num_sequences(self) -> int:
        """Number of calibration sequences, B."""
        return int(self._token_ids_BT.shape[0])

    @torch.inference_mode()
    def fill(self, removed: tuple[Block, ...], table: ScoreTable, on_update: TableCallback) -> None:
        """See `Scorer.fill`. Goes micro-batch by micro-batch, all candidates of one at once."""
        step = self._batch_size or self._sequences_that_fit(len(table.candidates))
        branches_per_batch = max(1, self._batch_elements() // (step * self._sequence_elements))
        sweep = Sweep(self._decoder, removed, table.candidates, branches_per_batch)
        for start in range(0, self.num_sequences, step):
            columns = slice(start, min(start + step, self.num_sequences))
            if not bool(table.done_CB[:, columns].all()):
                self._fill_columns(sweep, columns, table)
                on_update(table)

    def _fill_columns(self, sweep: Sweep, columns: slice, table: ScoreTable) -> None:
        token_ids_bT = self._token_ids_BT[columns].to(self._decoder.device)
        row = 0  # branches fork in stream order, which is the order of the table's rows
        for branches in sweep.run(token_ids_bT):
            assert branches.skipped == table.candidates[row : row + len(branches.skipped)]
            for hidden_bTD in branches.hidden.split(token_ids_bT.shape[0]):
                table.fill(slice(row, row + 1), columns, self._nll(hidden_bTD, token_ids_bT)[None])
                row += 1

    def _nll(self, hidden_bTD: Tensor, token_ids_bT: Tensor) -> Tensor:
        """Each sequence's mean token NLL from the last layer's output: float64 [b]."""
        final_MD = self._decoder.final_hidden(hidden_bTD)[:, :-1].flatten(0, 1)
        targets_M = token_ids_bT[:, 1:].flatten()
        chunk_tokens = max(1, _LOGIT_ELEMENTS // self._vocab_size)
        parts = [
            token_nll(self._decoder.logits(final_MD[chunk]), targets_M[chunk])
            for chunk in chunks(len(targets_M), chunk_tokens)
        ]
        return torch.cat(parts).view(token_ids_bT.shape[0], -1).double().mean(dim=1)

    def _sequences_that_fit(self, num_candidates: int) -> int:
        """Sequences of a micro-batch whose trunk and branches fit the memory meant for them; at least one."""
        stream_bytes = self._sequence_elements * self._element_bytes
        budget = _CPU_FRONT_BYTES
        if self._decoder.device.type == "cuda":
            # The rest is for one batch of branches within a layer, and for what the allocator cannot use.
            budget = int(torch.cuda.mem_get_info(self._decoder.device)[0] * 0.4)
        fit = min(math.ceil(self.num_sequences / _MICRO_BATCHES), budget // ((num_candidates + 1) * stream_bytes))
        return max(1, fit)

    def _batch_elements(self) -> int:
        return _CUDA_BATCH_ELEMENTS if self._decoder.device.type == "cuda" else _CPU_BATCH_ELEMENTS
