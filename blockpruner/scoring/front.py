"""The sweep's walk: the trunk and all branches forked so far, from unit to unit.

The trunk is the model as pruned so far. At every candidate block a branch forks that skips the block; all branches go
through each later block together, in large batches. Tensors are never changed in place, so a front that is kept while
the walk goes on costs nothing but its memory.

Shapes: `B` sequences, `b` of a micro-batch, `K` branches of a chunk, `T` tokens, `D` hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from blockpruner.blocks import Block
from blockpruner.scoring.decoder import Decoder, Unit


@dataclass(frozen=True)
class Chunk:
    """Some branches that run as one batch; the last chunk of a front ends with the trunk."""

    skipped: tuple[Block, ...]
    """The block that each branch skips, in stream order; where whole layers go, the first of its layer."""
    hidden: Tensor
    """[K * b, T, D], branch by branch; in the last chunk the trunk's [b, T, D] follows."""


@dataclass(frozen=True)
class Front:
    """The stream of all branches forked so far, and of the trunk, before a unit."""

    position: int
    """Index of the unit that comes next."""
    chunks: tuple[Chunk, ...]

    @property
    def skipped(self) -> tuple[Block, ...]:
        """The block that each branch skips, in stream order."""
        return tuple(block for chunk in self.chunks for block in chunk.skipped)

    @property
    def num_bytes(self) -> int:
        """Memory that the front holds."""
        return sum(chunk.hidden.nbytes for chunk in self.chunks)


class Walk:
    """Takes fronts of one micro-batch from unit to unit, with the removed blocks and candidates of one search step."""

    def __init__(
        self, decoder: Decoder, removed: Collection[Block], candidates: Collection[Block], branches_per_chunk: int
    ) -> None:
        """Walk with `removed` skipped by all, a branch for each candidate, so many branches in one batch."""
        self._decoder = decoder
        self._removed = frozenset(removed)
        self._candidates = frozenset(candidates) - self._removed
        self._branches_per_chunk = branches_per_chunk

    def start(self, token_ids_bT: Tensor) -> Front:
        """The front before the first unit: the embedded tokens, and no branch yet."""
        return Front(0, (Chunk((), self._decoder.embed(token_ids_bT)),))

    def run(self, front: Front, keep: Callable[[Front], None]) -> Front:
        """The front after the last unit. `keep` sees the front before each unit that changes anything."""
        units = self._decoder.units[front.position :]
        self._decoder.expect(self._layers_ahead(units))
        for unit in units:
            if not self._removed.issuperset(unit.blocks):
                keep(front)
                front = self._advanced(unit, front)
        return Front(len(self._decoder.units), front.chunks)

    def _layers_ahead(self, units: Sequence[Unit]) -> tuple[int, ...]:
        running = (unit.layer_index for unit in units if not self._removed.issuperset(unit.blocks))
        return tuple(dict.fromkeys(running))

    def _advanced(self, unit: Unit, front: Front) -> Front:
        gone = self._removed.intersection(unit.blocks)
        *full, last = front.chunks
        num_sequences = last.hidden.shape[0] // (len(last.skipped) + 1)
        trunk_bTD = last.hidden[-num_sequences:]
        forks = [block for block in unit.blocks if block in self._candidates]
        chunks = [Chunk(chunk.skipped, self._decoder.run(unit, chunk.hidden, gone)) for chunk in full]
        after = Chunk(last.skipped, self._decoder.run(unit, last.hidden, gone))
        for block in forks:
            without = gone.union(unit.leaving_with(block))
            branch_bTD = trunk_bTD if without.issuperset(unit.blocks) else self._decoder.run(unit, trunk_bTD, without)
            *closed, after = self._forked(after, block, branch_bTD)
            chunks += closed
        return Front(unit.index + 1, (*chunks, after))

    def _forked(self, last: Chunk, block: Block, branch_bTD: Tensor) -> list[Chunk]:
        """The last chunk with one more branch; when it is full, the trunk goes on in a chunk of its own."""
        num_sequences = branch_bTD.shape[0]
        branches, trunk_bTD = last.hidden[:-num_sequences], last.hidden[-num_sequences:]
        skipped = (*last.skipped, block)
        if len(skipped) < self._branches_per_chunk:
            return [Chunk(skipped, torch.cat([branches, branch_bTD, trunk_bTD]))]
        # A copy of the trunk: a slice would keep the whole old chunk alive.
        return [Chunk(skipped, torch.cat([branches, branch_bTD])), Chunk((), trunk_bTD.clone())]
