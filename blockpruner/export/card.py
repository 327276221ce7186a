"""The model card of an export: what was removed from what, what it costs, how to load it."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from blockpruner import __version__
from blockpruner.blocks import Block, BlockKind, mha, mlp
from blockpruner.checkpoint import Checkpoint
from blockpruner.export.engines import how_to_load, remark_on_windows
from blockpruner.export.formats import FORMATS
from blockpruner.export.write import WrittenExport, add_to_manifest
from blockpruner.strategies import STRATEGIES

_ZEROED = (
    "The removed blocks are still in the files, with zeros in their last projections: this form saves neither memory "
    "nor time."
)
_FIRST_ATTENTION = (
    "The first layer's attention is still in the files, with zeros in its output projection, for engines expect one "
    "there: it adds nothing to any logit, and costs the memory and the time of an attention block."
)
_INHERITED = ("license", "license_name", "license_link", "language", "base_model")
_FILE = "README.md"
_METHOD = STRATEGIES["blockpruner"].source


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CardNumbers:
    """The measurements a card shows."""

    num_parameters_dense: int
    num_parameters: int
    num_bytes_dense: int
    """Of the weights."""
    num_bytes: int
    """Likewise, as written; zeros count."""
    perplexities: tuple[tuple[str, float, float], ...]
    """(text, dense, pruned)."""


def write_card(written: WrittenExport, source: Checkpoint, numbers: CardNumbers, method: str = _METHOD) -> None:
    """Write README.md into the export, and its digest into the manifest.

    `method` says who described how the blocks were chosen.
    """
    inherited = _inherited(source)
    data = ModelCardData(
        library_name="transformers" if FORMATS[written.format].in_transformers else written.format,
        pipeline_tag="text-generation",
        tags=["blockpruner", "pruned"],
        **inherited,
    )
    name = source.public_name
    ratio = 1 - numbers.num_parameters / numbers.num_parameters_dense
    lines = [
        "---",
        data.to_yaml(),
        "---",
        f"# {name.rpartition('/')[2]}, {len(written.dropped)} residual blocks removed",
        "",
        f"Made from `{name}` by blockpruner {__version__}, without training ({method}).",
        f"{numbers.num_parameters:,} of {numbers.num_parameters_dense:,} parameters remain ({ratio:.2%} removed).",
        *([_ZEROED] if written.format == "zeroed" else []),
        *([_FIRST_ATTENTION] if written.format == "decilm" and written.zeros else []),
        "",
        *_table(written, numbers),
        "",
        "## Blocks",
        "One column a layer of the original; `#` kept, `.` removed.",
        "```",
        *strips(written.kept, written.dropped),
        "```",
        f"Removed in this order: {', '.join(map(str, written.dropped))}.",
        "",
        "## Load",
        *how_to_load(written.format),
        *_on_windows(written),
    ]
    ModelCard("\n".join(lines) + "\n").save(written.path / _FILE)
    add_to_manifest(written.path, _FILE)


def _on_windows(written: WrittenExport) -> tuple[str, ...]:
    if written.format != "stock":  # the only one whose layers have other numbers, and that other engines load by them
        return ()
    return remark_on_windows(json.loads((written.path / "config.json").read_text(encoding="utf-8")))


def _table(written: WrittenExport, numbers: CardNumbers) -> list[str]:
    """Dense against pruned."""
    blocks = [*written.kept, *written.dropped]
    counts = [
        (f"{name} blocks", *(f"{sum(block.block_kind is kind for block in some)}" for some in (blocks, written.kept)))
        for name, kind in (("attention", BlockKind.MHA), ("feed-forward", BlockKind.MLP))
    ]
    rows = [
        ("parameters", f"{numbers.num_parameters_dense:,}", f"{numbers.num_parameters:,}"),
        *counts,
        ("weights on disk, MB", f"{numbers.num_bytes_dense / 1e6:,.1f}", f"{numbers.num_bytes / 1e6:,.1f}"),
        *((f"perplexity on {text}", f"{dense:.3f}", f"{pruned:.3f}") for text, dense, pruned in numbers.perplexities),
    ]
    return ["| | dense | pruned |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)]


def strips(kept: tuple[Block, ...], dropped: tuple[Block, ...]) -> list[str]:
    """Two lines, one a block kind: a mark for every layer of the original."""
    num_layers = 1 + max(block.layer_index for block in (*kept, *dropped))
    return [
        f"{name} " + "".join("#" if make(index) in kept else "." for index in range(num_layers))
        for name, make in (("MHA", mha), ("MLP", mlp))
    ]


def _inherited(source: Checkpoint) -> dict[str, Any]:
    """What the source's own card says of its terms, its languages, and of what it was made from."""
    card = source.path / "README.md"
    given: dict[str, Any] = {}
    if card.is_file():
        try:
            given = ModelCard.load(card, ignore_metadata_errors=True).data.to_dict()
        except (ValueError, OSError, yaml.YAMLError) as error:
            logger.warning("the card of %s has no valid metadata, so no licence: %s", source.public_name, error)
    found = {key: given[key] for key in _INHERITED if given.get(key)}
    # A folder without an id of its own is a copy of what its card names, or was made from it.
    return found | ({"base_model": source.hub_id} if source.hub_id else {})
