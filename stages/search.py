"""Stage `search`: the pruning order, with the score of every candidate at every step.

Wires the library's strategies to their checkpoints. A search is known by model, calibration set and method, and not by
how far it goes: one that reached K blocks is the start of any longer one, and the answer to any shorter one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import Field, NonNegativeInt, ValidationError, model_validator
from torch import Tensor
from transformers import PreTrainedModel

from blockpruner.architectures import Architecture, block_sizes, num_parameters
from blockpruner.blocks import Block, BlockKind, BlockKinds, all_blocks
from blockpruner.calibration import load_token_ids
from blockpruner.checkpoint import Checkpoint
from blockpruner.collapse import CollapseSearch, MergingModel, check_laco
from blockpruner.errors import ConfigurationError
from blockpruner.journal import SearchJournal
from blockpruner.loading import DtypeName, meta_model
from blockpruner.merging import check_mergeable, stored_dtype
from blockpruner.ordered_search import OrderedSearch
from blockpruner.perplexity import perplexity
from blockpruner.progress import ProgressCallback
from blockpruner.repackable import Repackable
from blockpruner.scoring.build import device_memory
from blockpruner.scoring.interface import SurveyScorer, TableCallback
from blockpruner.scoring.layer_measures import LayerMeasure
from blockpruner.scoring.metrics import metric_of
from blockpruner.scoring.noise import noise_nats
from blockpruner.scoring.plan import SweepCut
from blockpruner.scoring.settings import MetricName
from blockpruner.scoring.table import ScoreTable
from blockpruner.scoring.work import Meter
from blockpruner.search import GreedySearch, Search, SearchTarget
from blockpruner.strategies import STRATEGIES, LacoSettings, Procedure, StrategyName, check_settings
from blockpruner.trace import LayerMerge, SearchStep, SearchSummary, write_trace
from stages.contract import ArtifactRef, Runtime, Stage, StageConfig, StageManifest
from stages.executor import ExecutorSettings
from stages.search_scorer import ScoringJob
from stages.text_perplexity import check_vocabulary


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
    stock_compatible_at: str | None = None
    """Where the result must be one that can be repacked into an unchanged model of its family: `num_blocks` or `ratio`
    once more, as text, for such a search is no prefix of a longer one. None: anywhere, and no matter."""
    strategy: StrategyName = "blockpruner"
    """How the removals are chosen."""
    strategy_seed: NonNegativeInt | None = Field(default=None, exclude_if=lambda value: value is None)
    """Of the strategy that draws; None for all others, so that their identity does not hold it."""

    laco: LacoSettings | None = Field(default=None, exclude_if=lambda value: value is None)
    """Of the strategy laco; None for all others."""

    @model_validator(mode="before")
    @classmethod
    def _only_what_matters(cls, fields: Any) -> Any:
        """What a strategy does not read is no part of its identity."""
        if not isinstance(fields, dict):
            return fields
        strategy = STRATEGIES.get(fields.get("strategy", "blockpruner"))
        if strategy is None:
            return fields
        fields = dict(fields)
        if strategy.importance == "chance":
            fields["strategy_seed"] = fields.get("strategy_seed") or 0
        else:
            fields["strategy_seed"] = None
        fields["laco"] = (fields.get("laco") or LacoSettings()) if strategy.procedure == "collapse" else None
        if not strategy.uses_metric:
            fields["metric"] = "perplexity"
        if strategy.whole_layers:  # what is left is one of the family's models anyway
            fields["stock_compatible_at"] = None
        return fields


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
    """The removal of one block, without the candidates that were not chosen.

    Of blocks that left together each has an entry, with the numbers of all of them.
    """

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
    """Removals; of a whole layer, or of several, at once counts as one."""
    pruning_order: tuple[PruningStep, ...]


@dataclass(frozen=True)
class _Subject:
    """What a search knows of the model before its weights are loaded."""

    num_layers: int
    candidates: Mapping[Block, int]
    """Parameters of every block that may be removed."""
    num_parameters: int
    noise_nats: float

    @property
    def sizes(self) -> tuple[Mapping[Block, int], int]:
        """Parameters of every block that may be removed, and of the whole model."""
        return self.candidates, self.num_parameters


class _Workbench:
    """The scorer and its model, loaded when the first score is needed: a search that checkpoints answer loads none.

    A context: what was started for the scorer ends with it.
    """

    def __init__(
        self, job: ScoringJob, token_ids_BT: Tensor, journal: SearchJournal, executor: ExecutorSettings
    ) -> None:
        self._job, self._token_ids_BT, self._journal, self._executor = job, token_ids_BT, journal, executor
        self._idle = Meter()
        self._started = ExitStack()

    def __enter__(self) -> _Workbench:
        return self

    def __exit__(self, *_: object) -> None:
        for name in ("_scorer", "_parts"):  # and with them the model, whose memory the device is to have back
            vars(self).pop(name, None)
        self._started.close()

    @property
    def merging(self) -> MergingModel:
        """The model of the same scorer, to be merged."""
        _, architecture, model = self._parts
        stored = stored_dtype(architecture, self._job.model)
        return MergingModel(architecture, model, self._token_ids_BT, stored, self._job.batch_size)

    @cached_property
    def _scorer(self) -> SurveyScorer:
        if self._executor.executor == "ray":
            from stages.ray_scorer import ray_scorer  # Ray is an optional extra

            spread = ray_scorer(self._job, self._token_ids_BT, self._executor, self._cut_so_far, self._keep_cut)
            return self._started.enter_context(spread)
        return self._parts[0]

    @cached_property
    def _parts(self) -> tuple[SurveyScorer, Architecture, PreTrainedModel]:
        """What computes in this process."""
        job = self._job
        self._started.enter_context(device_memory(job.device, job.settings.memory_budget))
        purpose = job.purpose
        return job.parts(self._token_ids_BT, self._cut_so_far(purpose), lambda plan: self._keep_cut(purpose, plan.cut))

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

    def nll_without(self, removed: tuple[Block, ...]) -> Tensor:
        """See `SurveyScorer.nll_without`."""
        return self._scorer.nll_without(removed)

    def measure_layers(self, measure: LayerMeasure) -> Tensor:
        """See `SurveyScorer.measure_layers`."""
        return self._scorer.measure_layers(measure)

    def _cut_so_far(self, purpose: str) -> SweepCut | None:
        """The cut that the search was begun with, if it was made for the same purpose."""
        made_for, _, cut = (self._journal.plan() or "").partition("\n")
        try:
            return SweepCut.model_validate_json(cut) if made_for == purpose else None
        except ValidationError:  # of another version of this program
            return None

    def _keep_cut(self, purpose: str, cut: SweepCut) -> None:
        self._journal.keep_plan(f"{purpose}\n{cut.model_dump_json()}")


def run(config: SearchConfig, inputs: SearchInputs, out_dir: Path, runtime: Runtime) -> SearchManifest:
    """Search until the target is reached, going on from the checkpoints in `runtime.state_dir`.

    Raises:
        ConfigurationError: if the target is not valid for this model, or it does not know a token of the set, or what
            it predicts is not finite.
        UnsupportedArchitectureError: if the model's family is not in the table.
    """
    check_settings(config.strategy, config.block_kinds, config.metric)
    architecture, shapes = meta_model(inputs.model)
    sizes = block_sizes(architecture, shapes)
    num_layers = len(architecture.decoder_layers(shapes))
    repackable = Repackable(num_layers, architecture.is_parallel) if config.stock_compatible_at else None
    whole_layers = STRATEGIES[config.strategy].whole_layers
    target = SearchTarget(config.num_blocks, config.ratio, repackable, whole_layers)
    candidates = {block: sizes[block] for block in all_blocks(num_layers, config.block_kinds)}
    subject = _Subject(num_layers, candidates, num_parameters(shapes), noise_nats(shapes, config.dtype))
    target.check(candidates, subject.num_parameters)
    if config.laco is not None:
        check_laco(config.laco, num_layers)
        check_mergeable(architecture, shapes)
        stored_dtype(architecture, inputs.model)
    check_vocabulary(shapes, "calibration", load_token_ids(inputs.calibration.path))
    assert runtime.state_dir is not None
    settings = {name: str(value) for name, value in config.model_dump(exclude=set(STAGE.not_resume_fields)).items()}
    parts = {**inputs.fingerprints(), **settings}
    journal = SearchJournal(runtime.state_dir, STAGE.resume_fingerprint(config, inputs), parts=parts)
    dense_nll_B, steps = _search(config, inputs, journal, runtime, subject, target)
    summary = SearchSummary(
        dense_perplexity=perplexity(dense_nll_B),
        num_layers=num_layers,
        num_parameters=subject.num_parameters,
        strategy=config.strategy,
    )
    write_trace(out_dir, summary, steps)
    return SearchManifest(
        dense_perplexity=summary.dense_perplexity,
        num_layers=num_layers,
        num_blocks_total=len(sizes),
        num_parameters=subject.num_parameters,
        num_steps=len(steps),
        pruning_order=tuple(_pruning_step(step, block) for step in steps for block in step.blocks),
    )


def _search(
    config: SearchConfig,
    inputs: SearchInputs,
    journal: SearchJournal,
    runtime: Runtime,
    subject: _Subject,
    target: SearchTarget,
) -> tuple[Tensor, tuple[SearchStep, ...]]:
    """Each sequence's dense NLL, and the steps; when this returns, nothing holds the model any more."""
    job = ScoringJob(
        model=inputs.model,
        num_layers=subject.num_layers,
        num_parameters=subject.num_parameters,
        dtype=config.dtype,
        metric=config.metric,
        device=runtime.device,
        batch_size=runtime.batch_size,
        settings=runtime.scoring,
        trust_remote_code=inputs.trust_remote_code,
        whole_layers=STRATEGIES[config.strategy].whole_layers,
        can_stream=config.laco is None,
    )
    make = _SEARCHES[STRATEGIES[config.strategy].procedure]
    with _Workbench(job, load_token_ids(inputs.calibration.path), journal, runtime.executor) as workbench:
        dense_nll_B = journal.dense_nll()
        if dense_nll_B is None or not bool(dense_nll_B.isfinite().all()):
            dense_nll_B = workbench.dense_nll()
            _check_finite(dense_nll_B, config.dtype)  # and is not kept: another device or scorer may do better
            journal.keep_dense_nll(dense_nll_B)
        return dense_nll_B, make(config, workbench, subject, journal, runtime.progress).run(target)


def _check_finite(dense_nll_B: Tensor, dtype: DtypeName) -> None:
    broken = int((~dense_nll_B.isfinite()).sum())
    if broken:
        remedy = "give --dtype float32, or check the model's weights" if dtype != "float32" else "check its weights"
        raise ConfigurationError(
            f"the model's own predictions are not finite on {broken} of {len(dense_nll_B)} calibration sequences "
            f"(in {dtype}), so that no block can be judged by them; {remedy}"
        )


def _greedy(
    config: SearchConfig, workbench: _Workbench, subject: _Subject, journal: SearchJournal, progress: ProgressCallback
) -> Search:
    metric = metric_of(config.metric)
    return GreedySearch(workbench, *subject.sizes, journal, progress, metric, subject.noise_nats)


def _ordered(
    config: SearchConfig, workbench: _Workbench, subject: _Subject, journal: SearchJournal, progress: ProgressCallback
) -> Search:
    metric, importance = metric_of(config.metric), STRATEGIES[config.strategy].importance
    seed, noise = config.strategy_seed or 0, subject.noise_nats
    return OrderedSearch(workbench, *subject.sizes, journal, progress, metric, noise, importance=importance, seed=seed)


def _collapse(
    config: SearchConfig, workbench: _Workbench, subject: _Subject, journal: SearchJournal, progress: ProgressCallback
) -> Search:
    return CollapseSearch(_LateBench(workbench), *subject.sizes, journal, progress, settings=config.laco)


class _LateBench:
    """A bench whose model is loaded when the first merge is tried."""

    def __init__(self, workbench: _Workbench) -> None:
        self._workbench = workbench

    @cached_property
    def _merging(self) -> MergingModel:
        return self._workbench.merging

    def similarity(self, merges: Sequence[LayerMerge], removed: Sequence[Block]) -> float:
        """See `MergeBench.similarity`."""
        return self._merging.similarity(merges, removed)

    def nll(self, merges: Sequence[LayerMerge], removed: Sequence[Block]) -> Tensor:
        """See `MergeBench.nll`."""
        return self._merging.nll(merges, removed)


_SEARCHES: Mapping[Procedure, Callable[..., Search]] = {
    "greedy": _greedy,
    "ordered": _ordered,
    "collapse": _collapse,
}


def _pruning_step(step: SearchStep, block: Block) -> PruningStep:
    numbers = set(PruningStep.model_fields) - {"layer_index", "block_kind"}
    return PruningStep(layer_index=block.layer_index, block_kind=block.block_kind, **step.model_dump(include=numbers))


STAGE: Stage[SearchConfig, SearchInputs, SearchManifest] = Stage(
    name="search",
    version=3,
    manifest_type=SearchManifest,
    run=run,
    not_resume_fields=frozenset({"num_blocks", "ratio"}),
    resumable=True,
)
