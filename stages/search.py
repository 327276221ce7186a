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

from blockpruner.architectures import architecture_of, block_sizes, num_parameters
from blockpruner.blocks import Block, BlockKind, BlockKinds, all_blocks
from blockpruner.calibration import load_token_ids
from blockpruner.checkpoint import Checkpoint
from blockpruner.journal import SearchJournal
from blockpruner.loading import DtypeName, load_model, meta_model
from blockpruner.perplexity import perplexity
from blockpruner.scoring.build import build_scorer, is_streamed
from blockpruner.scoring.interface import Scorer, TableCallback
from blockpruner.scoring.metrics import metric_of
from blockpruner.scoring.plan import SweepPlan
from blockpruner.scoring.settings import MetricName
from blockpruner.scoring.sweep import SweepScorer
from blockpruner.scoring.table import ScoreTable
from blockpruner.scoring.work import Meter
from blockpruner.search import GreedySearch, SearchTarget
from blockpruner.trace import SearchStep, SearchSummary, write_trace
from stages.contract import ArtifactRef, Runtime, Stage, StageConfig, StageManifest

_NOISE_NATS: dict[DtypeName, float] = {"float32": 1e-5, "bfloat16": 2e-3}
"""How far the scores of two orders of summation lie apart at most, as the tests hold them to."""


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
    metric: MetricName = "perplexity"
    """What a block's removal is judged by."""
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
    work_saved: float


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

    def __init__(self, config: SearchConfig, inputs: SearchInputs, journal: SearchJournal, runtime: Runtime) -> None:
        self._config, self._inputs, self._journal, self._runtime = config, inputs, journal, runtime
        self._token_ids_BT = load_token_ids(inputs.calibration.path)
        self._idle = Meter()

    @cached_property
    def _scorer(self) -> Scorer:
        config, inputs, runtime = self._config, self._inputs, self._runtime
        weight_bytes = sum(entry.num_bytes for entry in inputs.model.tensors.values())
        streamed = is_streamed(weight_bytes, runtime.device, runtime.scoring.memory_budget)
        model = load_model(
            inputs.model,
            device="cpu" if streamed else runtime.device,
            dtype=config.dtype,
            trust_remote_code=inputs.trust_remote_code,
        )
        scorer = build_scorer(
            architecture_of(inputs.model.model_type).for_config(model.config),
            model,
            self._token_ids_BT,
            runtime.device,
            metric_of(config.metric),
            runtime.scoring,
            runtime.batch_size,
            self._plan_so_far(),
        )
        if isinstance(scorer, SweepScorer):
            self._journal.keep_plan(f"{runtime.device} {scorer.plan.model_dump_json()}")
        return scorer

    @property
    def num_sequences(self) -> int:
        """Number of calibration sequences, B."""
        return int(self._token_ids_BT.shape[0])

    @property
    def meter(self) -> Meter:
        """What was computed so far; asking for it loads nothing."""
        return self._scorer.meter if "_scorer" in vars(self) else self._idle

    def fill(self, removed: tuple[Block, ...], table: ScoreTable, on_update: TableCallback) -> None:
        """See `Scorer.fill`."""
        self._scorer.fill(removed, table, on_update)

    def dense_nll(self) -> Tensor:
        """Each sequence's NLL of the unpruned model: float64 [B]."""
        return self._scorer.dense_nll()

    def _plan_so_far(self) -> SweepPlan | None:
        """The plan that the search was begun with, unless this run asks for another, or is on another device."""
        runtime = self._runtime
        if runtime.batch_size or runtime.scoring.memory_budget or (kept := self._journal.plan()) is None:
            return None
        device, _, plan = kept.partition(" ")
        return SweepPlan.model_validate_json(plan) if device == runtime.device else None


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
    settings = {name: str(value) for name, value in config.model_dump(exclude=set(STAGE.not_resume_fields)).items()}
    parts = {**inputs.fingerprints(), **settings}
    journal = SearchJournal(runtime.state_dir, STAGE.resume_fingerprint(config, inputs), parts=parts)
    workbench = _Workbench(config, inputs, journal, runtime)
    dense_nll_B = journal.dense_nll()
    if dense_nll_B is None:
        journal.keep_dense_nll(dense_nll_B := workbench.dense_nll())
    greedy = GreedySearch(
        workbench, candidates, total, journal, runtime.progress, metric_of(config.metric), _NOISE_NATS[config.dtype]
    )
    steps = greedy.run(target)
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
    version=2,
    manifest_type=SearchManifest,
    run=run,
    not_resume_fields=frozenset({"num_blocks", "ratio"}),
    resumable=True,
)
