"""The formats by name: what each can hold, and which one is taken when none is asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor
from transformers import PreTrainedModel

from blockpruner.checkpoint import COMPANION_FILES
from blockpruner.errors import ExportError
from blockpruner.export import custom, stock, verify, zeroed
from blockpruner.export.gguf_file import format as gguf_file
from blockpruner.export.names import ExportFormat, FormatChoice
from blockpruner.export.source import ExportSource
from blockpruner.loading import DtypeName


class Verify(Protocol):
    """Loads an export and compares its logits with those expected."""

    def __call__(
        self,
        export_dir: Path,
        request: dict[str, Tensor],
        expected: dict[str, Tensor],
        *,
        device: str,
        dtype: DtypeName,
    ) -> verify.Verification:
        """See `verify.verify`."""


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
    verify: Verify = verify.verify
    """Loads what was written in the way in which it is to be used, and compares."""
    coarsen: Callable[[PreTrainedModel, Path], None] | None = None
    """Rounds the original's weights as those in the folder are, where no dtype of torch says how."""


FORMATS: dict[ExportFormat, Format] = {
    "stock": Format("stock", stock.check, stock.write),
    "transformers": Format("transformers", custom.check, custom.write),
    "zeroed": Format("zeroed", zeroed.check, zeroed.write),
    "gguf": Format(
        "gguf",
        gguf_file.check,
        gguf_file.write,
        companions=gguf_file.COMPANIONS,
        verify=gguf_file.verify,
        coarsen=gguf_file.coarsen,
    ),
}
_PREFERRED: tuple[ExportFormat, ...] = ("stock", "transformers", "zeroed")


def format_for(source: ExportSource, wanted: FormatChoice) -> Format:
    """The format asked for; for 'auto' the first that can hold the model: stock, custom code, zeros.

    Raises:
        ExportError: with the reason, and the formats that can, if the one asked for cannot hold the model.
    """
    if wanted != "auto":
        FORMATS[wanted].check(source)
        return FORMATS[wanted]
    return next(FORMATS[name] for name in _PREFERRED if can_hold(source, name))


def can_hold(source: ExportSource, name: ExportFormat) -> bool:
    """Whether a format can hold a model."""
    try:
        FORMATS[name].check(source)
    except ExportError:
        return False
    return True
