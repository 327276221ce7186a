"""The command `compare`: a grid of runs, and one table of them."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from blockpruner.errors import ConfigurationError
from flows import cli_options as options
from flows.cli_warning import warn
from flows.completion import complete_comparison

if TYPE_CHECKING:
    from flows.comparison import Outcome
    from flows.grid import Comparison

ComparisonFile = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        help="A comparison: a YAML file, or one of the project's by name. Options override its base.",
        autocompletion=complete_comparison,
    ),
]
Parallel = Annotated[int, typer.Option("--parallel", metavar="N", help="How many cells to run at the same time.")]
ExternalFolders = Annotated[
    list[str] | None,
    typer.Option(
        "--external",
        metavar="DIR",
        help="A checkpoint that something else has pruned: evaluated, and a row of the table. May be several.",
    ),
]
Labels = Annotated[
    list[str] | None, typer.Option("--label", metavar="NAME", help="What the external checkpoint's row is called.")
]
WithSpeed = Annotated[
    bool, typer.Option("--speed", help="Time every model as well, one after another when all else is done.")
]
ReportFile = Annotated[
    Path | None,
    typer.Option("--report", metavar="FILE", parser=options.folder, help="Write an HTML report of all runs here."),
]
FAILED_CELLS = 1
"""Exit status where the table is there and some of its cells failed."""


@options.of_recipe(
    "model", *options.CALIBRATION, *options.TASKS, *options.TEXTS, *options.MACHINE, "memory_budget", *options.GENERAL,
)  # fmt: skip
def compare(
    context: typer.Context,
    recipe: ComparisonFile,
    parallel: Parallel = 1,
    external: ExternalFolders = None,
    label: Labels = None,
    with_speed: WithSpeed = False,
    report: ReportFile = None,
    workspace: options.WorkspaceFolder = options.DEFAULT_WORKSPACE,
    as_json: options.Json = False,
    as_csv: options.Csv = False,
    as_markdown: options.Markdown = False,
    as_latex: options.Latex = False,
) -> None:
    """Compare models, methods and ratios in one table.

    Runs every cell of a grid. Cells share what they have in common, one that fails is a row with its error, and the
    same command again does only what is missing. Exit status 1: some cells failed.
    """
    from flows.cli_output import put, put_view
    from flows.comparison import rows_of
    from flows.comparison_table import comparison_text, comparison_view, standing
    from flows.report.place import check_place
    from flows.table_formats import chosen_format
    from stages.workspace import Workspace

    form = chosen_format(as_json=as_json, as_csv=as_csv, as_markdown=as_markdown, as_latex=as_latex)
    comparison = _comparison(recipe, options.given_settings(context), external or [], label or [], with_speed)
    if report is not None:
        check_place(report)
    outcomes = _run_flow(comparison, workspace, parallel, report)
    rows = rows_of(comparison, outcomes, Workspace(workspace), warn)
    if form is None:
        put_view(comparison_view(comparison, rows))
    else:
        more = {"workspace": str(workspace), "report": str(report) if report else None}
        put(comparison_text(comparison, rows, form, **more))
    if failed := standing(rows):
        warn(failed)
        raise typer.Exit(FAILED_CELLS)


def _comparison(
    source: str, given: dict[str, Any], folders: list[str], labels: list[str], with_speed: bool
) -> Comparison:
    from flows.grid import load_comparison

    if len(folders) != len(labels):
        raise ConfigurationError(
            f"--external is given {len(folders)} times and --label {len(labels)} times; give each checkpoint its label"
        )
    more: dict[str, Any] = {"external": [{"path": p, "label": n} for p, n in zip(folders, labels, strict=True)]}
    if with_speed:
        more["speed"] = True
    if "name" in given:
        more["name"] = given.pop("name")
    return load_comparison(source, given, more)


def _run_flow(comparison: Comparison, workspace: Path, parallel: int, report: Path | None) -> list[Outcome]:
    """Run the Prefect flow in this process. What can be refused is refused before Prefect's server is started."""
    from flows.prefect_settings import be_quiet, require_valid_settings
    from flows.reporter import Reporter

    reporter = Reporter()
    with redirect_stdout(sys.stderr):  # whoever else prints does not mean it as a result
        be_quiet()
        with reporter.loading():
            require_valid_settings()
            from flows.compare_flow import CellsFailedError, check_comparison, compare
            from flows.comparison import Outcome
            from flows.runner import Runner

            check_comparison(comparison, parallel)
            Runner(workspace, reporter)  # that the workspace can be written, and who died there
        with reporter.waiting("starting Prefect"):
            from flows.flow_here import run_here
            from flows.prefect_server import start_shielded_server

            start_shielded_server()
        place = str(report) if report else None
        try:
            result = run_here(compare, comparison, str(workspace), parallel, place, warn=reporter.warn)
        except CellsFailedError as error:
            return list(error.outcomes)
        return [Outcome.model_validate(each) for each in result["outcomes"]]
