"""The Prefect flow `prune`: the five stages, one task each, for the command line, the server and the schedule.

A task's cache key is the fingerprint of its stage, so that Prefect says `Cached` when the artifact store has the
result. The store decides: a key that Prefect remembers is passed over when the artifact is gone or damaged.
"""

from __future__ import annotations

import logging
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flows.prefect_settings import is_quiet  # isort: skip  # before Prefect is imported

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.client.schemas.objects import State, TaskRun
from prefect.context import TaskRunContext
from prefect.exceptions import MissingContextError
from prefect.runtime import flow_run
from prefect.states import Completed
from prefect.tasks import Task

from blockpruner.errors import BlockPrunerError
from blockpruner.progress import Progress, ProgressCallback, silent
from flows.flow_artifacts import publish_run
from flows.flow_here import failure_kept, handed_over
from flows.flow_hooks import note_end
from flows.interruptions import INTERRUPTIONS
from flows.prefect_signals import take_note_of_prefects_signals
from flows.recipe import Recipe
from flows.reporter import Reporter
from flows.runner import Runner, StageCall
from flows.server_contact import lost_server, shown, whatever_becomes_of_its_slot
from flows.summary import RunSummary
from flows.wording import in_plain_words
from stages.artifacts import Artifact
from stages.workspace import Workspace

_RETRIES = 2
"""More tries of a stage whose text comes from the hub."""
_RETRY_DELAY_S = 10
_ARTIFACT_EVERY_S = 5.0
"""How often Prefect hears of a search's progress."""

take_note_of_prefects_signals()


def _fingerprint(_: TaskRunContext, parameters: dict[str, Any]) -> str:
    """The cache key of a stage's task."""
    return str(parameters["fingerprint"])


def _is_worth_another_try(_: Task[Any, Any], __: TaskRun, state: State[Any]) -> bool:
    """Whether a stage failed because the hub could not be reached, though this machine wants to reach it."""
    error = state.data
    cause = error.__cause__ if isinstance(error, BlockPrunerError) else None
    return isinstance(cause, ConnectionError) and type(cause).__name__ != "OfflineModeIsEnabled"


@task(persist_result=True, result_serializer="json", cache_key_fn=_fingerprint)
def run_stage(fingerprint: str, execution: _Execution) -> State[dict[str, Any]] | dict[str, Any]:
    """One stage, through the artifact store."""
    artifact = execution.compute()
    result = {
        "stage": artifact.stage,
        "fingerprint": fingerprint,
        "path": str(artifact.path),
        "seconds": artifact.seconds,
    }
    return Completed(name="Cached", message="in the artifact store", data=result) if artifact.cached else result


@flow(
    name="prune",
    flow_run_name="{recipe.title}",
    persist_result=False,
    on_failure=[note_end],
    on_crashed=[note_end],
    on_cancellation=[note_end],
)
def prune(recipe: Recipe, workspace: str = "data") -> dict[str, Any]:
    """Find the blocks that a model can do without, remove them, export the model, and measure before and after.

    Args:
        recipe: what to do.
        workspace: the folder where results and everything that was computed are kept.
    """
    quieten_user_errors()
    reporter = LoggingReporter()
    runner = Runner(Path(workspace), reporter)
    with whatever_becomes_of_its_slot(), INTERRUPTIONS.kept(), _saying_how_to_go_on(runner, reporter):
        record = runner.run(
            recipe,
            "evaluate",
            lambda call: _through_prefect(call, reporter),
            flow_run_id=str(flow_run.get_id()),
        )
        summary = RunSummary.of(record, Workspace(Path(workspace)), reporter.warn)
        publish_run(summary, reporter)
        return handed_over({"run_id": record.run_id, "export_path": str(summary.export_path)})


@contextmanager
def _saying_how_to_go_on(runner: Runner, reporter: Reporter) -> Iterator[None]:
    """Say it where somebody stops the run; on the command line the command itself does."""
    try:
        yield
    except BaseException:
        begun = runner.begun
        if begun is not None and begun.status == "cancelled" and not is_quiet():
            command = f"{begun.resume_command} --workspace {shlex.quote(str(runner.workspace.path))}"
            reporter.say(f"stopped; what was finished is kept, and `{command}` goes on with it")
        raise


class _Execution:
    """One stage's execution inside a task, which hands the artifact back beside Prefect's own result."""

    def __init__(self, call: StageCall, listener: ProgressCallback) -> None:
        self._call, self._listener = call, listener
        self.artifact = call.found

    def compute(self) -> Artifact[Any]:
        """Take the artifact from the store or compute it."""
        with failure_kept():
            self.artifact = self._call.compute(self._listener)
        return self.artifact


def _through_prefect(call: StageCall, reporter: Reporter) -> Artifact[Any]:
    """Execute a stage as a task; Prefect's memory of it counts only if the artifact is there.

    Prefect keeps that memory in the user's own PREFECT_HOME, and not in the workspace, which can be somebody else's: it
    reads a file of results with whatever serializer the file names, be it pickle.
    """
    listener = _ProgressArtifact(call.planned.label, reporter) if call.planned.role == "search" else silent
    execution = _Execution(call, listener)
    from_hub = call.job.stage.name == "calibrate"
    stage_task = run_stage.with_options(
        name=call.job.stage.name,
        task_run_name=call.planned.label,
        refresh_cache=call.found is None,
        retries=_RETRIES if from_hub else 0,
        retry_delay_seconds=_RETRY_DELAY_S,
        retry_condition_fn=_is_worth_another_try,
    )
    stage_task(call.job.fingerprint, execution)
    assert execution.artifact is not None
    return execution.artifact


class LoggingReporter(Reporter):
    """Speaks to Prefect's log, and to the terminal as well where Prefect does not. Made within a flow."""

    def __init__(self) -> None:
        """See `Reporter`."""
        super().__init__()
        self._of_the_flow = get_run_logger()

    def say(self, line: str, style: str | None = None) -> None:
        """See `Reporter`."""
        try:
            log = get_run_logger()
        except MissingContextError:  # the library warns in a thread of its own
            log = self._of_the_flow
        log.info("%s", line)
        if is_quiet():
            super().say(line, style)


class _ProgressArtifact:
    """Shows a stage's progress on the server. A server that is gone stops the showing, never the stage."""

    def __init__(self, label: str, reporter: Reporter) -> None:
        self._label, self._reporter = label, reporter
        self._artifact_id: Any = None
        self._shown_at = float("-inf")
        self._lost = False

    def __call__(self, progress: Progress) -> None:
        """Show it, if it is time and the total is known."""
        done = progress.done == progress.total
        if self._lost or not progress.total or (time.monotonic() - self._shown_at < _ARTIFACT_EVERY_S and not done):
            return
        self._shown_at = time.monotonic()
        percent = 100.0 * progress.done / progress.total

        def show() -> None:
            if self._artifact_id is None:
                self._artifact_id = create_progress_artifact(percent, description=f"{self._label}: {progress.unit}")
            else:
                update_progress_artifact(self._artifact_id, percent)

        self._lost = not shown(self._reporter, "the progress any more", show)


class _OneLine(logging.Filter):
    """Takes the traceback out of a log record whose error is the user's or the machine's."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Change the record; keep it."""
        error = record.exc_info[1] if record.exc_info else None
        if error is None:  # of a task that says that it failed, and raised nothing
            record.exc_info = None
        if error is not None and (words := in_plain_words(error) or lost_server(error)) is not None:
            record.msg, record.args, record.exc_info = words, (), None
        return True


def quieten_user_errors() -> None:
    """Let Prefect's log have one line for an error of the user's or the machine's, and no traceback."""
    for name in ("prefect.flow_runs", "prefect.task_runs", "prefect.engine"):
        logger = logging.getLogger(name)
        if not any(isinstance(each, _OneLine) for each in logger.filters):
            logger.addFilter(_OneLine())
