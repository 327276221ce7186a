"""The names of the export formats. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

ExportFormat = Literal["stock", "transformers", "decilm", "gguf", "zeroed"]
FormatChoice = Literal["auto", "stock", "transformers", "decilm", "gguf", "zeroed"]
"""'auto' takes the first of `AUTO_TAKES` that can hold the model."""

AUTO_TAKES: tuple[ExportFormat, ...] = ("stock", "transformers", "zeroed")

ExportDtype = Literal["float32", "float16", "bfloat16", "q8_0"]
"""How weights are stored; q8_0: 8 bits a value, and a scale for every 32."""

_OWN_DTYPES: Mapping[FormatChoice, tuple[ExportDtype, ...]] = {"gguf": ("float32", "float16", "bfloat16", "q8_0")}


def dtypes_of(name: FormatChoice) -> tuple[ExportDtype, ...]:
    """The dtypes that a format can be written in."""
    return _OWN_DTYPES.get(name, ("float32", "bfloat16"))
