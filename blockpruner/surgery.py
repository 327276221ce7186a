"""Where the surviving blocks go in a smaller model. Plain data; knows no family and touches no tensor.

In a sequential residual model only the order of the surviving blocks matters, so each attention may be paired with the
feed-forward blocks that follow it, whatever layers they came from.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pydantic import BaseModel, ConfigDict

from blockpruner.blocks import Block, BlockKind, mha, mlp, survivors
from blockpruner.errors import ExportError


class PackedLayer(BaseModel):
    """One layer of the smaller model; numbers are layer indices of the original."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mha: int
    leading_mlps: tuple[int, ...] = ()
    """Feed-forward blocks before the attention; only the first layer can have them."""
    mlps: tuple[int, ...]
    """Feed-forward blocks after the attention, up to the next attention."""


class PackedModel(BaseModel):
    """All layers of the smaller model, in order."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    layers: tuple[PackedLayer, ...]

    @property
    def is_stock(self) -> bool:
        """Whether attention and feed-forward alternate, so that the family's own model class holds the result."""
        return all(not layer.leading_mlps and len(layer.mlps) == 1 for layer in self.layers)


def pack(num_layers: int, removed: Iterable[Block]) -> PackedModel:
    """Pair each surviving attention with the feed-forward blocks that follow it.

    Raises:
        ExportError: if no attention survives; a cache of no layers is read wrongly by every engine.
    """
    remaining = survivors(num_layers, removed)
    heads = [index for index, block in enumerate(remaining) if block.block_kind is BlockKind.MHA]
    if not heads:
        raise ExportError("no attention block is left, and no engine loads such a model; export fewer removed blocks")
    leading = _layer_indices(remaining[: heads[0]])
    ends = [*heads[1:], len(remaining)]
    layers = [
        PackedLayer(
            mha=remaining[start].layer_index,
            leading_mlps=leading if start == heads[0] else (),
            mlps=_layer_indices(remaining[start + 1 : end]),
        )
        for start, end in zip(heads, ends, strict=True)
    ]
    return PackedModel(layers=tuple(layers))


def _layer_indices(blocks: Sequence[Block]) -> tuple[int, ...]:
    return tuple(block.layer_index for block in blocks)


Places = dict[Block, str]
"""Where each surviving block goes: the part of its tensors' names behind the layers' prefix, '3' or '3.mlps.0'."""


def stock_places(packed: PackedModel) -> Places:
    """In the family's own layout: both blocks of a layer under its new number."""
    assert packed.is_stock
    return {
        block: str(new) for new, layer in enumerate(packed.layers) for block in (mha(layer.mha), mlp(layer.mlps[0]))
    }


def custom_places(packed: PackedModel) -> Places:
    """In the layout of one attention and a list of feed-forward blocks."""
    places: Places = {}
    for new, layer in enumerate(packed.layers):
        places[mha(layer.mha)] = str(new)
        for role, sources in (("leading_mlps", layer.leading_mlps), ("mlps", layer.mlps)):
            places |= {mlp(source): f"{new}.{role}.{position}" for position, source in enumerate(sources)}
    return places


def whole_layers(num_layers: int, removed: Iterable[Block]) -> tuple[int, ...] | None:
    """The layers that remain, if every layer lost both of its blocks or none; else None."""
    remaining = set(survivors(num_layers, removed))
    kept = [{mha(index), mlp(index)} & remaining for index in range(num_layers)]
    if any(len(blocks) == 1 for blocks in kept):
        return None
    return tuple(index for index, blocks in enumerate(kept) if blocks)
