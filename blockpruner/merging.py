"""Layers that become one (LaCo): what a kept layer's weights are after merges, in a loaded model and in a checkpoint.

Yang et al. 2024, section 3: the layers that follow layer l are merged into it by adding what each has more than it,
theta_l + sum over k of (theta_(l+k) - theta_l), and are gone. So a merged layer's weights are sums of the original
layers' with whole-numbered coefficients, and merges are kept as plain data. Attention and feed-forward weights are
merged; norms stay those of layer l, as in the authors' code. (That code subtracts the sum so far and not theta_l, which
leaves the weights of the last layer alone; here it is the paper's formula.)

Merged weights are rounded to the dtype in which the checkpoint holds them, everywhere, so that the model that was
searched is the one that is exported.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from blockpruner.architectures import Architecture
from blockpruner.checkpoint import Checkpoint
from blockpruner.errors import ConfigurationError
from blockpruner.export.weights import dtype_of
from blockpruner.trace import LayerMerge

Combination = Mapping[int, int]
"""Coefficient by original layer: 3 of layer 5 and -2 of layer 4."""


def combinations(merges: Iterable[LayerMerge]) -> dict[int, dict[int, int]]:
    """What each merged layer that is still there is made of, by its number in the original."""
    made: dict[int, dict[int, int]] = {}
    for merge in merges:
        parts = {1: [made.pop(index, {index: 1}) for index in merge.merged]}
        parts[1 - len(merge.merged)] = [made.get(merge.layer_index, {merge.layer_index: 1})]
        total: dict[int, int] = {}
        for factor, each in ((factor, each) for factor, group in parts.items() for each in group):
            for index, coefficient in each.items():
                total[index] = total.get(index, 0) + factor * coefficient
        made[merge.layer_index] = {index: total[index] for index in sorted(total) if total[index]}
    return made


def is_merged(name: str) -> bool:
    """Whether a layer's tensor of this name is merged: norms are not."""
    return not any("norm" in part or part.startswith("ln_") for part in name.split("."))


def combined(parts: Sequence[tuple[int, Tensor]], stored: torch.dtype) -> Tensor:
    """The sum of tensors with coefficients, taken in float32 in the order given, in the dtype of the checkpoint."""
    total = torch.zeros_like(parts[0][1], dtype=torch.float32)
    for coefficient, tensor in parts:
        total += coefficient * tensor.float()
    return total.to(stored)


class MergedLayers:
    """The layers of a loaded model, which can be given merged weights and their own again."""

    def __init__(self, architecture: Architecture, model: nn.Module, stored: torch.dtype) -> None:
        """Work on the layers of `model`, whose checkpoint holds them as `stored`."""
        self._layers = architecture.decoder_layers(model)
        self._stored = stored
        self._originals: dict[int, dict[str, Tensor]] = {}
        self._now: dict[int, Combination] = {}

    @torch.no_grad()
    def use(self, merges: Sequence[LayerMerge]) -> None:
        """Let the layers have the weights that these merges give, and no others."""
        wanted = combinations(merges)
        for index in sorted({*wanted, *self._originals}):
            combination = wanted.get(index, {index: 1})
            if combination != self._now.get(index, {index: 1}):
                self._write(index, combination)
        self._now = {**wanted}

    def _write(self, index: int, combination: Combination) -> None:
        weights = dict(_merged_parameters(self._layers[index]))
        self._originals.setdefault(index, {name: tensor.detach().clone() for name, tensor in weights.items()})
        for name, parameter in weights.items():
            parts = [(coefficient, self._original(at, name)) for at, coefficient in combination.items()]
            is_own = combination == {index: 1}
            parameter.copy_(parts[0][1] if is_own else combined(parts, self._stored).to(parameter.dtype))

    def _original(self, index: int, name: str) -> Tensor:
        kept = self._originals.get(index)
        return kept[name] if kept is not None else self._layers[index].get_parameter(name)


def _merged_parameters(layer: nn.Module) -> Iterable[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in layer.named_parameters() if is_merged(name))


def check_mergeable(architecture: Architecture, shapes: nn.Module) -> None:
    """Refuse a model whose layers are not alike.

    Args:
        architecture: its row of the table.
        shapes: the model, also on the meta device.

    Raises:
        ConfigurationError: naming the first layer that differs.
    """
    layers = [
        {name: parameter.shape for name, parameter in _merged_parameters(layer)}
        for layer in architecture.decoder_layers(shapes)
    ]
    for index, layer in enumerate(layers):
        if layer != layers[0]:
            raise ConfigurationError(
                f"strategy laco adds layers' weights, and layer {index} has other weights than layer 0; take a "
                "strategy that merges nothing"
            )


def stored_dtype(architecture: Architecture, checkpoint: Checkpoint) -> torch.dtype:
    """The dtype in which a checkpoint holds the weights that can be merged.

    Raises:
        ConfigurationError: if they have several, or one that cannot be added up (quantized weights).
    """
    names = [
        name
        for name in checkpoint.tensors
        if (found := architecture.layer_of_tensor(name)) is not None and is_merged(found[2])
    ]
    dtypes = {dtype_of(checkpoint.tensors[name]) for name in names}
    floating = {dtype for dtype in dtypes if dtype.is_floating_point}
    others = dtypes - floating - {torch.bool}
    if len(floating) != 1 or others:
        held = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes)) or "none"
        raise ConfigurationError(
            f"strategy laco adds layers' weights, and those of {checkpoint.name} are held as {held}; give a model "
            "whose layers are all float32, bfloat16 or float16"
        )
    return floating.pop()
