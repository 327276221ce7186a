"""The commands that run the whole pipeline, as the Prefect flow: `run` and `demo`."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from blockpruner.errors import ConfigurationError
from flows import cli_options as options

if TYPE_CHECKING:
    from flows.recipe import Recipe
    from flows.summary import RunSummary


@options.of_recipe(
    "model", *options.CALIBRATION, *options.TARGET, *options.KINDS, "export_format", *options.TASKS,
    *options.TEXTS, *options.MACHINE, *options.SEARCH, *options.GENERAL,
)  # fmt: skip
def run(
    context: typer.Context,
    recipe: options.RecipeFile = None,
    workspace: options.WorkspaceFolder = options.DEFAULT_WORKSPACE,
    as_json: options.Json = False,
) -> None:
    """Prune a model: the whole pipeline.

    Calibrate, measure, search, cut, export, evaluate, as a Prefect flow. What was computed before is taken as it is.
    """
    from flows.cli_output import print_result
    from flows.recipe import load_recipe

    asked = load_recipe(recipe, options.given_settings(context))
    asked.require_target()
    print_result(run_flow(asked, workspace), as_json=as_json)


def demo(workspace: options.WorkspaceFolder = options.DEFAULT_WORKSPACE, as_json: options.Json = False) -> None:
    """Prune the project's own small model.

    The whole pipeline on the model and texts that come with the project, with the result explained.
    """
    from flows.cli_output import print_result
    from flows.demo import DATA, demo_view
    from flows.recipe import load_recipe

    if not (DATA / "model").is_dir():
        raise ConfigurationError(f"the demo's model and texts are not in {DATA}; run it from a clone of the repository")
    summary = run_flow(load_recipe("demo", {}), workspace)
    print_result(summary, as_json=as_json, view=demo_view)


def run_flow(recipe: Recipe, workspace: Path) -> RunSummary:
    """Run the Prefect flow in this process. What can be refused is refused before Prefect's server is started."""
    from flows.prefect_settings import be_quiet, require_valid_settings
    from flows.reporter import Reporter
    from flows.wording import in_plain_words

    reporter = Reporter()
    with redirect_stdout(sys.stderr):  # whoever else prints does not mean it as a result
        with reporter.loading():
            from flows.plan import Plan
            from flows.runner import Runner
            from flows.summary import RunSummary

            runner = Runner(workspace, reporter)
            try:
                Plan.make(recipe, "evaluate")
            except Exception as error:
                if (reason := in_plain_words(error)) is not None:
                    runner.refuse(recipe, "evaluate", reason)
                raise
        be_quiet()
        with reporter.waiting("starting Prefect"):
            require_valid_settings()
            from flows.flow_here import run_here
            from flows.prefect_server import start_shielded_server
            from flows.prune_flow import prune

            start_shielded_server()
        outcome = run_here(prune, recipe, str(workspace), warn=reporter.warn)
        return RunSummary.of(runner.runs.load(outcome["run_id"]), runner.workspace, reporter.warn)
