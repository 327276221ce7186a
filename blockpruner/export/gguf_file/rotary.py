"""Rotary positions of a model in llama.cpp's words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from blockpruner.errors import ExportError
from blockpruner.export.gguf_file.families import Family, Heads


@dataclass(frozen=True)
class Rotary:
    """How positions turn queries and keys."""

    theta: float
    windowed_theta: float | None = None
    """In layers with a window, where other than elsewhere."""
    linear_factor: float = 1.0
    """Positions are divided by it, but in layers with a window where these have a theta of their own."""
    factors: Tensor | None = None
    """What each frequency is divided by [head_size / 2], float32; None: by one."""


def rotary_of(config: Any, family: Family) -> Rotary:
    """Read transformers' configuration.

    Raises:
        ExportError: for a kind of scaling that is not written here.
    """
    parameters: dict[str, Any] = dict(config.rope_parameters)
    windowed: dict[str, Any] = parameters.get("sliding_attention") or {}
    parameters = parameters.get("full_attention") or parameters
    kind, theta = parameters.get("rope_type", "default"), float(parameters["rope_theta"])
    windowed_theta = float(windowed["rope_theta"]) if windowed else None
    is_partial = (parameters.get("partial_rotary_factor") or 1.0) != 1.0
    if windowed.get("rope_type", "default") != "default" or is_partial:
        raise ExportError("format gguf writes rotary positions over whole heads, unscaled where attention has a window")
    if kind == "default":
        return Rotary(theta, windowed_theta)
    if kind == "linear" and (windowed or not family.has_windows):
        return Rotary(theta, windowed_theta, linear_factor=float(parameters["factor"]))
    if kind == "llama3" and family.reads_rotary_factors:
        return Rotary(theta, factors=_factors(config, theta))
    raise ExportError(
        f"format gguf does not write rotary positions of type {kind!r} for this family (linear scaling, and Llama 3's "
        "for Llama and Mistral, it does)"
    )


def _factors(config: Any, theta: float) -> Tensor:
    """Llama 3's scaling, frequency by frequency: those without it, divided by those with it."""
    size = Heads.of(config).head_size
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = theta ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
    return (plain / scaled.double()).float()
