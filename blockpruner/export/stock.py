"""Format `stock`: the surviving blocks repacked into an unchanged model of the family, which every engine loads.

In a sequential residual model only the order of the surviving blocks matters. Where the blocks of a layer work side by
side, whole layers can go and nothing else can.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from blockpruner.blocks import Block
from blockpruner.errors import ExportError
from blockpruner.export.settings import fewer_layers
from blockpruner.export.source import ExportSource
from blockpruner.export.weights import write_tensors
from blockpruner.surgery import Places, stock_places, whole_layers


def check(source: ExportSource) -> None:
    """Refuse what this format cannot hold.

    Raises:
        ExportError: with the reason.
    """
    _settings(source, _layers(source))


def write(source: ExportSource, out_dir: Path, shard_bytes: int) -> None:
    """Write weights and config.json."""
    where = places(source)
    layers = _layers(source)
    numbers = {old: str(new) for new, (old, _) in enumerate(layers)}

    def new_name(name: str, block: Block | None) -> str | None:
        found = source.architecture.layer_of_tensor(name)
        if found is None:
            return name
        # What serves both blocks of a layer goes by the layer's number.
        place = numbers.get(found[1]) if block is None else where.get(block)
        return None if place is None else source.architecture.placed(name, place)

    write_tensors(source.tensors(new_name), out_dir, shard_bytes)
    settings = _settings(source, layers)
    (out_dir / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _settings(source: ExportSource, layers: list[tuple[int, int]]) -> dict[str, Any]:
    return source.settings(**fewer_layers(source, [mha for mha, _ in layers], [mlp for _, mlp in layers]))


def _layers(source: ExportSource) -> list[tuple[int, int]]:
    """For each new layer, the original layers of its attention and of its feed-forward block."""
    if source.architecture.is_parallel:
        kept = whole_layers(source.num_layers, source.removed)
        if not kept:
            raise ExportError(
                f"the two blocks of a {source.checkpoint.model_type} layer work side by side, so format stock leaves "
                "out whole layers only"
            )
        return [(index, index) for index in kept]
    if not source.packed.is_stock:
        raise ExportError(
            "format stock needs attention and feed-forward blocks that alternate, and the surviving ones do not, "
            "though those of another number of removed blocks may"
        )
    return [(layer.mha, layer.mlps[0]) for layer in source.packed.layers]


def places(source: ExportSource) -> Places:
    """The layer of each surviving block."""
    if source.architecture.is_parallel:
        numbers = {old: str(new) for new, (old, _) in enumerate(_layers(source))}
        return {block: numbers[block.layer_index] for block in source.kept}
    return stock_places(source.packed)
