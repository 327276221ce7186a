"""Stage `search`: the pruning order, with the score of every candidate at every step.

Wires the library's greedy search to its checkpoints. A search is known by model, calibration set and method, and not by
how far it goes: one that reached K blocks is the start of any longer one, and the answer to any shorter one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from torch import Tensor
from transformers import PreTrainedModel

from blockpruner.architectures import Architecture, block_sizes, num_parameters
from blockpruner.blocks import Block, BlockKind, BlockKinds, all_blocks
from blockpruner.calibration import load_token_ids
from blockpruner.checkpoint import Checkpoint
from blockpruner.journal import SearchJournal
from blockpruner.loading import DtypeName, load_model, meta_model
from blockpruner.perplexity import perplexity, sequence_nll
from blockpruner.scoring.interface import Scorer, TableCallback
from blockpruner.scoring.sweep import SweepScorer
from blockpruner.scoring.table import ScoreTable
from blockpruner.search import GreedySearch, SearchTarget
from blockpruner.trace import SearchStep, SearchSummary, write_trace
from stages.contract import ArtifactRef, Runtime, Stage, StageConfig, StageManifest


class SearchConfig(StageConfig):
    """How to search, and how far."""

    block_kinds: BlockKinds = "both"
    """Which kinds of blocks may be removed."""
    num_blocks: int | None = None
    """Stop after so many removals; this or `ratio`."""
    ratio: float | None = None
    """Stop at the first step that has removed this share of all parameters; this or `num_blocks`."""
    dtype: DtypeName = "float32"
    """Dtype of weights and activations; losses are float32 or wider."""
    metric: Literal["perplexity"] = "perplexity"
    strategy: Literal["blockpruner"] = "blockpruner"


@dataclass(frozen=True)
class SearchInputs:
    """What a search reads."""

    model: Checkpoint
    calibration: ArtifactRef
    trust_remote_code: bool = False

    def fingerprints(self) -> Mapping[str, str]:
        """Model and calibration set, by content."""
        return {"model": self.model.fingerprint, "calibration": self.calibration.fingerprint}


class PruningStep(StageManifest):
    """One removal, without the candidates that were not chosen."""

    step: int
    layer_index: int
    block_kind: BlockKind
    score: float
    perplexity: float
    num_parameters_removed: int
    ratio: float
    seconds: float


class SearchManifest(StageManifest):
    """What a search found; the scores of every candidate are in trace.jsonl."""

    dense_perplexity: float
    num_layers: int
    num_blocks_total: int
    num_parameters: int
    num_steps: int
    pruning_order: tuple[PruningStep, ...]


class _Workbench:
    """The scorer and its model, loaded when the first score is needed: a search that checkpoints answer loads none."""

    def __init__(
        self, config: SearchConfig, inputs: SearchInputs, architecture: Architecture, runtime: Runtime
    ) -> None:
        self._config, self._inputs, self._architecture, self._runtime = config, inputs, architecture, runtime
        self._token_ids_BT = load_token_ids(inputs.calibration.path)

    @cached_property
    def _model(self) -> PreTrainedModel:
        return load_model(
            self._inputs.model,
            device=self._runtime.device,
            dtype=self._config.dtype,
            trust_remote_code=self._inputs.trust_remote_code,
        )

    @cached_property
    def _scorer(self) -> Scorer:
        return SweepScorer(self._architecture, self._model, self._token_ids_BT, self._runtime.batch_size)

    @property
    def num_sequences(self) -> int:
        """Number of calibration sequences, B."""
        return int(self._token_ids_BT.shape[0])

    def fill(self, removed: tuple[Block, ...], table: ScoreTable, on_update: TableCallback) -> None:
        """See `Scorer.fill`."""
        self._scorer.fill(removed, table, on_update)

    def dense_nll(self) -> Tensor:
        """Each sequence's NLL of the unpruned model: float64 [B]."""
        return sequence_nll(self._model, self._token_ids_BT, self._runtime.batch_size)


def run(config: SearchConfig, inputs: SearchInputs, out_dir: Path, runtime: Runtime) -> SearchManifest:
    """Search until the target is reached, going on from the checkpoints in `runtime.state_dir`.

    Raises:
        ConfigurationError: if the target is not valid for this model.
        UnsupportedArchitectureError: if the model's family is not in the table.
    """
    target = SearchTarget(config.num_blocks, config.ratio)
    architecture, shapes = meta_model(inputs.model)
    sizes, total = block_sizes(architecture, shapes), num_parameters(shapes)
    num_layers = len(architecture.decoder_layers(shapes))
    candidates = {block: sizes[block] for block in all_blocks(num_layers, config.block_kinds)}
    target.check(candidates, total)
    assert runtime.state_dir is not None
    journal = SearchJournal(runtime.state_dir, STAGE.resume_fingerprint(config, inputs))
    workbench = _Workbench(config, inputs, architecture, runtime)
    dense_nll_B = journal.dense_nll()
    if dense_nll_B is None:
        journal.keep_dense_nll(dense_nll_B := workbench.dense_nll())
    steps = GreedySearch(workbench, candidates, total, journal, runtime.progress).run(target)
    summary = SearchSummary(dense_perplexity=perplexity(dense_nll_B), num_layers=num_layers, num_parameters=total)
    write_trace(out_dir, summary, steps)
    return SearchManifest(
        dense_perplexity=summary.dense_perplexity,
        num_layers=num_layers,
        num_blocks_total=len(sizes),
        num_parameters=total,
        num_steps=len(steps),
        pruning_order=tuple(_without_candidates(step) for step in steps),
    )


def _without_candidates(step: SearchStep) -> PruningStep:
    return PruningStep(
        layer_index=step.block.layer_index,
        block_kind=step.block.block_kind,
        **step.model_dump(exclude={"block", "candidates"}),
    )


STAGE: Stage[SearchConfig, SearchInputs, SearchManifest] = Stage(
    name="search",
    version=1,
    manifest_type=SearchManifest,
    run=run,
    not_resume_fields=frozenset({"num_blocks", "ratio"}),
    resumable=True,
)
