"""What is known of one run, gathered from its record and its artifacts: for `show`, and for `--json`.

Reads JSON files only, so that it answers at once and also while the database is taken. Shows nothing.
"""

from __future__ import annotations

import json
import math
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blockpruner.errors import ArtifactError
from flows.wording import as_json_escapes
from stages.accuracy import AVERAGE_TASK
from stages.runs import RunRecord
from stages.store_rows import RunRows, rows_of
from stages.store_schema import ExportRow, PerplexityRow, StepRow
from stages.workspace import Warn, Workspace

_CALIBRATION = "calibration"
_NOT_SHOWN = {"fingerprint", "checkpoints", "started_at"}
"""What `--json` does not tell of a stage."""
_SAMPLES_FILE = "samples.parquet"


@dataclass(frozen=True)
class RunSummary:
    """One run, as its record and artifacts have it."""

    record: RunRecord
    rows: RunRows
    workspace: Workspace
    copied_to: Path | None = None
    """Where the user asked to have a copy of the exported model."""
    alone: RunRecord | None = None
    """The record as the run left it, where `record` has stages of other runs as well."""

    @classmethod
    def of(
        cls,
        record: RunRecord,
        workspace: Workspace,
        warn: Warn,
        copied_to: Path | None = None,
        alone: RunRecord | None = None,
    ) -> RunSummary:
        """Read a run's artifacts; what is missing is said and left out."""
        return cls(record, rows_of(record, workspace, warn), workspace, copied_to, alone)

    @property
    def export(self) -> ExportRow | None:
        """The exported model, if the run has one."""
        return self.rows.exports[0] if self.rows.exports else None

    @property
    def export_path(self) -> Path | None:
        """Where the exported model lies."""
        return self.copied_to or (Path(self.export.path) if self.export else None)

    @property
    def removed(self) -> tuple[StepRow, ...]:
        """The steps whose blocks are gone: those that were exported, or else all that were searched."""
        return tuple(self.rows.search_steps[: self.export.num_blocks_removed if self.export else None])

    @property
    def ratio(self) -> float | None:
        """The share of all parameters that were removed, whether or not a format keeps them, as zeros.

        None where nothing was removed, or it is not known.
        """
        total, left = self.record.num_parameters, self.record.num_parameters_left
        if left is not None and total:  # pruned elsewhere
            return 1 - left / total
        return self.removed[-1].ratio if self.removed else None

    def perplexity(self, variant: str, text: str = _CALIBRATION) -> float | None:
        """A measured perplexity; None if it was not measured."""
        found = (row.perplexity for row in self.rows.perplexities if (row.variant, row.text) == (variant, text))
        return next(found, None)

    def average(self, variant: str) -> float | None:
        """The mean accuracy over the tasks, as in the paper's tables; None if none was measured."""
        found = (row.value for row in self.rows.evaluations if (row.variant, row.task) == (variant, AVERAGE_TASK))
        return next(found, None)

    @property
    def samples(self) -> dict[str, Path]:
        """Where the answers to the tasks' questions lie, by variant, where they were kept."""
        paths = {}
        for variant in ("dense", "pruned"):
            stage = self.record.stage(f"evaluate:{variant}")
            if stage is not None and stage.artifact_path is not None:
                with suppress(ArtifactError):  # which was said of its rows
                    paths[variant] = self.workspace.inside(Path(stage.artifact_path, _SAMPLES_FILE))
        return {variant: path for variant, path in paths.items() if path.is_file()}

    @property
    def texts(self) -> list[PerplexityRow]:
        """One row a text, the dense ones first of all."""
        return list({row.text: row for row in reversed(self.rows.perplexities)}.values())[::-1]

    def as_json(self) -> dict[str, Any]:
        """The object that `--json` prints. Numbers that are not finite are null."""
        record = self.record
        return {
            "run_id": record.run_id,
            "name": record.name,
            "status": record.status,
            "error": record.error,
            "model": record.model,
            "num_layers": record.num_layers,
            "num_blocks_removed": record.num_blocks_removed,
            "pruning_order": [_step(step) for step in self.rows.search_steps],
            "dense_perplexity": _number(self.perplexity("dense")),
            "pruned_perplexity": _number(self.perplexity("pruned")),
            "dense_average": _number(self.average("dense")),
            "pruned_average": _number(self.average("pruned")),
            "samples": {variant: str(path) for variant, path in self.samples.items()},
            "export_path": str(self.export_path) if self.export_path else None,
            "export": _plain(self.export._asdict()) if self.export else None,
            "exports": [_plain(row._asdict()) for row in self.rows.exports],
            "perplexities": [_plain(row._asdict()) for row in self.rows.perplexities],
            "speed": [_plain(row._asdict()) for row in self.rows.speed],
            "evaluations": [_plain(row._asdict()) for row in self.rows.evaluations],
            "stages": [stage.model_dump(mode="json", exclude=_NOT_SHOWN) for stage in record.stages],
            "workspace": str(self.workspace.path),
            "database": str(self.workspace.database),
        }


def finite(value: Any) -> Any:
    """The value as JSON can hold it: null for a number that is not finite, at any depth; keys are text."""
    if isinstance(value, float):
        return _number(value)
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    return value


def dump_json(value: object) -> str:
    """JSON on one line, fit to be shown."""
    return as_json_escapes(json.dumps(value, ensure_ascii=False, allow_nan=False, default=str))


def _step(step: StepRow) -> dict[str, Any]:
    names = ("step", "layer_index", "block_kind", "score", "perplexity", "num_parameters_removed", "ratio", "seconds")
    return _plain({name: getattr(step, name) for name in names})


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    row.pop("run_id", None)
    return {name: finite(value) for name, value in row.items()}


def _number(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
