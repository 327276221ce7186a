"""Stage `export`: a folder that others load, checked against the masked original before it counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from blockpruner.architectures import block_sizes, num_parameters
from blockpruner.blocks import Block
from blockpruner.checkpoint import COMPANION_FILES, LEGAL_FILES, Checkpoint
from blockpruner.errors import ExportError
from blockpruner.export.card import CardNumbers, write_card
from blockpruner.export.formats import FORMATS, verify_export
from blockpruner.export.names import ExportDtype, ExportFormat, FormatChoice
from blockpruner.export.verify import Verification, masked_logits, shorter_window, verification_request
from blockpruner.export.write import WrittenExport, files_in, write_export
from blockpruner.loading import DtypeName, load_model, meta_model, release_memory, torch_dtype
from blockpruner.merging import MergedLayers, stored_dtype
from blockpruner.progress import Progress
from blockpruner.strategies import STRATEGIES
from blockpruner.trace import LayerMerge, SearchTrace, read_trace
from stages.contract import ArtifactRef, Runtime, Stage, StageConfig, StageManifest

MODEL_FOLDER = "model"
_FLOAT32_LIMIT = 3_000_000_000
"""Models of more parameters are verified in bfloat16: two float32 copies would not fit where the model itself does."""
_WEIGHT_SUFFIXES = (".safetensors", ".gguf")


class ExportConfig(StageConfig):
    """What to write."""

    num_blocks: int | None = None
    """How many blocks of the pruning order to remove; None: all of it."""
    format: FormatChoice = "auto"
    """'auto' writes the family's own format where the surviving blocks alternate, else the one with custom code, else
    the one in full shape."""
    dtype: ExportDtype | None = None
    """Dtype of the weights; None: as they are in the model."""


@dataclass(frozen=True)
class ExportInputs:
    """What an export reads."""

    model: Checkpoint
    search: ArtifactRef

    def fingerprints(self) -> Mapping[str, str]:
        """Model with all that goes with it, and pruning order, by content; the card tells the model's name."""
        return {
            "model": self.model.fingerprint,
            "companions": self.model.files_fingerprint((*COMPANION_FILES, *LEGAL_FILES, "README.md")),
            "search": self.search.fingerprint,
        }


class ExportManifest(StageManifest):
    """What was written, and how it compares with the masked original."""

    format: ExportFormat
    num_blocks_removed: int
    num_parameters: int
    bytes: int
    kept: tuple[Block, ...]
    dropped: tuple[Block, ...]
    verified: bool
    """True: what is not is deleted, and the stage fails with the difference in its message."""
    verified_with: str
    """What loaded the export for the comparison, one after another: engines, or a reader of our own."""
    max_logit_difference: float


def run(config: ExportConfig, inputs: ExportInputs, out_dir: Path, runtime: Runtime) -> ExportManifest:
    """Write the model without the first blocks of the pruning order into `out_dir`/model, and verify it.

    Raises:
        ConfigurationError: if no step of the search ends with `num_blocks` removed.
        ExportError: if the format cannot hold the result, or the written model computes something else.
    """
    trace = read_trace(inputs.search.path)
    removed = trace.removed(config.num_blocks)
    merges = trace.merges(config.num_blocks)
    written = write_export(
        inputs.model, removed, out_dir / MODEL_FOLDER, config.format, dtype=config.dtype, merges=merges
    )
    runtime.progress(Progress(1, 2, "phases", "verifying"))
    verification = _verify(inputs.model, written, runtime.device, config.dtype, merges)
    if not verification.passed:
        raise ExportError(
            f"the exported model differs from the masked original by {verification.max_logit_difference:.3g} in its "
            f"logits with {verification.engine} (at most {verification.tolerance:.3g}); it was deleted: please report "
            "this model's architecture"
        )
    num_parameters_written = _write_card(inputs, trace, written)
    runtime.progress(Progress(2, 2, "phases", "verified"))
    return ExportManifest(
        format=written.format,
        num_blocks_removed=len(removed),
        num_parameters=num_parameters_written,
        bytes=sum(file.stat().st_size for file in files_in(written.path)),
        kept=written.kept,
        dropped=written.dropped,
        verified=True,
        verified_with=verification.engine,
        max_logit_difference=verification.max_logit_difference,
    )


def _verify(
    checkpoint: Checkpoint,
    written: WrittenExport,
    device: str,
    written_dtype: ExportDtype | None,
    merges: Sequence[LayerMerge],
) -> Verification:
    architecture, shapes = meta_model(checkpoint)
    dtype: DtypeName = "float32" if num_parameters(shapes) <= _FLOAT32_LIMIT else "bfloat16"
    text_config = shapes.config.get_text_config()
    request = verification_request(text_config.vocab_size, text_config.max_position_embeddings)
    window = shorter_window(written.window, request)
    settings = {} if window is None else {"sliding_window": window}
    stored = stored_dtype(architecture, checkpoint) if merges else None
    # What was merged was summed up from the stored weights, which float32 holds exactly.
    exact: DtypeName = "float32" if stored not in (None, torch.bfloat16) else dtype
    model = load_model(checkpoint, device=device, dtype=exact, settings=settings)
    if stored is not None:
        MergedLayers(architecture, model, stored).use(merges)
        for parameter in model.parameters():  # and no buffer: those of positions are never rounded
            parameter.data = parameter.data.to(torch_dtype(dtype))
    # Weights that were rounded are compared with the original's, rounded likewise.
    FORMATS[written.format].coarsen(model, written.path, written_dtype)
    expected = masked_logits(architecture, model, written.dropped, request)
    del model
    release_memory()  # the fresh process needs it
    return verify_export(written.format, written.path, request, expected, device=device, dtype=dtype, window=window)


def _write_card(inputs: ExportInputs, trace: SearchTrace, written: WrittenExport) -> int:
    """Write the model card and return how many parameters the files hold."""
    architecture, shapes = meta_model(inputs.model)
    sizes = block_sizes(architecture, shapes)
    total = num_parameters(shapes)
    num_kept = total - sum(sizes[block] for block in written.dropped)
    last = trace.reaching(len(written.dropped))[-1]
    calibration = ("the calibration set", trace.summary.dense_perplexity, last.perplexity)
    num_bytes_dense = sum(entry.num_bytes for entry in inputs.model.tensors.values())
    weights = (file for file in written.path.iterdir() if file.suffix in _WEIGHT_SUFFIXES)
    num_bytes = sum(file.stat().st_size for file in weights)
    numbers = CardNumbers(total, num_kept, num_bytes_dense, num_bytes, (calibration,))
    method = STRATEGIES[trace.summary.strategy].source
    write_card(written, inputs.model, numbers, method)
    return num_kept + sum(sizes[block] for block in written.zeros)


STAGE: Stage[ExportConfig, ExportInputs, ExportManifest] = Stage(
    name="export", version=4, manifest_type=ExportManifest, run=run
)
