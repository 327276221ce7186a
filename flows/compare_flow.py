"""The Prefect flow `compare`: the cells of a comparison, each a task here and a run in the workspace.

Cells that differ only in how far they prune share one search and follow each other, the furthest first; families of
cells run side by side, as many as are asked for, each in a process of its own. A cell that fails is noted, and the
others go on. What an earlier call finished is not done again.
"""

from __future__ import annotations

import contextvars
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flows.prefect_settings  # noqa: F401  # isort: skip  # before Prefect is imported

from prefect import flow, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.runtime import flow_run as runtime_flow_run
from prefect.states import Completed, Failed

from blockpruner.errors import BlockPrunerError, ConfigurationError
from blockpruner.paths import user_path
from flows.cell_pool import CellPool
from flows.cell_worker import Event, Request
from flows.compare_progress import CompareProgress
from flows.comparison import Outcome, Row, rows_of
from flows.comparison_table import comparison_text, full_table, standing
from flows.flow_artifacts import table
from flows.flow_here import handed_over
from flows.flow_hooks import close_cells
from flows.grid import Cell, Comparison, in_families, load_comparison
from flows.interruptions import INTERRUPTIONS
from flows.library_warnings import heard
from flows.plan import Plan
from flows.prune_flow import LoggingReporter, quieten_user_errors
from flows.report.place import check_place
from flows.reporter import Reporter
from flows.server_contact import shown, whatever_becomes_of_its_slot
from flows.table_formats import in_markdown
from flows.wording import one_line
from stages.runs import RunStore
from stages.workspace import Workspace

_MOST_PARALLEL = 256


class CellsFailedError(BlockPrunerError):
    """A comparison is done, and some of its cells failed; `outcomes` has them all."""

    def __init__(self, message: str, outcomes: Sequence[Outcome]) -> None:
        """Say what failed."""
        super().__init__(message)
        self.outcomes = outcomes


@task(persist_result=False, cache_policy=NO_CACHE)
def run_cell(label: str, execution: Callable[[], Event]) -> State[dict[str, Any]]:
    """One cell, in a process of its own."""
    event = execution()
    result = {"label": label, "run_id": event.run_id, "error": event.text or None}
    if event.text:
        return Failed(message=event.text, data=None)
    return Completed(name="Cached", message="done before", data=result) if event.cached else Completed(data=result)


def _run_name() -> str:
    """The comparison's name; of one that is to be read from a file, the file's."""
    recipe = runtime_flow_run.parameters.get("recipe")
    named = recipe.get("name") if isinstance(recipe, dict) else getattr(recipe, "name", recipe)
    return one_line(str(named or "compare"))


@flow(
    name="compare",
    flow_run_name=_run_name,
    persist_result=False,
    on_failure=[close_cells],
    on_crashed=[close_cells],
    on_cancellation=[close_cells],
)
def compare(
    recipe: Comparison | str = "demo-compare", workspace: str = "data", parallel: int = 1, report: str | None = None
) -> dict[str, Any]:
    """Run a grid of models, strategies, metrics, calibration sets, seeds and ratios, and make one table of it.

    Args:
        recipe: the comparison, or the name of one of the project's, or a YAML file.
        workspace: the folder where results and everything that was computed are kept.
        parallel: how many cells to run at the same time.
        report: where to write an HTML report of all runs; none: nowhere.

    Raises:
        CellsFailedError: at the end, if some did: on a server such a run has not `Completed`.
    """
    quieten_user_errors()
    comparison = load_comparison(recipe, {}, {}) if isinstance(recipe, str) else recipe
    reporter = LoggingReporter()
    page = user_path(report) if report is not None else None
    if page is not None:
        check_place(page)
    check_comparison(comparison, parallel)
    with whatever_becomes_of_its_slot(), INTERRUPTIONS.kept():
        outcomes = _Comparing(comparison, Path(workspace), reporter).run(parallel)
    store = Workspace(Path(workspace))
    rows = rows_of(comparison, outcomes, store, reporter.warn)
    _publish(comparison, rows, reporter)
    if page is not None:
        write_report(comparison, outcomes, store, page, reporter)
    result = {"comparison": comparison.name, "outcomes": [each.model_dump(mode="json") for each in outcomes]}
    handed_over(result)
    if failed := standing(rows):
        raise CellsFailedError(failed, outcomes)
    return result


def check_comparison(comparison: Comparison, parallel: int) -> None:
    """Open every model, text and task, so that what cannot be used is refused before anything is computed.

    Raises:
        ConfigurationError: naming the first cell that cannot run.
    """
    if not 1 <= parallel <= _MOST_PARALLEL:
        raise ConfigurationError(f"parallel is {parallel}; give 1 to {_MOST_PARALLEL} cells at the same time")
    for cell in comparison.cells:
        try:
            with heard(lambda _: None):  # each cell says its warnings itself
                Plan.make(cell.recipe, "evaluate", cell.external)
                if comparison.speed:
                    Plan.make(cell.recipe, "speed", cell.external)
        except BlockPrunerError as error:
            raise ConfigurationError(f"cell {cell.label}: {error}") from error


def write_report(
    comparison: Comparison, outcomes: Sequence[Outcome], workspace: Workspace, output: Path, reporter: Reporter
) -> None:
    """Write the HTML report of all cells that were measured."""
    from flows.report.build import Report
    from flows.summary import RunSummary

    runs = RunStore(workspace.path, reporter.warn)
    ids = [run_id for each in outcomes for run_id in (each.run_id, each.speed_run_id) if run_id and not each.error]
    if not ids:
        reporter.warn(f"no cell was measured: there is nothing to write to {output}")
        return
    summaries = [RunSummary.of(runs.load(run_id), workspace, reporter.warn) for run_id in ids]
    Report.of(summaries, comparison.name).write(output)
    reporter.say(f"report: {output}")


@dataclass(frozen=True)
class _Comparing:
    """A comparison under way."""

    comparison: Comparison
    workspace: Path
    reporter: Reporter

    def run(self, parallel: int) -> list[Outcome]:
        """Carry out every cell, then time each if that is asked for; the outcomes in the order of the cells."""
        cells = self.comparison.cells
        total = len(cells) * (2 if self.comparison.speed else 1)
        spread = all(cell.recipe.device in ("auto", "cuda") for cell in cells)
        pool = CellPool(self.workspace, min(parallel, len(cells)), spread=spread)
        with CompareProgress(self.reporter, total) as progress:
            try:
                measured = self._measure(pool, progress, parallel)
                timed = self._time(pool, progress, measured) if self.comparison.speed else {}
            finally:
                pool.stop()
        return [_outcome(cell, measured[cell.key], timed.get(cell.key)) for cell in cells]

    def _measure(self, pool: CellPool, progress: CompareProgress, parallel: int) -> dict[str, Event]:
        """Families side by side, the cells of each one after another."""
        threads = ThreadPoolExecutor(parallel, thread_name_prefix="cells")
        try:
            futures: list[Future[dict[str, Event]]] = []
            for family in in_families(self.comparison.cells):
                context = contextvars.copy_context()  # in which Prefect knows the flow that the tasks belong to
                futures.append(threads.submit(context.run, self._family, family, pool, progress))
            return {key: event for done in as_completed(futures) for key, event in done.result().items()}
        finally:
            pool_is_needed = all(future.done() for future in futures)
            if not pool_is_needed:  # interrupted: the threads wait for processes that would go on for hours
                pool.stop()
            threads.shutdown(cancel_futures=True)

    def _family(self, family: list[Cell], pool: CellPool, progress: CompareProgress) -> dict[str, Event]:
        return {cell.key: self._cell(cell, "evaluate", pool, progress) for cell in family if not pool.is_stopped}

    def _time(self, pool: CellPool, progress: CompareProgress, measured: dict[str, Event]) -> dict[str, Event]:
        """One after another, for what is timed must have the machine for itself."""
        cells = [cell for cell in self.comparison.cells if not measured[cell.key].text]
        return {cell.key: self._cell(cell, "speed", pool, progress) for cell in cells}

    def _cell(self, cell: Cell, goal: Any, pool: CellPool, progress: CompareProgress) -> Event:
        label = cell.label if goal == "evaluate" else f"{cell.label}, speed"
        request = Request(recipe=cell.recipe, goal=goal, comparison=self.comparison.name, external=cell.external)
        listener, started = progress.begin(label), time.monotonic()
        events: list[Event] = []

        def execute() -> Event:
            events.append(pool.carry_out(request, listener))
            return events[-1]

        run_cell.with_options(task_run_name=_escaped(label))(label, execute, return_state=True)
        event = events[-1] if events else Event(kind="end", text="stopped before it began", stopped=True)
        progress.end(label, listener, event, time.monotonic() - started)
        return event


def _escaped(label: str) -> str:
    """As a template of Prefect's that gives the label itself."""
    return label.replace("{", "{{").replace("}", "}}")


def _outcome(cell: Cell, event: Event, timed: Event | None) -> Outcome:
    error = event.text or (timed.text and f"speed: {timed.text}" if timed else "")
    return Outcome(
        key=cell.key,
        run_id=event.run_id,
        speed_run_id=timed.run_id if timed and not timed.text else None,
        error=error or None,
    )


def _publish(comparison: Comparison, rows: Sequence[Row], reporter: Reporter) -> None:
    """The table as artifacts of the flow run: to be read, and with every number."""
    text = f"# {in_markdown(comparison.name)}\n\n{comparison_text(comparison, rows, 'markdown')}\n"
    about = one_line(comparison.description or comparison.name)
    shown(
        reporter,
        "this comparison's tables",
        lambda: create_markdown_artifact(text, key="comparison", description=about),
        table(full_table(rows), "comparison-numbers", about),
    )
