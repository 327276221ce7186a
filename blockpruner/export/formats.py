"""The formats by name: what each can hold, and which one is taken when none is asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from blockpruner.blocks import Block
from blockpruner.errors import ExportError
from blockpruner.export import custom, decilm, stock, zeroed
from blockpruner.export.names import ExportFormat, FormatChoice
from blockpruner.export.source import ExportSource
from blockpruner.export.verify import Verification, Verifier, verify
from blockpruner.export.verify_mlx import verify_with_mlx_lm
from blockpruner.loading import DtypeName


@dataclass(frozen=True)
class Format:
    """One format."""

    name: ExportFormat
    check: Callable[[ExportSource], None]
    """Raises ExportError, with the reason, for what the format cannot hold."""
    write: Callable[[ExportSource, Path, int], None]
    """Writes weights and configuration into a folder, in shards of so many bytes."""
    zeros: Callable[[ExportSource], tuple[Block, ...]] = lambda _: ()
    """The removed blocks that stay in the files, with zeros in their last projections."""
    verify: Verifier = verify
    """Compares what was written with the masked original."""


FORMATS: dict[ExportFormat, Format] = {
    "stock": Format("stock", stock.check, stock.write),
    "transformers": Format("transformers", custom.check, custom.write),
    "decilm": Format("decilm", decilm.check, decilm.write, decilm.carried, verify_with_mlx_lm),
    "zeroed": Format("zeroed", zeroed.check, zeroed.write, lambda source: source.removed),
}
_PREFERRED: tuple[ExportFormat, ...] = ("stock", "transformers", "zeroed")


def format_for(source: ExportSource, wanted: FormatChoice) -> Format:
    """The format asked for; for 'auto' the first that can hold the model: stock, custom code, zeros.

    Raises:
        ExportError: with the reason, and the formats that can, if the one asked for cannot hold the model.
    """
    if wanted == "auto":
        return next(FORMATS[name] for name in _PREFERRED if can_hold(source, name))
    try:
        FORMATS[wanted].check(source)
    except ExportError as error:
        able = " or ".join(name for name in FORMATS if can_hold(source, name))
        raise ExportError(f"{error}; what can hold it: --format {able}") from error
    return FORMATS[wanted]


def can_hold(source: ExportSource, name: ExportFormat) -> bool:
    """Whether a format can hold a model."""
    try:
        FORMATS[name].check(source)
    except ExportError:
        return False
    return True


def verify_export(
    name: ExportFormat,
    export_dir: Path,
    request: dict[str, Tensor],
    expected: dict[str, Tensor],
    *,
    device: str,
    dtype: DtypeName,
) -> Verification:
    """Compare an export with the masked original as its format has it done.

    Raises:
        ExportError: if a fresh process cannot load or run it.
    """
    return FORMATS[name].verify(export_dir, request, expected, device=device, dtype=dtype)
