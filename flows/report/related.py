"""What other runs measured of the same exported model: `run` evaluates it, a later `speed` times it.

A report of either shows both. Knows records only.
"""

from __future__ import annotations

from collections.abc import Sequence

from stages.runs import RunRecord, StageRun


def with_related(record: RunRecord, records: Sequence[RunRecord]) -> RunRecord:
    """The record with the stages that it lacks, from the newest completed runs with the same export."""
    export = record.stage("export")
    if export is None or export.fingerprint is None:
        return record
    stages = {stage.role: stage for stage in record.stages}
    for other in sorted(records, key=lambda each: each.age_key, reverse=True):
        theirs = other.stage("export")
        if other.status == "completed" and theirs is not None and theirs.fingerprint == export.fingerprint:
            for stage in other.stages:
                stages.setdefault(stage.role, _taken(stage))
    return record.model_copy(update={"stages": list(stages.values())})


def _taken(stage: StageRun) -> StageRun:
    return stage.model_copy(update={"cached": True})
