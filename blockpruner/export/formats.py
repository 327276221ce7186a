"""The formats by name: what each can hold, and which one is taken when none is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from blockpruner.blocks import Block
from blockpruner.checkpoint import COMPANION_FILES, LEGAL_FILES, Checkpoint
from blockpruner.errors import ExportError
from blockpruner.export import custom, decilm, stock, zeroed
from blockpruner.export.attention import window
from blockpruner.export.code import ModelCode
from blockpruner.export.gguf_file import format as gguf_file
from blockpruner.export.names import AUTO_TAKES, ExportDtype, ExportFormat, FormatChoice, dtypes_of
from blockpruner.export.source import ExportSource
from blockpruner.export.verify import Loading, Verification, Verifier, round_weights, verify
from blockpruner.export.verify_mlx import verify_with_mlx_lm
from blockpruner.loading import DtypeName
from blockpruner.surgery import Places


def round_to_dtype(model: PreTrainedModel, export_dir: Path, dtype: ExportDtype | None) -> None:
    """Round weights to one of torch's dtypes, in place."""
    if dtype is not None:
        round_weights(model, getattr(torch, dtype))


@dataclass(frozen=True)
class Format:
    """One format."""

    name: ExportFormat
    check: Callable[[ExportSource], None]
    """Raises ExportError, with the reason, for what the format cannot hold."""
    write: Callable[[ExportSource, Path, int], None]
    """Writes weights and configuration into a folder, in shards of so many bytes."""
    places: Callable[[ExportSource], Places]
    """Where each surviving block is in the files: the number of its layer, and its place there if there are several."""
    code_of: Callable[[Mapping[str, Any]], ModelCode] | None = None
    """The model code that the exporter writes into the folder, from its config.json; None: none."""
    in_transformers: bool = True
    """Whether transformers loads it, so that it can be evaluated and timed here."""
    companions: tuple[str, ...] = (*COMPANION_FILES, *LEGAL_FILES)
    """Files of the source that go with it, as patterns."""
    zeros: Callable[[ExportSource], tuple[Block, ...]] = lambda _: ()
    """The removed blocks that stay in the files, with zeros in their last projections."""
    window: Callable[[ExportSource], int | None] = window
    """How many tokens a token sees where an attention in the files has a window; None: none has."""
    verify: Verifier = verify
    """Compares what was written with the masked original."""
    coarsen: Callable[[PreTrainedModel, Path, ExportDtype | None], None] = round_to_dtype
    """Rounds the original's weights, in place, as those in the folder are, which were to have this dtype (None: their
    own)."""

    @property
    def has_code(self) -> bool:
        """Whether there is code in the folder, so that it must be trusted where the model is loaded."""
        return self.code_of is not None


FORMATS: dict[ExportFormat, Format] = {
    "stock": Format("stock", stock.check, stock.write, stock.places),
    "transformers": Format("transformers", custom.check, custom.write, custom.places, code_of=custom.code_of),
    "decilm": Format(
        "decilm",
        decilm.check,
        decilm.write,
        decilm.places,
        code_of=decilm.code_of,
        zeros=decilm.carried,
        verify=verify_with_mlx_lm,
    ),
    "gguf": Format(
        "gguf",
        gguf_file.check,
        gguf_file.write,
        gguf_file.places,
        in_transformers=False,
        companions=LEGAL_FILES,  # tokenizer and chat template are in the file
        window=gguf_file.window,
        verify=gguf_file.verify,
        coarsen=gguf_file.coarsen,
    ),
    "zeroed": Format("zeroed", zeroed.check, zeroed.write, zeroed.places, zeros=lambda source: source.removed),
}


def check_code(checkpoint: Checkpoint, name: ExportFormat) -> None:
    """Make sure that the code in an exported model is the exporter's.

    Raises:
        CheckpointError: if it is not: it could be anybody's.
    """
    if (code_of := FORMATS[name].code_of) is not None:
        code_of(checkpoint.config).check(checkpoint)


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
    return next((name for name in AUTO_TAKES if can_hold(source, name)), AUTO_TAKES[-1])


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
    window: int | None = None,
) -> Verification:
    """Compare an export with the masked original as its format has it done.

    Args:
        name: its format.
        export_dir: where it is.
        request: from `verification_request`.
        expected: from `masked_logits`.
        device: where to compute.
        dtype: of the computation.
        window: what `expected` was computed with (see `shorter_window`).

    Raises:
        ExportError: if a fresh process cannot load or run it.
    """
    format_ = FORMATS[name]
    return format_.verify(export_dir, request, expected, Loading(device, dtype, format_.has_code, window))
