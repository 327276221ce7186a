"""A configuration with fewer layers: every list with an entry a layer follows, or the export is refused."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any

from blockpruner.errors import ExportError
from blockpruner.export.source import ExportSource

_BY_ATTENTION = ("layer_types", "no_rope_layers", "no_rope_layer_interval")
"""Lists with an entry a layer that says how its attention works."""
_PERIOD = "sliding_window_pattern"
_WITH_PERIOD = frozenset({"cohere2", "gemma3_text"})
"""Families for which some engines read no list but this number: every so many layers one has no window."""
_DENSE_LAYERS = "mlp_only_layers"
_MIXTURE_STEP = "decoder_sparse_step"


def fewer_layers(source: ExportSource, attentions: Sequence[int], mlps: Sequence[int | None]) -> dict[str, Any]:
    """The changes to config.json for layers whose blocks come from these layers of the original.

    Args:
        source: the model.
        attentions: for each new layer, the original layer of its attention.
        mlps: likewise of its feed-forward block; None where it does not matter.

    Raises:
        ExportError: if a setting depends on the layer's number in a way that cannot be kept.
    """
    config = source.config
    name = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    changes: dict[str, Any] = {name: len(attentions)}
    if getattr(config, "scale_attn_by_inverse_layer_idx", False) and list(attentions) != list(range(len(attentions))):
        raise ExportError(
            "attention scores of this GPT-2 are scaled by the layer's number (scale_attn_by_inverse_layer_idx), which "
            "fewer layers would change"
        )
    for key in _BY_ATTENTION:
        values = getattr(config, key, None)  # derived where the source does not list them
        if isinstance(values, list) and len(values) == source.num_layers:
            changes[key] = [values[index] for index in attentions]
    if "layer_types" in changes and "max_window_layers" in source.checkpoint.config:  # read where layer_types is absent
        changes["max_window_layers"] = sum(index < int(config.max_window_layers) for index in attentions)
    if "layer_types" in changes and (
        _PERIOD in source.checkpoint.config or source.checkpoint.model_type in _WITH_PERIOD
    ):
        # None where no number says it: engines that read it then fail, where their own default would be wrong in
        # silence.
        changes[_PERIOD] = window_period(changes["layer_types"])
    if hasattr(config, _MIXTURE_STEP):
        changes |= {_MIXTURE_STEP: 1, _DENSE_LAYERS: _dense_layers(config, mlps)}
    refuse_unknown_lists(source, changes)
    return changes


def window_period(layer_types: Sequence[str]) -> int | None:
    """The number of layers of which the last has no window and the others have one, all along; None if there is none.

    Numbered as engines do it: the layers p - 1, 2p - 1 and so on have none.
    """
    types = list(layer_types)
    if "full_attention" not in types or not set(types) <= {"full_attention", "sliding_attention"}:
        return None
    period = types.index("full_attention") + 1
    expected = ["sliding_attention" if (index + 1) % period else "full_attention" for index in range(len(types))]
    return period if types == expected else None


def _dense_layers(config: Any, mlps: Sequence[int | None]) -> list[int]:
    """The new layers whose feed-forward block is no mixture, as Qwen's mixtures decide it."""
    step, dense = int(getattr(config, _MIXTURE_STEP)), set(getattr(config, _DENSE_LAYERS) or ())
    is_dense = [mlp is not None and (mlp in dense or (mlp + 1) % step != 0) for mlp in mlps]
    return [new for new, value in enumerate(is_dense) if value]


def refuse_unknown_lists(source: ExportSource, known: Container[str]) -> None:
    """Refuse a source with a list of an entry a layer that nobody here knows what to do with.

    Raises:
        ExportError: naming the list.
    """
    for key, value in source.checkpoint.config.items():
        if isinstance(value, list) and len(value) == source.num_layers and key != "architectures" and key not in known:
            raise ExportError(
                f"config.json has a list {key!r} with an entry a layer, whose meaning is not known here, so that no "
                "layer can be left out"
            )
