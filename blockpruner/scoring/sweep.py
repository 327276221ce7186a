"""The sweep: score every candidate in one walk through the network.

The trunk is the model as pruned so far. At every candidate block a branch forks that skips the block; all branches go
through each later block together, in large batches. So the stream before a fork is computed once for all, half the work
of a forward per candidate is saved, and weights are read once. The numbers are those of a forward per candidate.

Tensors are never changed in place, so a branch that forks is a reference to the trunk, and a snapshot of the front costs
memory but no time.

Shapes: `B` sequences, `b` of a micro-batch, `T` tokens, `D` hidden.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from blockpruner.blocks import Block
from blockpruner.scoring.decoder import Decoder, Unit


@dataclass(frozen=True)
class Branches:
    """Some branches that run as one batch."""

    skipped: tuple[Block, ...]
    """The block that each branch skips, in stream order."""
    hidden: Tensor
    """[len(skipped) * b, T, D], branch by branch."""


@dataclass(frozen=True)
class Front:
    """The stream of the trunk and of all branches forked so far, at the entrance of one unit."""

    unit_index: int
    trunk_bTD: Tensor
    branches: tuple[Branches, ...] = ()

    @property
    def num_streams(self) -> int:
        """Trunk and branches."""
        return 1 + sum(len(branches.skipped) for branches in self.branches)


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

    def start(self, token_ids_bT: Tensor) -> Front:
        """The front at the first unit."""
        return Front(0, self._decoder.embed(token_ids_bT))

    def walk(self, front: Front) -> Iterator[Front]:
        """The front before each unit from `front` on, itself included, and last the one after the last unit."""
        yield front
        for unit in self._decoder.units[front.unit_index :]:
            front = self._advance(unit, front)
            yield front

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
        return Front(unit.index + 1, trunk_bTD, tuple(branches))

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


def rows_of(skipped: Sequence[Block], candidates: Sequence[Block]) -> list[int]:
    """Row of each skipped block in the score table."""
    positions = {block: row for row, block in enumerate(candidates)}
    return [positions[block] for block in skipped]
