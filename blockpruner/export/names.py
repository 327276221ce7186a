"""The names of the export formats. Imports nothing heavy."""

from __future__ import annotations

from typing import Literal

ExportFormat = Literal["stock", "transformers", "decilm", "zeroed"]
FormatChoice = Literal["auto", "stock", "transformers", "decilm", "zeroed"]
"""'auto' takes the first that can hold the model: stock, transformers, zeroed."""
