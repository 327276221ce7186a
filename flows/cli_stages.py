"""The commands that run one stage, with the cached stages that it needs. They start no Prefect."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows import cli_options as options
from flows.cli_warning import warn
from flows.model_copy import copy_models, require_new_folder

if TYPE_CHECKING:
    from flows.consent import Consent
    from flows.goals import Goal
    from flows.recipe import Recipe
    from flows.summary import RunSummary

PushToHub = Annotated[
    str | None,
    typer.Option(
        "--push-to-hub",
        metavar="OWNER/NAME",
        help="Upload the exported model to this private repository of the hub; with several formats, one each.",
    ),
]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output",
        metavar="DIR",
        parser=options.folder,
        help="Put a copy of the exported model here; a new folder. With several formats, each in a folder within.",
    ),
]


@options.of_recipe("model", *options.CALIBRATION, *options.TEXTS, *options.GENERAL)
def calibrate(
    context: typer.Context,
    recipe: options.RecipeFile = None,
    workspace: options.WorkspaceFolder = options.DEFAULT_WORKSPACE,
    as_json: options.Json = False,
) -> None:
    """Cut texts into token sequences.

    The calibration set, and any evaluation texts.
    """
    _run_and_print(_recipe(context, recipe), "calibrate", workspace, as_json)


@options.of_recipe("model", *options.CALIBRATION, *options.TEXTS, *options.MACHINE, *options.GENERAL)
def baseline(
    context: typer.Context,
    recipe: options.RecipeFile = None,
    workspace: options.WorkspaceFolder = options.DEFAULT_WORKSPACE,
    as_json: options.Json = False,
) -> None:
    """Measure the dense model's perplexity.

    On the calibration set and the evaluation texts.
    """
    _run_and_print(_recipe(context, recipe), "baseline", workspace, as_json)


@options.of_recipe(
    "model", *options.CALIBRATION, *options.TARGET, *options.KINDS, *options.MACHINE, *options.SEARCH,
    *options.GENERAL,
)  # fmt: skip
def search(
    context: typer.Context,
    recipe: options.RecipeFile = None,
    workspace: options.WorkspaceFolder = options.DEFAULT_WORKSPACE,
    as_json: options.Json = False,
) -> None:
    """Find the order in which blocks can go.

    Goes on from where an earlier search of the same kind got to.
    """
    _run_and_print(_recipe(context, recipe), "search", workspace, as_json)


@options.of_recipe(
    *options.TARGET, "export_format", "model", *options.CALIBRATION, *options.KINDS, "device", "export_dtype",
    "batch_size", *options.SEARCH, *options.GENERAL,
)  # fmt: skip
def export(
    context: typer.Context,
    run: options.OptionalRun = None,
    output: Output = None,
    push_to_hub: PushToHub = None,
    workspace: options.WorkspaceFolder = options.DEFAULT_WORKSPACE,
    as_json: options.Json = False,
) -> None:
    """Write the pruned model.

    Of a run, or of the search that the options describe, as a folder that transformers or another engine loads.
    """
    if output is not None:
        from stages.workspace import Workspace

        require_new_folder(output, Workspace(workspace))
    asked, consent = _recipe_of_run(context, run, workspace)
    if push_to_hub is not None:
        from blockpruner.hub import check_repositories

        check_repositories(push_to_hub, asked.export_format)
    summary = _run_here(asked, "export", workspace, consent, output)
    if push_to_hub is not None:
        _push(summary, push_to_hub, several=_are_several(asked))
    from flows.cli_output import print_result

    print_result(summary, as_json=as_json)


@options.of_recipe(
    "model", *options.TASKS, *options.TEXTS, *options.CALIBRATION, *options.TARGET, *options.KINDS,
    "export_format", *options.MACHINE, *options.SEARCH, *options.GENERAL,
)  # fmt: skip
def evaluate(
    context: typer.Context,
    run: options.OptionalRun = None,
    workspace: options.WorkspaceFolder = options.DEFAULT_WORKSPACE,
    as_json: options.Json = False,
) -> None:
    """Measure perplexity and lm-eval tasks.

    Of a run's dense and pruned model; or with --model, of one model as it is.
    """
    recipe, consent = _recipe_of_run(context, run, workspace)
    prunes = run is not None or recipe.num_blocks is not None or recipe.ratio is not None
    _run_and_print(recipe, "evaluate" if prunes else "measure", workspace, as_json, consent)


@options.of_recipe(
    "num_blocks", "export_format", *options.SPEED, "device", "dtype", "ray_address", "name", "trust_remote_code"
)
def speed(
    context: typer.Context,
    run: options.Run,
    workspace: options.WorkspaceFolder = options.DEFAULT_WORKSPACE,
    as_json: options.Json = False,
) -> None:
    """Time a run's dense and pruned model on this machine.

    Size, prefill, decoding, peak memory and KV cache, in transformers; each model in processes of its own, in turn.
    """
    recipe, consent = _recipe_of_run(context, run, workspace)
    _run_and_print(recipe, "speed", workspace, as_json, consent)


def _recipe(context: typer.Context, source: str | None) -> Recipe:
    from flows.recipe import load_recipe

    return load_recipe(source, options.given_settings(context))


def _recipe_of_run(context: typer.Context, run: str | None, workspace: Path) -> tuple[Recipe, Consent]:
    """The recipe of an earlier run with the options that were given; without a run, of the options alone."""
    from flows.consent import ALL_GIVEN, Consent, recipe_of
    from flows.recipe import load_recipe

    given = options.given_settings(context)
    if run is None:
        return load_recipe(None, given), ALL_GIVEN
    from stages.runs import RunStore
    from stages.store_rows import rows_of

    store = RunStore(workspace, warn)
    store.workspace.require()
    record = store.resolve(run, to_go_on=True)
    num_searched = len(rows_of(record, store.workspace, warn).search_steps)
    return recipe_of(record, given).going_on(given, num_searched), Consent.of(record, given)


def _are_several(recipe: Recipe) -> bool:
    """Whether several formats are asked for. It goes by that and not by what was written, where auto may be another."""
    return len(set(recipe.export_format)) > 1


def _push(summary: RunSummary, repo_id: str, *, several: bool) -> None:
    """Upload a run's exports; with several formats, each to a repository that is named after it."""
    from blockpruner.hub import push_folder, repository_of

    for export in summary.rows.exports:
        address = push_folder(Path(export.path), repository_of(repo_id, export.format, several=several))
        typer.echo(f"pushed to {address}", err=True)


def _run_and_print(recipe: Recipe, goal: Goal, workspace: Path, as_json: bool, consent: Consent | None = None) -> None:
    from flows.cli_output import print_result

    print_result(_run_here(recipe, goal, workspace, consent), as_json=as_json)


def _run_here(
    recipe: Recipe, goal: Goal, workspace: Path, consent: Consent | None, output: Path | None = None
) -> RunSummary:
    """Carry out a recipe as far as a stage, in this process; one that goes on from a run, as far as it is allowed."""
    from flows.reporter import Reporter

    reporter = Reporter()
    with redirect_stdout(sys.stderr):  # whoever else prints does not mean it as a result
        with reporter.loading():
            from flows.consent import ALL_GIVEN
            from flows.runner import Runner
            from flows.summary import RunSummary

        runner = Runner(workspace, reporter)
        record = runner.run(recipe, goal, (consent or ALL_GIVEN).checked(runner, recipe, goal))
        summary = RunSummary.of(record, runner.workspace, reporter.warn)
        return summary if output is None else _copied(summary, output, several=_are_several(recipe))


def _copied(summary: RunSummary, output: Path, *, several: bool) -> RunSummary:
    """Put a copy of a run's exports into a new folder; where several formats were asked for, each in one of its own."""
    sources = {export.format if several else ".": Path(export.path) for export in summary.rows.exports}
    copy_models(sources, output)
    return replace(summary, copied_to=output / next(iter(sources)) if len(sources) == 1 else output)
