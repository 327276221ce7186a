"""The rows of a comparison: what each cell's run has measured, beside what was asked for and what the paper found.

Reads the runs' records and the JSON files of their artifacts. Computes no model and shows nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import geometric_mean
from typing import Any

from pydantic import BaseModel, ConfigDict

from blockpruner.errors import ArtifactError
from blockpruner.strategies import STRATEGIES
from flows.grid import EXTERNAL_ROLE, Cell, Comparison
from flows.paper_figures import CLOSE, paper_figures
from flows.recipe import TARGET_FIELDS, Recipe
from flows.summary import RunSummary, finite
from stages.accuracy import primary
from stages.artifacts import read_envelope
from stages.runs import RunRecord, RunStore
from stages.store_schema import EvaluationRow, SpeedRow
from stages.workspace import Warn, Workspace

_SHOWN = (
    *("model", "strategy", "strategy_seed", "metric", "block_kinds", "calibration", "num_samples", "seed", "name"),
    *TARGET_FIELDS,
)
"""Recipe fields that a row has for themselves."""


class Outcome(BaseModel):
    """How a cell ended."""

    model_config = ConfigDict(frozen=True)

    key: str
    """See `Cell.key`."""
    run_id: str | None
    """None where no run began."""
    speed_run_id: str | None = None
    """The run that timed it."""
    error: str | None = None


@dataclass(frozen=True)
class Pair:
    """A number of the dense and of the pruned model; None where it was not measured."""

    dense: float | None = None
    pruned: float | None = None


@dataclass(frozen=True)
class Published:
    """What the paper has for the same model and method."""

    strategy: str
    ratio: float | None
    """Share of parameters removed; None where the paper does not say."""
    perplexity: Pair
    """On WikiText-2; of what was measured alike here, else None."""
    average: Pair
    """Mean accuracy over the paper's tasks, as a share."""


@dataclass(frozen=True)
class Row:
    """One cell's row."""

    label: str
    model: str
    strategy: str | None
    strategy_seed: int | None
    """Of a strategy that draws; None of any other."""
    metric: str | None
    block_kinds: str | None
    calibration: str
    num_samples: int | None
    """None: all rows."""
    seed: int
    """Of the calibration set's draw."""
    settings: Mapping[str, Any]
    """What else the cells differ in, by recipe field, where this one's is not the default."""
    ratio_asked: float | None
    num_blocks_asked: int | None
    ratio: float | None
    """Share of all parameters that is gone."""
    num_blocks_removed: int | None
    perplexities: Mapping[str, Pair]
    """By evaluation text."""
    accuracies: Mapping[str, Pair]
    """By task: see `stages.accuracy`."""
    average: Pair
    """Mean of the tasks' accuracies."""
    prefill_speedup: float | None
    """How many times as fast as the dense model: the geometric mean over what was timed."""
    decode_speedup: float | None
    search_seconds: float | None
    """What the steps of the search up to here took, whenever they were computed."""
    seconds: float | None
    """What the run took; stages that others had computed before cost it nothing."""
    status: str
    error: str | None
    note: str | None
    run_id: str | None
    speed_run_id: str | None
    published: Published | None = None
    not_as_in_paper: tuple[str, ...] = ()
    """Why the paper's figures for this model and method, or some of them, do not stand beside the row."""

    @property
    def retained(self) -> float | None:
        """The share of the dense model's mean accuracy that is left."""
        if self.average.dense is None or self.average.pruned is None or self.average.dense == 0:
            return None
        return self.average.pruned / self.average.dense


def rows_of(comparison: Comparison, outcomes: Sequence[Outcome], workspace: Workspace, warn: Warn) -> list[Row]:
    """A row for every cell, in their order."""
    by_key, runs = {outcome.key: outcome for outcome in outcomes}, RunStore(workspace.path, warn)
    recipes = [cell.recipe for cell in comparison.cells]
    differing = [
        name
        for name in Recipe.model_fields
        if name not in _SHOWN and len({getattr(each, name) for each in recipes}) > 1
    ]
    return [_row(cell, by_key[cell.key], differing, runs, warn) for cell in comparison.cells]


def _row(cell: Cell, outcome: Outcome, differing: Sequence[str], runs: RunStore, warn: Warn) -> Row:
    recipe, external = cell.recipe, cell.external
    summary = _summary(outcome.run_id, runs, warn)
    timed = _summary(outcome.speed_run_id, runs, warn)
    record = summary.record if summary else None
    prefill, decode = _speedups(timed.rows.speed if timed else ())
    row = Row(
        label=cell.label,
        model=recipe.model,
        strategy=external.label if external else recipe.strategy,
        strategy_seed=recipe.strategy_seed
        if STRATEGIES[recipe.strategy].importance == "chance" and not external
        else None,
        metric=None if external else recipe.judged_by,
        block_kinds=None if external else recipe.block_kinds,
        calibration=recipe.calibration,
        num_samples=recipe.num_samples,
        seed=recipe.seed,
        settings={} if external else _set(recipe, differing),
        ratio_asked=None if external else recipe.ratio,
        num_blocks_asked=None if external else recipe.num_blocks,
        ratio=summary.ratio if summary else None,
        num_blocks_removed=record.num_blocks_removed if record and not external else None,
        perplexities=_perplexities(summary) if summary else {},
        accuracies=_accuracies(summary.rows.evaluations) if summary else {},
        average=Pair(summary.average("dense"), summary.average("pruned")) if summary else Pair(),
        prefill_speedup=prefill,
        decode_speedup=decode,
        search_seconds=_search_seconds(summary) if summary else None,
        seconds=_seconds(record),
        status=_status(record, outcome),
        error=outcome.error or (record.error if record else None),
        note=_note(summary) if summary and external else None,
        run_id=outcome.run_id,
        speed_run_id=outcome.speed_run_id,
    )
    return row if row.ratio is None else _beside_the_papers(row, cell, record)


def _set(recipe: Recipe, names: Iterable[str]) -> dict[str, Any]:
    """The settings that are not the defaults."""
    values = {name: getattr(recipe, name) for name in names}
    return {name: value for name, value in values.items() if value != Recipe.model_fields[name].default}


def _beside_the_papers(row: Row, cell: Cell, record: RunRecord | None) -> Row:
    """The row with the paper's figures, as far as they were found as ours were, and else with what differs."""
    figures, method = paper_figures(), (row.strategy or "").lower()
    model = figures.model(row.model, record.num_layers if record else None)
    if model is None or row.ratio is None or not model.results_of(method):
        return row
    settings = cell.recipe.model_dump()
    other_search = [] if cell.external else figures.other_search(settings)
    other_text, other_tasks = _other_text(row, cell), figures.other_tasks(settings)
    result = model.nearest(method, row.ratio)
    if result is None:
        other_search.append(f"the paper has no ratio within {CLOSE:g} of this one")
    published = None
    if result is not None and not other_search and not (other_text and other_tasks):
        published = Published(
            strategy=result.strategy,
            ratio=result.ratio,
            perplexity=Pair() if other_text else Pair(model.dense.perplexity, result.perplexity),
            average=Pair() if other_tasks else Pair(_share(model.dense.average), _share(result.average)),
        )
    differences = dict.fromkeys([*other_search, *other_text, *other_tasks])
    return replace(row, published=published, not_as_in_paper=tuple(differences))


def _other_text(row: Row, cell: Cell) -> list[str]:
    """In what the perplexity is not the paper's."""
    figures = paper_figures()
    if figures.text not in row.perplexities:
        return [f"perplexity on {figures.text} was not measured"]
    return figures.other_search({"sequence_length": cell.recipe.sequence_length})


def _summary(run_id: str | None, runs: RunStore, warn: Warn) -> RunSummary | None:
    if run_id is None:
        return None
    try:
        return RunSummary.of(runs.load(run_id), runs.workspace, warn)
    except ArtifactError as error:
        warn(str(error))
        return None


def _perplexities(summary: RunSummary) -> dict[str, Pair]:
    """On the evaluation texts; on the calibration set where there are no others."""
    texts = [row.text for row in summary.texts]
    shown = [text for text in texts if text != "calibration"] or texts
    return {text: Pair(*(summary.perplexity(variant, text) for variant in ("dense", "pruned"))) for text in shown}


def _accuracies(evaluations: Sequence[EvaluationRow]) -> dict[str, Pair]:
    """By task, what it counts with in the average."""
    dense, pruned = (
        {task: row.value for task, row in primary(row for row in evaluations if row.variant == variant).items()}
        for variant in ("dense", "pruned")
    )
    by_task = {task: Pair(dense.get(task), pruned.get(task)) for task in (*dense, *pruned)}
    return {task: pair for task, pair in by_task.items() if pair != Pair()}


def _speedups(rows: Iterable[SpeedRow]) -> tuple[float | None, float | None]:
    """Prefill and decoding, dense over pruned and pruned over dense."""
    by_case: dict[tuple[int, int, int], dict[str, SpeedRow]] = {}
    for row in rows:
        by_case.setdefault((row.batch_size, row.prompt_tokens, row.new_tokens), {})[row.variant] = row
    pairs = [(case["dense"], case["pruned"]) for case in by_case.values() if case.keys() >= {"dense", "pruned"}]
    if not pairs:
        return None, None
    prefill = geometric_mean(dense.prefill_ms / pruned.prefill_ms for dense, pruned in pairs)
    decode = geometric_mean(pruned.decode_tokens_per_s / dense.decode_tokens_per_s for dense, pruned in pairs)
    return prefill, decode


def _search_seconds(summary: RunSummary) -> float | None:
    steps = {step.step: step.seconds for step in summary.removed}
    return math.fsum(steps.values()) if steps else None


def _seconds(record: RunRecord | None) -> float | None:
    if record is None or record.finished_at is None:
        return None
    return (record.finished_at - record.created_at).total_seconds()


def _status(record: RunRecord | None, outcome: Outcome) -> str:
    if record is None:
        return "failed" if outcome.error else "not run"
    return "crashed" if record.status == "running" else record.status


def _note(summary: RunSummary) -> str | None:
    """Whether an external checkpoint was measured on the same tokens as its dense model."""
    cut = {role: digest for role in _text_roles(summary.record) if (digest := _token_digest(summary, role))}
    other = [
        role
        for role in cut
        if role.startswith(EXTERNAL_ROLE) and cut[role] != cut.get(role.removeprefix(EXTERNAL_ROLE))
    ]
    if not other:
        return None
    return "its tokenizer cuts the texts otherwise: its perplexity is of other tokens than the dense model's"


def _text_roles(record: RunRecord) -> list[str]:
    return [stage.role for stage in record.stages if stage.stage == "calibrate"]


def _token_digest(summary: RunSummary, role: str) -> str | None:
    stage = summary.record.stage(role)
    if stage is None or stage.artifact_path is None:
        return None
    try:
        return str(read_envelope(summary.workspace.inside(stage.artifact_path)).manifest["token_digest"])
    except (ArtifactError, KeyError):
        return None


def _share(percent: float | None) -> float | None:
    return None if percent is None else percent / 100


def as_json(row: Row) -> dict[str, Any]:
    """The row as `--json` gives it. Numbers that are not finite are null."""
    values = {
        **vars(row),
        "perplexities": {text: vars(pair) for text, pair in row.perplexities.items()},
        "accuracies": {task: vars(pair) for task, pair in row.accuracies.items()},
        "average": vars(row.average),
        "retained": row.retained,
        "published": _published_json(row.published) if row.published else None,
    }
    return {name: finite(value) for name, value in values.items()}


def _published_json(found: Published) -> dict[str, Any]:
    return {**vars(found), "perplexity": vars(found.perplexity), "average": vars(found.average)}
