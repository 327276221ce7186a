"""Removals that leave a model that can be repacked into an unchanged model of its family (`export.stock`).

Such a model has as many attention as feed-forward blocks, and they alternate; so blocks go in pairs. A search that is
held to it chooses pairs: the two whose scores, each taken alone, are lowest together. It removes the less important of
the two, and once all is scored anew the best one that completes a pair. (To let every removal be free that can still
be made good by later ones was tried, and ends in removals that nobody would choose: on the demo's model the perplexity
of 12 blocks was 2052 and not 1.6.)
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import groupby

from blockpruner.blocks import Block, BlockKind, survivors
from blockpruner.errors import ConfigurationError


def spare_blocks(num_layers: int, removed: Collection[Block], *, is_parallel: bool) -> int:
    """How many more blocks must go, at least, before the model can be repacked.

    Args:
        num_layers: layers of the original.
        removed: what is gone.
        is_parallel: whether the blocks of a layer work side by side, so that whole layers must go.
    """
    remaining = survivors(num_layers, removed)
    if is_parallel:  # a layer that has one block left must lose it
        return 2 * len({block.layer_index for block in remaining}) - len(remaining)
    kinds = [kind for kind, _ in groupby(block.block_kind for block in remaining)]
    # Of every run of one kind one block can stay; a leading feed-forward and a trailing attention cannot.
    pairs = (len(kinds) - (kinds[:1] == [BlockKind.MLP]) - (kinds[-1:] == [BlockKind.MHA])) // 2
    return len(remaining) - 2 * max(0, pairs)


@dataclass(frozen=True)
class Repackable:
    """The constraint for one model."""

    num_layers: int
    is_parallel: bool

    def is_done(self, removed: Collection[Block]) -> bool:
        """Whether the model can be repacked now."""
        return spare_blocks(self.num_layers, removed, is_parallel=self.is_parallel) == 0

    def choose(self, removed: Collection[Block], nats: Mapping[Block, float]) -> Block:
        """The next block to remove.

        Args:
            removed: what is gone: pairs, and perhaps one block more.
            nats: every candidate's score as a mean over tokens; NaN counts as infinity.
        """
        costs = {block: value if math.isfinite(value) else math.inf for block, value in nats.items()}
        completing = [block for block in costs if self.is_done((*removed, block))]
        if completing:
            return min(completing, key=lambda block: (costs[block], block))
        pairs = [
            (costs[one] + costs[other], one, other)
            for one in costs
            for other in costs
            if one < other and self.is_done((*removed, one, other))
        ]
        _, one, other = min(pairs)
        return min(one, other, key=lambda block: (costs[block], block))

    def check(self, candidates: Collection[Block], num_blocks: int | None) -> None:
        """Refuse what cannot end repackable.

        Raises:
            ConfigurationError: with the reason.
        """
        if len({block.block_kind for block in candidates}) < 2:
            raise ConfigurationError(
                "stock_compatible needs attention and feed-forward blocks to remove; give --block-kinds both"
            )
        if num_blocks is not None and (num_blocks % 2 or num_blocks > 2 * self.num_layers - 2):
            raise ConfigurationError(
                f"num_blocks is {num_blocks}, and an unchanged model has as many attention as feed-forward blocks; "
                f"with stock_compatible give an even number up to {2 * self.num_layers - 2}"
            )
