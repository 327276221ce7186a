"""The rows that one run gives to the database, read from its record and from the JSON files of its artifacts.

Imports no stage and no database. The readers ask for the fields that they need and pass over the rest, so that
artifacts written by an earlier or a later version can still be read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import accumulate
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from blockpruner.errors import ArtifactError
from stages.artifacts import Envelope, read_envelope, read_file
from stages.runs import RunRecord, StageRun
from stages.store_schema import (
    EvaluationRow,
    ExportRow,
    PerplexityRow,
    RunRow,
    ScoreRow,
    SpeedRow,
    StageRow,
    StepRow,
)
from stages.workspace import Warn, Workspace

_CALIBRATION = "calibration"
"""The name under which perplexities on the calibration set are listed."""
_TRACE_FILE = "trace.jsonl"
_MODEL_FOLDER = "model"
_LACO_LETTERS = {
    "layers_per_merge": "C",
    "first_layer": "L",
    "last_layer": "H",
    "interval": "I",
    "threshold": "T",
}
"""LaCo's settings as its paper calls them."""


class _Block(BaseModel):
    layer_index: int
    block_kind: str


class _Candidate(BaseModel):
    block: _Block
    also: tuple[_Block, ...] = ()
    score: float
    perplexity: float | None
    rank: int
    chosen: bool
    tied: bool = False


class _Step(BaseModel):
    step: int
    block: _Block
    also: tuple[_Block, ...] = ()
    score: float
    perplexity: float
    num_parameters_removed: int
    ratio: float
    seconds: float
    work_saved: float = 0.0
    candidates: tuple[_Candidate, ...]


class _Search(BaseModel):
    dense_perplexity: float


class _SearchConfig(BaseModel):
    stock_compatible_at: str | None = None
    laco: dict[str, float | None] | None = None


class _Prepared(BaseModel):
    """A text cut into tokens."""

    token_digest: str | None = None


class _Text(BaseModel):
    text: str
    num_tokens: int
    perplexity: float


class _Metric(BaseModel):
    task: str
    metric: str
    value: float | None
    stderr: float | None = None
    num_fewshot: int | None = None
    num_examples: int | None = None


class _Measured(BaseModel):
    """A baseline or an evaluation."""

    texts: tuple[_Text, ...] = ()
    metrics: tuple[_Metric, ...] = ()


class _Export(BaseModel):
    format: str
    num_blocks_removed: int
    num_parameters: int
    bytes: int
    verified: bool
    max_logit_difference: float | None = None
    verified_with: str | None = None


class _Speed(BaseModel):
    variant: str
    batch_size: int
    prompt_tokens: int
    new_tokens: int
    prefill_ms: float
    decode_tokens_per_s: float
    peak_memory_bytes: int | None
    kv_cache_bytes_per_token: float
    num_parameters: int | None = None
    weight_bytes: int | None = None


class _Speeds(BaseModel):
    machine: str
    speeds: tuple[_Speed, ...]


FoundT = TypeVar("FoundT")


@dataclass(frozen=True)
class RunRows:
    """All rows of one run; the fields are named like the tables."""

    runs: Sequence[RunRow]
    stage_runs: Sequence[StageRow]
    search_steps: Sequence[StepRow]
    block_scores: Sequence[ScoreRow]
    perplexities: Sequence[PerplexityRow]
    evaluations: Sequence[EvaluationRow]
    exports: Sequence[ExportRow]
    speed: Sequence[SpeedRow]


@dataclass(frozen=True)
class _Found:
    """What the artifacts of a run say; empty where it has none, or none that can be read."""

    search: _Search | None
    search_config: _SearchConfig
    steps: tuple[_Step, ...]
    token_digests: Mapping[str, str | None]
    """By role."""
    baseline: _Measured
    dense: _Measured
    dense_texts: _Measured
    pruned: _Measured
    pruned_fingerprint: str | None
    exports: tuple[tuple[_Export, str], ...]
    """Each with the folder of its model; the first is the one that was evaluated."""
    speeds: _Speeds | None


def rows_of(record: RunRecord, workspace: Workspace, warn: Warn) -> RunRows:
    """Read the rows of a run; an artifact that is missing or damaged is said, and only its rows are left out."""
    run_id, found = record.run_id, _find(record, workspace, warn)
    return RunRows(
        runs=[_run_row(record, found)],
        stage_runs=[_stage_row(run_id, stage, found.token_digests.get(stage.role)) for stage in record.stages],
        search_steps=_step_rows(record, found.steps),
        block_scores=[
            _score_row(run_id, step.step, each, block)
            for step in found.steps
            for each in step.candidates
            for block in (each.block, *each.also)
        ],
        perplexities=[*_dense_perplexities(run_id, found), *_pruned_perplexities(record, found)],
        evaluations=[
            EvaluationRow(run_id, variant, m.task, m.metric, m.value, m.stderr, m.num_fewshot, m.num_examples)
            for variant, measured in (("dense", found.dense), ("pruned", found.pruned))
            for m in measured.metrics
        ],
        exports=[_export_row(run_id, export, path) for export, path in found.exports],
        speed=_speed_rows(run_id, found.speeds),
    )


def record_digest(record: RunRecord) -> str:
    """What tells whether rows were made from the record as it is now."""
    return hashlib.sha256(record.model_dump_json().encode()).hexdigest()


def _find(record: RunRecord, workspace: Workspace, warn: Warn) -> _Found:
    def read(role: str, reader: Callable[[Path, Envelope], FoundT]) -> FoundT | None:
        stage = record.stage(role)
        if stage is None or stage.artifact_path is None:
            return None
        try:
            folder = workspace.inside(stage.artifact_path)
            return reader(folder, read_envelope(folder))
        except (ArtifactError, ValidationError, OSError) as error:
            said = str(error).removeprefix(f"{stage.artifact_path} ")
            reason = f"does not fit ({error.error_count()} fields)" if isinstance(error, ValidationError) else said
            warn(f"run {record.run_id}: the artifact {stage.artifact_path} {reason}: its rows are left out")
            return None

    def measured(role: str) -> _Measured:
        return read(role, lambda _, envelope: _Measured.model_validate(envelope.manifest)) or _Measured()

    search = read("search", _read_search)
    pruned = read("evaluate:pruned", lambda _, envelope: (_Measured.model_validate(envelope.manifest), envelope.inputs))
    roles = dict.fromkeys(stage.role for stage in record.stages if stage.role.partition(":")[0] == "export")
    exports = [
        read(role, lambda folder, envelope: (_Export.model_validate(envelope.manifest), str(folder / _MODEL_FOLDER)))
        for role in roles
    ]
    return _Found(
        search=search[0] if search else None,
        search_config=search[1] if search else _SearchConfig(),
        steps=search[2] if search else (),
        token_digests={
            stage.role: found.token_digest
            for stage in record.stages
            if stage.stage == "calibrate" and (found := read(stage.role, _read_prepared)) is not None
        },
        baseline=measured("baseline"),
        dense=measured("evaluate:dense"),
        dense_texts=measured("evaluate:dense:texts"),
        pruned=pruned[0] if pruned else _Measured(),
        pruned_fingerprint=pruned[1].get("model") if pruned else None,
        exports=tuple(export for export in exports if export is not None),
        speeds=read("speed", lambda _, envelope: _Speeds.model_validate(envelope.manifest)),
    )


def _read_search(folder: Path, envelope: Envelope) -> tuple[_Search, _SearchConfig, tuple[_Step, ...]]:
    lines = read_file(folder, envelope, _TRACE_FILE).splitlines()
    steps = tuple(_Step.model_validate_json(line) for line in lines)
    return _Search.model_validate(envelope.manifest), _SearchConfig.model_validate(envelope.config), steps


def _read_prepared(_: Path, envelope: Envelope) -> _Prepared:
    return _Prepared.model_validate(envelope.manifest)


def _dense_perplexities(run_id: str, found: _Found) -> list[PerplexityRow]:
    """The baseline's; where it did not measure a text, the evaluation's, and for the calibration set the search's."""
    rows = {
        text.text: PerplexityRow(run_id, "dense", text.text, 0, text.num_tokens, text.perplexity)
        for text in (*found.dense.texts, *found.dense_texts.texts, *found.baseline.texts)
    }
    if found.search is not None and _CALIBRATION not in rows:
        rows[_CALIBRATION] = PerplexityRow(run_id, "dense", _CALIBRATION, 0, None, found.search.dense_perplexity)
    return list(rows.values())


def _pruned_perplexities(record: RunRecord, found: _Found) -> list[PerplexityRow]:
    """The evaluation's; where it did not measure the calibration set, the search's at the exported number of blocks."""
    run_id = record.run_id
    removed = found.exports[0][0].num_blocks_removed if found.exports else record.num_blocks_removed
    removed_by_step = _num_removed(found.steps)
    if removed is None and found.steps:
        removed = removed_by_step[-1]
    rows = [PerplexityRow(run_id, "pruned", t.text, removed, t.num_tokens, t.perplexity) for t in found.pruned.texts]
    if any(row.text == _CALIBRATION for row in rows) or removed not in removed_by_step:
        return rows
    num_tokens = next((text.num_tokens for text in found.baseline.texts if text.text == _CALIBRATION), None)
    perplexity = found.steps[removed_by_step.index(removed)].perplexity
    return [*rows, PerplexityRow(run_id, "pruned", _CALIBRATION, removed, num_tokens, perplexity)]


def _run_row(record: RunRecord, found: _Found) -> RunRow:
    own = {"created_at", "finished_at", "config", "record_digest", "search_family", "settings", "pruned_fingerprint"}
    search = record.stage("search")
    return RunRow(
        **{name: getattr(record, name) for name in RunRow._fields if name not in own},
        search_family=search.checkpoints or search.fingerprint if search else None,
        settings=_settings(found.search_config),
        pruned_fingerprint=found.pruned_fingerprint,
        created_at=_utc(record.created_at),
        finished_at=_utc(record.finished_at) if record.finished_at else None,
        config=json.dumps(record.model_dump(mode="json")["config"]),
        record_digest=record_digest(record),
    )


def _settings(config: _SearchConfig) -> str | None:
    """What a search was told beside strategy, metric and kinds of blocks, for people; the same for the same."""
    if config.laco is not None:
        told = {_LACO_LETTERS.get(name, name): value for name, value in config.laco.items() if value is not None}
        return ", ".join(f"{letter}={value:g}" for letter, value in told.items())
    return "stock-compatible" if config.stock_compatible_at is not None else None


def _stage_row(run_id: str, stage: StageRun, token_digest: str | None) -> StageRow:
    same = set(StageRow._fields) - {"run_id", "started_at", "token_digest"}
    values = {name: getattr(stage, name) for name in same}
    return StageRow(run_id=run_id, started_at=_utc(stage.started_at), token_digest=token_digest, **values)


def _num_removed(steps: Sequence[_Step]) -> list[int]:
    """How many blocks were gone after each step."""
    return list(accumulate(1 + len(step.also) for step in steps))


def _step_rows(record: RunRecord, steps: Sequence[_Step]) -> list[StepRow]:
    return [
        StepRow(
            run_id=record.run_id,
            step=step.step,
            layer_index=block.layer_index,
            block_kind=block.block_kind,
            score=step.score,
            perplexity=step.perplexity,
            num_parameters_removed=step.num_parameters_removed,
            ratio=step.ratio,
            seconds=step.seconds,
            work_saved=step.work_saved,
            strategy=record.strategy,
            num_blocks_removed=num_removed,
        )
        for step, num_removed in zip(steps, _num_removed(steps), strict=True)
        for block in (step.block, *step.also)
    ]


def _score_row(run_id: str, step: int, candidate: _Candidate, block: _Block) -> ScoreRow:
    return ScoreRow(
        run_id=run_id,
        step=step,
        layer_index=block.layer_index,
        block_kind=block.block_kind,
        score=candidate.score,
        perplexity=candidate.perplexity,
        rank=candidate.rank,
        chosen=candidate.chosen,
        tied=candidate.tied,
    )


def _speed_rows(run_id: str, found: _Speeds | None) -> list[SpeedRow]:
    if found is None:
        return []
    return [SpeedRow(run_id=run_id, machine=found.machine, **speed.model_dump()) for speed in found.speeds]


def _export_row(run_id: str, export: _Export, path: str) -> ExportRow:
    return ExportRow(run_id=run_id, path=path, **export.model_dump())


def _utc(instant: datetime) -> datetime:
    """The same instant in UTC, without a time zone, as the TIMESTAMP columns want it."""
    return instant.astimezone(UTC).replace(tzinfo=None)
