"""Whether formats can hold a model, asked before the first is written. Reads headers and settings; writes nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from blockpruner.blocks import Block, all_blocks
from blockpruner.checkpoint import Checkpoint
from blockpruner.errors import ExportError
from blockpruner.export.formats import FORMATS, can_hold, format_for
from blockpruner.export.names import ExportDtype, ExportFormat, FormatChoice, dtypes_of
from blockpruner.export.source import ExportSource
from blockpruner.trace import LayerMerge


@dataclass(frozen=True)
class PrunedModel:
    """What is to be exported."""

    model: Checkpoint
    removed: tuple[Block, ...] = ()
    merges: tuple[LayerMerge, ...] = ()
    dtype: ExportDtype | None = None
    """What was asked for, for the formats that have it."""

    def source(self, name: FormatChoice) -> ExportSource:
        """What a format would be made from."""
        return ExportSource.of(self.model, self.removed, dtype_for(name, self.dtype), self.merges)


def dtype_for(name: FormatChoice, dtype: ExportDtype | None) -> ExportDtype | None:
    """The dtype to write one of several formats in: where it lacks the one asked for none, which leaves it as it is."""
    return dtype if dtype in dtypes_of(name) else None


def check_family(whole: PrunedModel, formats: Sequence[FormatChoice]) -> None:
    """Refuse, before it is known which blocks go, the formats that can hold no part of the model.

    Raises:
        ExportError: with the reason, and the formats that may hold one.
    """
    for name in formats:
        if name == "auto" or _holds_some(whole, name):
            continue
        able = " or ".join(other for other in FORMATS if _holds_some(whole, other))
        try:
            FORMATS[name].check(whole.source(name))
        except ExportError as error:
            raise ExportError(f"{error}; what may hold it, by the blocks that go: --format {able}") from error


def check_formats(pruned: PrunedModel, formats: Sequence[FormatChoice]) -> None:
    """Refuse the formats that cannot hold a pruned model.

    Raises:
        ExportError: with the reason, and the formats that can.
    """
    for name in formats:
        format_for(pruned.source(name), name)


def is_repeated(pruned: PrunedModel, name: FormatChoice, earlier: Sequence[FormatChoice]) -> bool:
    """Whether a format is one of those before it: 'auto' always is one of the others. All can hold the model."""

    def written(choice: FormatChoice) -> ExportFormat:
        return format_for(pruned.source(choice), choice).name if choice == "auto" else choice

    return written(name) in [written(other) for other in earlier]


def _holds_some(whole: PrunedModel, name: ExportFormat) -> bool:
    return any(can_hold(part.source(name), name) for part in _parts(whole))


def _parts(whole: PrunedModel) -> Iterator[PrunedModel]:
    """The whole model, and the first layer of every type by itself.

    What a format refuses of all of these it refuses whatever blocks go; windows, for one, can go with their layers.
    """
    yield whole
    source = whole.source("auto")
    types = getattr(source.config, "layer_types", None) or [None] * source.num_layers
    for index in sorted({types.index(kind) for kind in types}):
        others = tuple(block for block in all_blocks(source.num_layers) if block.layer_index != index)
        yield replace(whole, removed=others)
