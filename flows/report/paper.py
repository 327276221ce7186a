"""Our measurements beside the paper's, for the runs of a model that is one of the paper's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flows.paper_figures import PaperModel, paper_figures
from flows.report.data import ReportRun, accuracies
from flows.table_formats import DataTable

_COLUMNS = ("model", "measured by", "parameters removed", "perplexity", "average accuracy (%)")


@dataclass(frozen=True)
class Comparison:
    """One of the paper's models: its figures and ours in one table."""

    paper: PaperModel
    table: DataTable
    differences: tuple[str, ...]
    """In what our runs' settings are not the paper's, so that nobody compares what cannot be compared."""


def paper_model(run: ReportRun) -> PaperModel | None:
    """The paper's model that a run is of."""
    return paper_figures().model(run.record.model, run.record.num_layers)


def comparisons(runs: Sequence[ReportRun]) -> list[Comparison]:
    """A table for each of the paper's models among the runs."""
    by_model: dict[str, list[ReportRun]] = {}
    papers = {paper.name: paper for run in runs if (paper := paper_model(run)) is not None}
    for run in runs:
        if (paper := paper_model(run)) is not None:
            by_model.setdefault(paper.name, []).append(run)
    return [_comparison(papers[name], members) for name, members in by_model.items()]


def paper_average(run: ReportRun, variant: str) -> float | None:
    """The mean accuracy in percent over the paper's five tasks, if the run has measured them all."""
    tasks = paper_figures().tasks
    rows = [row for row in run.summary.rows.evaluations if row.variant == variant and row.task in tasks]
    found = accuracies(rows)
    return 100 * found[-1].value if len(found) == len(tasks) + 1 else None


def _comparison(paper: PaperModel, runs: Sequence[ReportRun]) -> Comparison:
    text = paper_figures().text
    ours = [
        (
            f"pruned: {run.label}",
            "us",
            run.summary.ratio,
            run.summary.perplexity("pruned", text),
            paper_average(run, "pruned"),
        )
        for run in runs
    ]
    dense = next(
        (
            ("dense", "us", 0.0, run.summary.perplexity("dense", text), paper_average(run, "dense"))
            for run in runs
            if run.summary.perplexity("dense", text) is not None or paper_average(run, "dense") is not None
        ),
        None,
    )
    published = [(row.strategy, "paper", row.ratio, row.perplexity, row.average) for row in paper.results]
    rows = [
        ("dense", "paper", 0.0, paper.dense.perplexity, paper.dense.average),
        *([dense] if dense else []),
        *ours,
        *published,
    ]
    differences = dict.fromkeys(line for run in runs for line in _differences(run))
    return Comparison(paper, DataTable(_COLUMNS, tuple(rows)), tuple(differences))


def _differences(run: ReportRun) -> list[str]:
    record, figures = run.record, paper_figures()
    length = {"sequence_length": record.sequence_length}
    lines = figures.other_search(length if record.external else {**record.config, **length})
    if run.summary.perplexity("pruned", figures.text) is None:
        lines.append(f"perplexity on {figures.text} was not measured")
    if paper_average(run, "pruned") is None:
        lines.append(f"not all of {', '.join(figures.tasks)} were measured, so there is no average")
    return [
        f"{run.label}: {line}" for line in (*lines, *figures.other_tasks({**record.config, "tasks": figures.tasks}))
    ]
