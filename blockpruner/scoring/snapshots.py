"""Fronts that are kept from one step to the next, so that a sweep need not begin at the embedding.

When a block is removed, every branch that forked before it, and the trunk up to it, are what they were: the next
step's sweep goes on from there, and computes the same numbers as a whole one. Where the next removal will be is not
known while the sweep runs; blocks that ranked low in the step before are the best guess.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush

from torch import Tensor

from blockpruner.blocks import Block
from blockpruner.scoring.decoder import Unit
from blockpruner.scoring.front import Chunk, Front
from blockpruner.scoring.host_memory import HostCopies, HostCopy, PinnedMemoryError

logger = logging.getLogger(__name__)


def choose_positions(
    removal_weights: Sequence[float],
    cost_before: Sequence[float],
    size_at: Mapping[int, int],
    budget_bytes: int,
) -> frozenset[int]:
    """Where to keep snapshots: again and again the one that saves most for its bytes, while the budget lasts.

    A removal in a unit lets the next sweep begin at the deepest snapshot that is not behind it.

    Args:
        removal_weights: how likely the next removal is in each unit.
        cost_before: work of a sweep before each unit.
        size_at: bytes of a snapshot of all sequences, by the positions where one can be had.
        budget_bytes: bytes of all snapshots together, at most.
    """
    saved_by_unit = [0.0] * len(removal_weights)
    kept: set[int] = set()
    left = budget_bytes

    def worth(position: int) -> float:
        units = range(position, len(removal_weights))
        gain = sum(removal_weights[unit] * max(0.0, cost_before[position] - saved_by_unit[unit]) for unit in units)
        return gain / size_at[position]

    # Whatever is kept, the others are never worth more than before: those whose old worth is less need no second look.
    queue = [(-worth(position), position) for position in size_at]
    heapify(queue)
    while queue:
        _, best = heappop(queue)
        if size_at[best] > left:
            continue
        now = worth(best)
        if queue and (-now, best) > queue[0]:
            heappush(queue, (-now, best))
            continue
        if now <= 0.0:
            break
        kept.add(best)
        left -= size_at[best]
        for unit in range(best, len(removal_weights)):
            saved_by_unit[unit] = max(saved_by_unit[unit], cost_before[best])
    return frozenset(kept)


@dataclass(frozen=True)
class Snapshot:
    """A kept front with what it was made with."""

    position: int
    """Index of the unit that comes next."""
    skipped: tuple[tuple[Block, ...], ...]
    """The blocks that the branches skip, chunk by chunk."""
    hidden: tuple[Tensor | HostCopy, ...]
    """Every chunk's hidden states."""
    removed: frozenset[Block]
    """The removed blocks that lie before the front."""


class SnapshotStore:
    """The snapshots of every micro-batch, on the device or in page-locked host memory."""

    def __init__(self, units: Sequence[Unit], host: HostCopies | None = None) -> None:
        """Keep the tensors of fronts as they are, or (`host`) their copies on the host."""
        self._blocks_before = [
            frozenset(block for unit in units[:end] for block in unit.blocks) for end in range(len(units))
        ]
        self._host = host
        self._is_full = False
        self._of_batch: dict[int, dict[int, Snapshot]] = {}

    def close(self) -> None:
        """Forget everything, once no copy is under way any more."""
        self._of_batch.clear()
        if self._host is not None:
            self._host.finish()

    @property
    def device_bytes(self) -> int:
        """Memory of the device that the snapshots hold; that of a tensor in two of them counts twice."""
        kept = (hidden for held in self._of_batch.values() for snapshot in held.values() for hidden in snapshot.hidden)
        return sum(hidden.nbytes for hidden in kept if isinstance(hidden, Tensor))

    def positions(self, start: int, removed: Collection[Block], candidates: Collection[Block]) -> frozenset[int]:
        """Where the micro-batch that begins at sequence `start` has snapshots that are valid for a sweep."""
        held = self._of_batch.get(start, {})
        return frozenset(at for at, snapshot in held.items() if self._is_valid(snapshot, removed, candidates))

    def front_at(self, start: int, position: int) -> Front:
        """The front that a micro-batch's snapshot holds."""
        snapshot = self._of_batch[start][position]
        chunks = (
            Chunk(skipped, self._loaded(hidden))
            for skipped, hidden in zip(snapshot.skipped, snapshot.hidden, strict=True)
        )
        return Front(position, tuple(chunks))

    def keep(self, start: int, front: Front, removed: Collection[Block]) -> None:
        """Keep a front that a sweep without `removed` has come to, if there is room on the host for its copy."""
        if self._is_full:
            return
        try:
            hidden = tuple(self._host.store(chunk.hidden) if self._host else chunk.hidden for chunk in front.chunks)
        except PinnedMemoryError as error:
            logger.warning("no more snapshots are kept: %s", error)
            self._is_full = True
            return
        self._of_batch.setdefault(start, {})[front.position] = Snapshot(
            position=front.position,
            skipped=tuple(chunk.skipped for chunk in front.chunks),
            hidden=hidden,
            removed=self._blocks_before[front.position].intersection(removed),
        )

    def drop_except(self, start: int, positions: Collection[int]) -> None:
        """Forget a micro-batch's snapshots at other positions."""
        held = self._of_batch.pop(start, {})
        for snapshot in held.values():
            if snapshot.position not in positions:
                self._give_back(snapshot)
        self._of_batch[start] = {at: snapshot for at, snapshot in held.items() if at in positions}

    def drop_oldest(self, num_batches: int) -> None:
        """Forget the micro-batches that were scored longest ago, until so many are left."""
        while len(self._of_batch) > num_batches:
            self.drop_except(next(iter(self._of_batch)), ())
            self._of_batch.popitem()  # which has just become the last

    def _is_valid(self, snapshot: Snapshot, removed: Collection[Block], candidates: Collection[Block]) -> bool:
        """Whether a sweep comes past the same front: no block before it has gone since, and the branches are its."""
        before = self._blocks_before[snapshot.position]
        branches = sorted(before.intersection(candidates).difference(removed))
        has = [block for skipped in snapshot.skipped for block in skipped]
        return snapshot.removed == before.intersection(removed) and has == branches

    def _loaded(self, hidden: Tensor | HostCopy) -> Tensor:
        if isinstance(hidden, Tensor):
            return hidden
        assert self._host is not None
        return self._host.load(hidden)

    def _give_back(self, snapshot: Snapshot) -> None:
        for hidden in snapshot.hidden:
            if self._host is not None and isinstance(hidden, HostCopy):
                self._host.give_back(hidden)
