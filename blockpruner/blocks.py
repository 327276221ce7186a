"""The unit of pruning: one residual sub-block of one decoder layer. Plain data; knows no model.

A decoder of L layers is 2L blocks in the order MHA 0, MLP 0, MHA 1, MLP 1, ... (Zhong et al., Findings of ACL 2025,
section 3.1). `Block` values sort in that order.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from functools import total_ordering
from typing import Literal

from pydantic import BaseModel, ConfigDict, NonNegativeInt

BlockKinds = Literal["mha", "mlp", "both"]
"""Which kinds of blocks a search may remove; the paper calls `both` "mix"."""


class BlockKind(StrEnum):
    """What a residual block computes."""

    MHA = "mha"
    """Multi-head attention with its norm."""
    MLP = "mlp"
    """The feed-forward network (or mixture of experts) with its norm."""


@total_ordering
class Block(BaseModel):
    """One residual block: the attention or the feed-forward half of decoder layer `layer_index` (from 0)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    layer_index: NonNegativeInt
    block_kind: BlockKind

    @property
    def position(self) -> int:
        """Index of this block among all 2L blocks, in the order in which the residual stream meets them."""
        return 2 * self.layer_index + (self.block_kind is BlockKind.MLP)

    def __lt__(self, other: Block) -> bool:
        return self.position < other.position

    def __str__(self) -> str:
        return f"{self.block_kind}:{self.layer_index}"


def mha(layer_index: int) -> Block:
    """The attention block of a layer."""
    return Block(layer_index=layer_index, block_kind=BlockKind.MHA)


def mlp(layer_index: int) -> Block:
    """The feed-forward block of a layer."""
    return Block(layer_index=layer_index, block_kind=BlockKind.MLP)


def both_of(layer_index: int) -> tuple[Block, Block]:
    """Both blocks of a layer."""
    return mha(layer_index), mlp(layer_index)


def all_blocks(num_layers: int, kinds: BlockKinds = "both") -> tuple[Block, ...]:
    """Every block of a decoder of `num_layers` layers, of the kinds asked for, in stream order."""
    wanted = set(BlockKind) if kinds == "both" else {BlockKind(kinds)}
    return tuple(
        Block(layer_index=index, block_kind=kind) for index in range(num_layers) for kind in BlockKind if kind in wanted
    )


def survivors(num_layers: int, removed: Iterable[Block]) -> tuple[Block, ...]:
    """The blocks that remain, in stream order."""
    gone = set(removed)
    return tuple(block for block in all_blocks(num_layers) if block not in gone)


def removal_units(blocks: Iterable[Block], *, whole_layers: bool = False) -> dict[Block, tuple[Block, ...]]:
    """What leaves in one step, by the first block of it: each block alone, or the blocks of a layer together."""
    if not whole_layers:
        return {block: (block,) for block in sorted(blocks)}
    there = sorted(blocks)
    layers = sorted({block.layer_index for block in there})
    grouped = [tuple(block for block in there if block.layer_index == index) for index in layers]
    return {group[0]: group for group in grouped}
