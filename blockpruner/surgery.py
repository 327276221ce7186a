"""Where the surviving blocks go in a smaller model. Plain data and names; touches no tensor.

In a sequential residual model only the order of the surviving blocks matters, so each attention may be paired with the
feed-forward blocks that follow it, whatever layers they came from.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pydantic import BaseModel, ConfigDict

from blockpruner.architectures import Architecture
from blockpruner.blocks import Block, BlockKind, survivors
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


def stock_names(architecture: Architecture, packed: PackedModel) -> dict[str, str]:
    """Old prefix to new prefix of every surviving module, for the family's own layer layout."""
    assert packed.is_stock
    names: dict[str, str] = {}
    for new, layer in enumerate(packed.layers):
        names |= _prefixes(architecture, layer.mha, architecture.mha.modules, f"{architecture.layers}.{new}")
        names |= _prefixes(architecture, layer.mlps[0], architecture.mlp.modules, f"{architecture.layers}.{new}")
    return names


def custom_names(architecture: Architecture, packed: PackedModel) -> dict[str, str]:
    """Old prefix to new prefix of every surviving module, for the layout of one attention and a list of MLPs."""
    names: dict[str, str] = {}
    for new, layer in enumerate(packed.layers):
        prefix = f"{architecture.layers}.{new}"
        names |= _prefixes(architecture, layer.mha, architecture.mha.modules, prefix)
        for role, sources in (("leading_mlps", layer.leading_mlps), ("mlps", layer.mlps)):
            for position, source in enumerate(sources):
                names |= _prefixes(architecture, source, architecture.mlp.modules, f"{prefix}.{role}.{position}")
    return names


def _prefixes(architecture: Architecture, source: int, modules: Iterable[str], target: str) -> dict[str, str]:
    return {f"{architecture.layers}.{source}.{module}.": f"{target}.{module}." for module in modules}


def rename(tensor_name: str, names: dict[str, str]) -> str:
    """A decoder-layer tensor's name in the smaller model.

    Raises:
        KeyError: if the tensor belongs to no surviving module.
    """
    for old, new in names.items():
        if tensor_name.startswith(old):
            return new + tensor_name.removeprefix(old)
    raise KeyError(tensor_name)
