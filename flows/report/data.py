"""What the report is about: runs with their rows, the names they go by, and the figures drawn from several tables.

Reads the runs' records and artifacts through the stages' readers. Draws nothing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePath

from blockpruner.errors import ArtifactError
from flows.summary import RunSummary
from flows.wording import one_line
from stages.accuracy import ACCURACIES, AVERAGE_TASK, primary
from stages.artifacts import read_envelope
from stages.runs import RunRecord, StageRun
from stages.store_schema import EvaluationRow, ScoreRow, SpeedRow
from stages.workspace import Workspace

_SHOWN_METRICS = (*ACCURACIES, "exact_match")
"""What is shown of a task, the first that it has."""
_GENERIC_NAMES = frozenset({"model", "models", "hf", "checkpoint", "weights"})


@dataclass(frozen=True)
class StageTime:
    """One stage of a run and what it cost."""

    label: str
    seconds: float
    """What computing its result took, now or when it was computed."""
    cached: bool
    """Whether this run took it as it was."""
    status: str


@dataclass(frozen=True)
class Accuracy:
    """One task's primary metric, or the average of several tasks; shares from 0 to 1."""

    task: str
    metric: str
    value: float
    stderr: float | None


@dataclass(frozen=True)
class ReportRun:
    """One run, under the name by which the report calls it."""

    label: str
    index: int
    """Its place among the report's runs."""
    summary: RunSummary
    stages: tuple[StageTime, ...]

    @property
    def record(self) -> RunRecord:
        """The run's record."""
        return self.summary.record

    @property
    def model(self) -> str:
        """The model's name without the folders before it."""
        return short_model(self.record)

    @property
    def model_key(self) -> str:
        """What is the same for two runs of the same model."""
        return self.record.model_fingerprint or self.record.model or self.record.run_id

    @property
    def settings(self) -> str | None:
        """What else the search was told, beside strategy, metric and kinds of blocks: its draw, LaCo's settings."""
        if self.record.metric == "chance":
            return f"draw {self.record.config.get('strategy_seed', 0)}"
        return self.summary.rows.runs[0].settings

    def accuracies(self, variant: str) -> list[Accuracy]:
        """Each task's primary metric, then, of several, their average."""
        return accuracies(row for row in self.summary.rows.evaluations if row.variant == variant)

    def speeds(self, variant: str) -> dict[tuple[int, int], SpeedRow]:
        """The timings by batch size and prompt length."""
        return {(r.batch_size, r.prompt_tokens): r for r in self.summary.rows.speed if r.variant == variant}


def report_runs(summaries: Sequence[RunSummary]) -> tuple[ReportRun, ...]:
    """The runs, each once, in the order given, under names that tell them apart."""
    unique = list({summary.record.run_id: summary for summary in summaries}.values())
    names = _labels([summary.record for summary in unique])
    return tuple(
        ReportRun(name, index, each, tuple(_stage_time(stage, each.workspace) for stage in each.record.stages))
        for index, (name, each) in enumerate(zip(names, unique, strict=True))
    )


def short_model(record: RunRecord) -> str:
    """The last part of a model's hub id or folder, with the one before it where the last says nothing."""
    path = PurePath(record.model or "a model")
    parts = path.parts[-2:] if path.name.lower() in _GENERIC_NAMES else path.parts[-1:]
    return one_line("/".join(parts).replace("//", "/") or "a model")


def accuracies(rows: Iterable[EvaluationRow]) -> list[Accuracy]:
    """The primary metric of each task of one model, then, of several tasks, their average.

    The average is the one that was stored with them, which knows of groups of tasks; where there is none, their mean,
    with the standard error of a mean of independent measurements.
    """
    rows = list(rows)
    found = [
        _accuracy(row, row.value)
        for row in primary(rows, _SHOWN_METRICS).values()
        if row.value is not None and math.isfinite(row.value)
    ]
    if len(found) < 2:
        return found
    stored = [
        Accuracy(row.task, "", row.value, row.stderr)
        for row in rows
        if row.task == AVERAGE_TASK and row.value is not None
    ]
    return [*found, *(stored or [_average(found)])]


def distinct_searches(runs: Sequence[ReportRun]) -> list[ReportRun]:
    """The runs whose scores are not the beginning of another's."""
    scores = {run.record.run_id: run.summary.rows.block_scores for run in runs}
    return [
        run
        for index, run in enumerate(runs)
        if scores[run.record.run_id]
        and not any(
            _is_start(scores[run.record.run_id], scores[other.record.run_id], or_same=position < index)
            for position, other in enumerate(runs)
            if other is not run and other.model_key == run.model_key
        )
    ]


def _is_start(rows: Sequence[ScoreRow], of: Sequence[ScoreRow], *, or_same: bool) -> bool:
    if len(rows) > len(of) or (len(rows) == len(of) and not or_same):
        return False
    return all(repr(mine[1:]) == repr(theirs[1:]) for mine, theirs in zip(rows, of, strict=False))  # NaN is not NaN


def _labels(records: Sequence[RunRecord]) -> list[str]:
    """The runs' names, or their models' where they have none; with the end of the id where that is not enough.

    The rows of one comparison alone are called as it calls them, without its name before each.
    """
    comparisons = {record.comparison for record in records}
    before = f"{records[0].comparison}: " if len(comparisons) == 1 and len(records) > 1 else ""
    names = [one_line((record.name or "").removeprefix(before)) or short_model(record) for record in records]
    times = Counter(names)
    ends = [record.run_id.rpartition("-")[2] for record in records]
    return [name if times[name] == 1 else f"{name} {end}" for name, end in zip(names, ends, strict=True)]


def _stage_time(stage: StageRun, workspace: Workspace) -> StageTime:
    seconds = stage.seconds
    if stage.cached and stage.artifact_path is not None:
        try:
            seconds = read_envelope(workspace.inside(stage.artifact_path)).seconds
        except (ArtifactError, OSError):  # removed or damaged since: what it took is not known any more
            seconds = stage.seconds
    return StageTime(stage.label, seconds, stage.cached, stage.status)


def _accuracy(row: EvaluationRow, value: float) -> Accuracy:
    stderr = row.stderr if row.stderr is not None and math.isfinite(row.stderr) else None
    return Accuracy(row.task, row.metric, value, stderr)


def _average(parts: Sequence[Accuracy]) -> Accuracy:
    errors = [part.stderr for part in parts if part.stderr is not None]
    stderr = math.sqrt(sum(error**2 for error in errors)) / len(parts) if len(errors) == len(parts) else None
    return Accuracy(AVERAGE_TASK, "", sum(part.value for part in parts) / len(parts), stderr)
