"""The formats by name: what each can hold, and which one is taken when none is asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from blockpruner.blocks import Block
from blockpruner.checkpoint import COMPANION_FILES
from blockpruner.errors import ExportError
from blockpruner.export import custom, decilm, stock, zeroed
from blockpruner.export.gguf_file import format as gguf_file
from blockpruner.export.names import ExportFormat, FormatChoice, dtypes_of
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
    companions: tuple[str, ...] = COMPANION_FILES
    """Files of the source that go with it."""
    zeros: Callable[[ExportSource], tuple[Block, ...]] = lambda _: ()
    """The removed blocks that stay in the files, with zeros in their last projections."""
    verify: Verifier = verify
    """Compares what was written with the masked original."""
    coarsen: Callable[[PreTrainedModel, Path], None] | None = None
    """Rounds the original's weights as those in the folder are, where no dtype of torch says how."""


FORMATS: dict[ExportFormat, Format] = {
    "stock": Format("stock", stock.check, stock.write),
    "transformers": Format("transformers", custom.check, custom.write),
    "decilm": Format("decilm", decilm.check, decilm.write, zeros=decilm.carried, verify=verify_with_mlx_lm),
    "gguf": Format(
        "gguf",
        gguf_file.check,
        gguf_file.write,
        companions=gguf_file.COMPANIONS,
        verify=gguf_file.verify,
        coarsen=gguf_file.coarsen,
    ),
    "zeroed": Format("zeroed", zeroed.check, zeroed.write, zeros=lambda source: source.removed),
}
_PREFERRED: tuple[ExportFormat, ...] = ("stock", "transformers", "zeroed")


def format_for(source: ExportSource, wanted: FormatChoice) -> Format:
    """The format asked for; for 'auto' the first that can hold the model: stock, custom code, zeros.

    Raises:
        ExportError: with the reason, and the formats that can, if the one asked for cannot hold the model.
    """
    name = _preferred(source) if wanted == "auto" else wanted
    try:
        _check(source, name)
    except ExportError as error:
        able = " or ".join(name for name in FORMATS if can_hold(source, name))
        raise ExportError(f"{error}; what can hold it: --format {able}" if able else str(error)) from error
    return FORMATS[name]


def _preferred(source: ExportSource) -> ExportFormat:
    """Where none can hold the model, the last, to say why."""
    return next((name for name in _PREFERRED if can_hold(source, name)), _PREFERRED[-1])


def can_hold(source: ExportSource, name: ExportFormat) -> bool:
    """Whether a format can hold a model."""
    try:
        _check(source, name)
    except ExportError:
        return False
    return True


def _check(source: ExportSource, name: ExportFormat) -> None:
    valid = dtypes_of(name)
    if source.dtype is not None and source.dtype not in valid:
        raise ExportError(f"format {name} has no dtype {source.dtype} (it has {', '.join(valid)})")
    FORMATS[name].check(source)


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
