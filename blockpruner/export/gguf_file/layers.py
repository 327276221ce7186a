"""Which surviving blocks share a layer of the file. Plain data.

The file's layers are not the original's. In a sequential residual model only the order of the blocks matters, so an
attention takes the feed-forward block that follows it into its layer, from wherever that came; a block without such a
partner gets a layer of its own. No arrangement has fewer layers, and none needs fewer stand-ins: a feed-forward block
on its own costs nothing (llama.cpp skips a missing attention, which then has no key-value cache either), and only an
attention that another attention follows, or nothing, needs a feed-forward block of zeros beside it. The original's
numbering would need one more wherever an attention lost its own feed-forward block and the next layer its attention.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from blockpruner.blocks import Block, BlockKind, mha, mlp


@dataclass(frozen=True)
class FileLayer:
    """One layer of the file; numbers are layer indices of the original, None where a block is missing."""

    mha: int | None
    mlp: int | None

    @property
    def is_whole(self) -> bool:
        """Whether it has both blocks."""
        return self.mha is not None and self.mlp is not None


def file_layers(kept: Iterable[Block]) -> tuple[FileLayer, ...]:
    """Pair the surviving blocks, given in stream order."""
    layers: list[FileLayer] = []
    for block in kept:
        if block.block_kind is BlockKind.MHA:
            layers.append(FileLayer(block.layer_index, None))
        elif layers and layers[-1].mlp is None:
            layers[-1] = FileLayer(layers[-1].mha, block.layer_index)
        else:
            layers.append(FileLayer(None, block.layer_index))
    return tuple(layers)


def places(layers: Iterable[FileLayer]) -> dict[Block, int]:
    """The layer of the file that each block is in."""
    found: dict[Block, int] = {}
    for number, layer in enumerate(layers):
        if layer.mha is not None:
            found[mha(layer.mha)] = number
        if layer.mlp is not None:
            found[mlp(layer.mlp)] = number
    return found
