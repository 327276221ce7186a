"""Format `gguf` as the table of formats sees it. Imports the `gguf` package only when a file is asked for."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from blockpruner.errors import CheckpointError, ExportError
from blockpruner.export import attention
from blockpruner.export.gguf_file import layers
from blockpruner.export.gguf_file.families import FAMILIES
from blockpruner.export.gguf_file.plan import make_plan
from blockpruner.export.names import ExportDtype
from blockpruner.export.source import ExportSource
from blockpruner.export.verify import Loading, Verification
from blockpruner.surgery import Places

MODEL_FILE = "model.gguf"


def check(source: ExportSource) -> None:
    """Refuse what this format cannot hold.

    Raises:
        ExportError: with the reason.
    """
    from blockpruner.export.gguf_file.tensors import file_tensors
    from blockpruner.export.gguf_file.vocabulary import read_vocabulary

    for _ in file_tensors(make_plan(source)):  # every one has a name; none is read
        pass
    try:
        read_vocabulary(source.checkpoint, int(source.config.vocab_size))
    except CheckpointError as error:
        raise ExportError(f"format gguf holds the tokenizer as well: {error}") from error


def write(source: ExportSource, out_dir: Path, shard_bytes: int) -> None:
    """Write `model.gguf`, in one piece whatever its size."""
    from blockpruner.export.gguf_file.write import write_file

    write_file(source, out_dir / MODEL_FILE)


def places(source: ExportSource) -> Places:
    """The file's layer of each surviving block."""
    return {block: str(number) for block, number in layers.places(layers.file_layers(source.kept)).items()}


def window(source: ExportSource) -> int | None:
    """How long the windows in the file are; where llama.cpp knows none for the family, the context ends instead."""
    return attention.window(source) if FAMILIES[source.checkpoint.model_type].has_windows else None


def coarsen(model: PreTrainedModel, export_dir: Path, dtype: ExportDtype | None) -> None:
    """Round the original's weights as the file's are, which says itself how."""
    from blockpruner.export.gguf_file.verification import round_like

    round_like(model, export_dir / MODEL_FILE)


def verify(export_dir: Path, request: dict[str, Tensor], expected: dict[str, Tensor], loading: Loading) -> Verification:
    """Compare the file's logits with the masked original's."""
    from blockpruner.export.gguf_file.verification import verify_file

    return verify_file(export_dir / MODEL_FILE, request, expected, loading)
