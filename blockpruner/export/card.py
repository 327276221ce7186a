"""The model card of an export: what was removed from what, what it costs, how to load it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml
from huggingface_hub import ModelCard, ModelCardData

from blockpruner import __version__
from blockpruner.blocks import Block, BlockKind, mha, mlp
from blockpruner.export.engines import how_to_load
from blockpruner.export.write import WrittenExport
from blockpruner.strategies import STRATEGIES

_ZEROED = (
    "The removed blocks are still in the files, with zeros in their last projections: this form saves neither memory "
    "nor time."
)
_FIRST_ATTENTION = (
    "The first layer's attention is still in the files, with zeros in its output projection, for engines expect one "
    "there: it adds nothing to any logit, and costs the memory and the time of an attention block."
)
_METHOD = STRATEGIES["blockpruner"].source


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


def write_card(
    written: WrittenExport, source: str, source_dir: Path, numbers: CardNumbers, method: str = _METHOD
) -> None:
    """Write README.md into the export; `method` says who described how the blocks were chosen."""
    data = ModelCardData(
        library_name="gguf" if written.format == "gguf" else "transformers",
        pipeline_tag="text-generation",
        base_model=source if source.count("/") == 1 and not Path(source).exists() else None,
        license=_licence(source_dir),
        tags=["blockpruner", "pruned"],
    )
    name = Path(source).resolve().name if Path(source).exists() else source
    ratio = 1 - numbers.num_parameters / numbers.num_parameters_dense
    lines = [
        "---",
        data.to_yaml(),
        "---",
        f"# {Path(name).name}, {len(written.dropped)} residual blocks removed",
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
    ]
    ModelCard("\n".join(lines) + "\n").save(written.path / "README.md")


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


def _licence(source_dir: Path) -> str | None:
    card = source_dir / "README.md"
    if not card.is_file():
        return None
    try:
        licence = ModelCard.load(card).data.to_dict().get("license")
    except (ValueError, OSError, yaml.YAMLError):  # a card without valid metadata carries no licence over
        return None
    return str(licence) if licence else None
