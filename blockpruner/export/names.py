"""The names of the export formats. Imports nothing heavy."""

from __future__ import annotations

from typing import Literal

ExportFormat = Literal["stock", "transformers", "zeroed", "gguf"]
FormatChoice = Literal["auto", "stock", "transformers", "zeroed", "gguf"]
"""'auto' takes the first that can hold the model: stock, transformers, zeroed."""

FOR_OTHER_ENGINES: frozenset[FormatChoice] = frozenset({"gguf"})
"""What transformers does not load, so that it cannot be evaluated here."""

GgufType = Literal["f32", "f16", "bf16", "q8_0"]
"""How a GGUF file stores its matrices."""
