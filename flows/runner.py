"""Carries out a plan: every stage through the artifact store, every event into the run's record and the database.

Who executes a stage is a parameter, so that the command line's single stages and the Prefect flow share everything
else. Knows no Prefect, no tensor and no SQL.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging

from blockpruner.progress import Progress, ProgressCallback, silent
from flows.boundary import can_be_resumed, given_here
from flows.goals import Goal
from flows.grid import External
from flows.interruptions import INTERRUPTIONS
from flows.library_warnings import heard
from flows.plan import Job, Plan, PlannedStage
from flows.recipe import Recipe
from flows.reporter import Reporter
from flows.wording import cancelled, ended_by_library, in_plain_words, one_line
from stages.artifacts import Artifact, ArtifactStore
from stages.contract import Runtime
from stages.runs import RunDescription, RunRecord, RunStatus, RunStore, StageRun
from stages.store import ResultStore

_BRIEF_WAIT_S = 1.0
"""How long a run in progress, or one that is stopped, waits for a database that somebody has open; at its end it waits
longer."""


@dataclass(frozen=True)
class StageCall:
    """One stage about to be executed."""

    planned: PlannedStage
    job: Job
    found: Artifact[Any] | None
    """The artifact, where it is there already and whole."""
    compute: Callable[[ProgressCallback], Artifact[Any]]
    """Takes it from the store or computes it; reports to the terminal and to the callback given."""


Execute = Callable[[StageCall], Artifact[Any]]


def execute_here(call: StageCall) -> Artifact[Any]:
    """Execute a stage in this process, with nothing in between."""
    return call.found or call.compute(silent)


class Runner:
    """Runs plans in one workspace."""

    def __init__(self, workspace: Path, reporter: Reporter) -> None:
        """Open the workspace and close the runs whose process died.

        Raises:
            ArtifactError: if the workspace cannot be written.
        """
        transformers_logging.disable_progress_bar()  # one bar at a time, and that is ours
        self._reporter = reporter
        self.begun: RunRecord | None = None
        """The last run that this runner began, whatever became of it."""
        self._said: set[str] = set()
        self._artifacts = ArtifactStore(workspace, self._warn)
        self.workspace = self._artifacts.workspace
        self.runs = RunStore(workspace, self._warn)
        self._results = ResultStore(self.workspace.database, self._warn)
        self._results_in_passing = ResultStore(self.workspace.database, self._warn, wait=_BRIEF_WAIT_S)
        for record in self.runs.close_dead():
            self._warn(
                f"run {record.run_id} had died; it is now closed as crashed, and what it finished is kept: "
                f"`{given_here(record.resume_command, self.workspace.path)}` goes on with it"
            )

    def run(
        self,
        recipe: Recipe,
        goal: Goal,
        execute: Execute = execute_here,
        *,
        comparison: str | None = None,
        external: External | None = None,
        flow_run_id: str | None = None,
    ) -> RunRecord:
        """Plan and carry out a recipe; whatever happens, the run's record and rows say so.

        Args:
            recipe: what to do.
            goal: how far to go.
            execute: who executes a stage.
            comparison: the comparison that the run is a row of.
            external: see `Plan.make`.
            flow_run_id: Prefect's id of the run.

        Raises:
            BlockPrunerError: if the recipe cannot be carried out.
        """
        run = RunDescription(
            name=recipe.name,
            comparison=comparison,
            model=recipe.model,
            strategy=external.label if external else None,
            external=external.anchored().path if external else None,
            config=_settings(recipe),
        )
        record = self.begun = self.runs.create(run, goal=goal, flow_run_id=flow_run_id)
        with self._recorded(record), heard(self._warn):
            plan = Plan.make(recipe, goal, external)
            _describe(record, plan.description().model_copy(update={"comparison": comparison}))
            artifacts: dict[str, Artifact[Any]] = {}
            for planned in plan.stages:
                if (job := planned.job(artifacts)) is not None:
                    artifacts[planned.role] = self._stage(record, plan, planned, job, execute)
        return record

    def finished(
        self, recipe: Recipe, goal: Goal, comparison: str, external: External | None = None
    ) -> RunRecord | None:
        """The newest run of a comparison that did all of this and whose results are all there and whole, if any.

        It is known by the fingerprints of its stages: a model or a text that has changed since makes it another run.
        """
        done = [each for each in self.runs.list() if each.comparison == comparison and each.status == "completed"]
        if not done:
            return None
        wanted: dict[str, str | None] = {}
        with heard(self._warn):
            plan = Plan.make(recipe, goal, external)
        for role, artifact in self._looked_up(plan):
            if artifact is None:
                return None
            wanted[role] = artifact.fingerprint
        label = external.label if external else None
        return next((each for each in done if _did(each) == wanted and (not label or each.strategy == label)), None)

    def missing(self, plan: Plan) -> list[str]:
        """The roles of the stages that are yet to be computed, as far as can be told before the first of them is."""
        return [role for role, artifact in self._looked_up(plan) if artifact is None]

    def _looked_up(self, plan: Plan) -> Iterator[tuple[str, Artifact[Any] | None]]:
        """A plan's stages, by role, with their artifacts; behind the first that is not there, none is known."""
        artifacts: dict[str, Artifact[Any]] = {}
        are_known = True
        for planned in plan.stages:
            found = None
            if are_known:
                if (job := planned.job(artifacts)) is None:
                    continue
                found = self._artifacts.lookup(job.stage, job.fingerprint)
            if found is None:
                are_known = False
            else:
                artifacts[planned.role] = found
            yield planned.role, found

    def refuse(self, recipe: Recipe, goal: Goal, reason: str) -> None:
        """Record a run that could not begin."""
        run = RunDescription(name=recipe.name, model=recipe.model, config=_settings(recipe))
        self._end_early(self.runs.create(run, goal=goal), "failed", reason)

    @contextmanager
    def _recorded(self, record: RunRecord) -> Iterator[None]:
        """Close the record with what becomes of the body."""
        try:
            with INTERRUPTIONS.kept():
                yield
        except Exception as error:
            words = in_plain_words(error) or one_line(f"{type(error).__name__}: {error}")
            self._end_early(record, "failed", words)
            raise
        except SystemExit as error:  # nobody asked for that: an order to end is another one
            self._end_early(record, "crashed", ended_by_library(error, record.resume_command), self._results_in_passing)
            raise
        except BaseException:  # Ctrl-C, or an order to end
            self._cancel(record)
            raise
        self._end(record, "completed", None)

    def _cancel(self, record: RunRecord) -> None:
        can_be_resumed(record.resume_command, self.workspace.path)
        self._end_early(record, "cancelled", cancelled(record.resume_command), self._results_in_passing)

    def _end_early(self, record: RunRecord, status: RunStatus, error: str, results: ResultStore | None = None) -> None:
        """Also where the record itself cannot be written: that must not take the place of what went wrong first."""
        try:
            self._end(record, status, error, results)
        except OSError as failure:
            reason = failure.strerror or failure
            self._warn(f"the record of run {record.run_id} cannot be written ({reason}); a later command closes it")

    def _end(self, record: RunRecord, status: RunStatus, error: str | None, results: ResultStore | None = None) -> None:
        self.runs.finish(record, status, error)
        (results or self._results).ingest(record)

    def _stage(self, record: RunRecord, plan: Plan, planned: PlannedStage, job: Job, execute: Execute) -> Artifact[Any]:
        entry = StageRun(
            stage=job.stage.name,
            label=planned.label,
            role=planned.role,
            fingerprint=job.fingerprint,
            checkpoints=job.checkpoints,
        )
        record.stages.append(entry)
        self.runs.save(record)

        def compute(listener: ProgressCallback) -> Artifact[Any]:
            with INTERRUPTIONS.kept(), self._reporter.working(planned.label) as show:

                def both(progress: Progress) -> None:
                    INTERRUPTIONS.heed()
                    show(progress)
                    listener(progress)

                runtime = Runtime(plan.device, plan.recipe.batch_size, plan.recipe.scoring, plan.recipe.spread, both)
                return self._artifacts.get_or_run(job.stage, job.config, job.inputs, runtime)

        started = time.monotonic()
        try:
            with INTERRUPTIONS.kept():
                found = self._artifacts.lookup(job.stage, job.fingerprint)
                artifact = execute(StageCall(planned, job, found, compute))
        except Exception as error:
            entry.status, entry.error = "failed", in_plain_words(error) or one_line(str(error))
            raise
        entry.seconds = time.monotonic() - started
        self._note(record, entry, artifact)
        return artifact

    def _note(self, record: RunRecord, entry: StageRun, artifact: Artifact[Any]) -> None:
        """A stage is there: into the record, the database and the terminal."""
        entry.cached, entry.status = artifact.cached, "completed"
        entry.artifact_path = str(artifact.path.relative_to(self.workspace.path))
        if entry.role == "calibration":
            record.num_sequences = artifact.manifest.num_sequences
        if entry.role == "search":
            record.num_blocks_removed = len(artifact.manifest.pruning_order)
        if entry.role == "export":
            record.num_blocks_removed = artifact.manifest.num_blocks_removed
        self.runs.save(record)
        self._results_in_passing.ingest(record)
        self._reporter.stage_ended(entry.label, entry.seconds, cached=artifact.cached)

    def _warn(self, line: str) -> None:
        """Say it once, however often a run comes past it."""
        if line not in self._said:
            self._said.add(line)
            self._reporter.warn(line)


def _settings(recipe: Recipe) -> dict[str, Any]:
    return recipe.anchored().model_dump(mode="json")


def _did(record: RunRecord) -> dict[str, str | None]:
    """What a run's stages gave, by role."""
    return {stage.role: stage.fingerprint for stage in record.stages}


def _describe(record: RunRecord, description: RunDescription) -> None:
    for name in RunDescription.model_fields:
        setattr(record, name, getattr(description, name))
