"""Facts about a source's attentions that several formats ask for."""

from __future__ import annotations

from blockpruner.blocks import BlockKind
from blockpruner.export.source import ExportSource


def head_dim(source: ExportSource) -> int:
    """Size of a head."""
    config = source.config
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def windowed_layers(source: ExportSource) -> frozenset[int]:
    """The layers whose attention has a window, however long; removed ones count as well."""
    config = source.config
    if not getattr(config, "sliding_window", None):
        return frozenset()
    types = getattr(config, "layer_types", None) or ["sliding_attention"] * source.num_layers
    return frozenset(index for index, kind in enumerate(types) if kind == "sliding_attention")


def window(source: ExportSource) -> int | None:
    """How many tokens, itself among them, a token sees in the surviving attentions with a window.

    None where there is no such attention, or the window is as long as a sequence may be.
    """
    attentions = {block.layer_index for block in source.kept if block.block_kind is BlockKind.MHA}
    if attentions.isdisjoint(windowed_layers(source)):
        return None
    length = int(source.config.sliding_window)
    return length if length < source.config.max_position_embeddings else None
