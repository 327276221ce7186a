"""Whether formats can hold a model, asked before the first is written. Reads headers and settings; writes nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from blockpruner.blocks import Block, all_blocks
from blockpruner.checkpoint import Checkpoint
from blockpruner.errors import ExportError
from blockpruner.export.formats import FORMATS, can_hold, format_for
from blockpruner.export.names import ExportDtype, ExportFormat, FormatChoice, dtypes_of
from blockpruner.export.source import ExportSource


def dtype_for(name: FormatChoice, dtype: ExportDtype | None) -> ExportDtype | None:
    """The dtype to write one of several formats in: where it lacks the one asked for none, which leaves it as it is."""
    return dtype if dtype in dtypes_of(name) else None


def check_family(model: Checkpoint, formats: Sequence[FormatChoice], dtype: ExportDtype | None) -> None:
    """Refuse, before it is known which blocks go, the formats that can hold no part of the model.

    Raises:
        ExportError: with the reason, and the formats that may hold one.
    """
    for name in formats:
        if name == "auto" or _holds_some(model, name, dtype):
            continue
        able = " or ".join(other for other in FORMATS if _holds_some(model, other, dtype))
        try:
            FORMATS[name].check(ExportSource.of(model, (), dtype_for(name, dtype)))
        except ExportError as error:
            raise ExportError(f"{error}; what may hold it, by the blocks that go: --format {able}") from error


def check_formats(
    model: Checkpoint, removed: Sequence[Block], formats: Sequence[FormatChoice], dtype: ExportDtype | None
) -> None:
    """Refuse the formats that cannot hold a pruned model.

    Raises:
        ExportError: with the reason, and the formats that can.
    """
    for name in formats:
        format_for(ExportSource.of(model, removed, dtype_for(name, dtype)), name)


def is_repeated(
    model: Checkpoint,
    removed: Sequence[Block],
    name: FormatChoice,
    earlier: Sequence[FormatChoice],
    dtype: ExportDtype | None,
) -> bool:
    """Whether a format is one of those before it: 'auto' always is one of the others. All can hold the model."""

    def written(choice: FormatChoice) -> ExportFormat:
        if choice != "auto":
            return choice
        return format_for(ExportSource.of(model, removed, dtype_for(choice, dtype)), choice).name

    return written(name) in [written(other) for other in earlier]


def _holds_some(model: Checkpoint, name: ExportFormat, dtype: ExportDtype | None) -> bool:
    return any(can_hold(source, name) for source in _parts(model, dtype_for(name, dtype)))


def _parts(model: Checkpoint, dtype: ExportDtype | None) -> Iterator[ExportSource]:
    """The whole model, and the first layer of every type by itself.

    What a format refuses of all of these it refuses whatever blocks go; windows, for one, can go with their layers.
    """
    whole = ExportSource.of(model, (), dtype)
    yield whole
    types = getattr(whole.config, "layer_types", None) or [None] * whole.num_layers
    for index in sorted({types.index(kind) for kind in types}):
        others = tuple(block for block in all_blocks(whole.num_layers) if block.layer_index != index)
        yield ExportSource.of(model, others, dtype)
