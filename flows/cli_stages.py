"""The commands that run one stage, with the cached stages that it needs. They start no Prefect."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows import cli_options as options
from flows.model_copy import copy_model, require_new_folder

if TYPE_CHECKING:
    from flows.plan import Goal
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
        "--output", metavar="DIR", parser=options.folder, help="Put a copy of the exported model here; a new folder."
    ),
]


def calibrate(
    context: typer.Context,
    recipe: options.RecipeFile = None,
    model: options.Model = None,
    calibration: options.Calibration = None,
    calibration_column: options.CalibrationColumn = None,
    num_samples: options.NumSamples = None,
    sequence_length: options.SequenceLength = None,
    eval_text: options.EvalText = None,
    eval_text_column: options.EvalTextColumn = None,
    seed: options.Seed = None,
    name: options.Name = None,
    trust_remote_code: options.TrustRemoteCode = None,
    workspace: options.WorkspaceFolder = options.DEFAULT_WORKSPACE,
    as_json: options.Json = False,
) -> None:
    """Cut texts into token sequences.

    The calibration set, and any evaluation texts.
    """
    _run_and_print(_recipe(context, recipe), "calibrate", workspace, as_json)


def baseline(
    context: typer.Context,
    recipe: options.RecipeFile = None,
    model: options.Model = None,
    calibration: options.Calibration = None,
    calibration_column: options.CalibrationColumn = None,
    num_samples: options.NumSamples = None,
    sequence_length: options.SequenceLength = None,
    eval_text: options.EvalText = None,
    eval_text_column: options.EvalTextColumn = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    batch_size: options.BatchSize = None,
    seed: options.Seed = None,
    name: options.Name = None,
    trust_remote_code: options.TrustRemoteCode = None,
    workspace: options.WorkspaceFolder = options.DEFAULT_WORKSPACE,
    as_json: options.Json = False,
) -> None:
    """Measure the dense model's perplexity.

    On the calibration set and the evaluation texts.
    """
    _run_and_print(_recipe(context, recipe), "baseline", workspace, as_json)


def search(
    context: typer.Context,
    recipe: options.RecipeFile = None,
    model: options.Model = None,
    calibration: options.Calibration = None,
    calibration_column: options.CalibrationColumn = None,
    num_samples: options.NumSamples = None,
    sequence_length: options.SequenceLength = None,
    num_blocks: options.NumBlocks = None,
    ratio: options.Ratio = None,
    block_kinds: options.BlockKinds = None,
    stock_compatible: options.StockCompatible = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    batch_size: options.BatchSize = None,
    metric: options.Metric = None,
    scorer: options.Scorer = None,
    memory_budget: options.MemoryBudget = None,
    compile: options.Compile = None,
    executor: options.Executor = None,
    workers: options.Workers = None,
    ray_address: options.RayAddress = None,
    seed: options.Seed = None,
    name: options.Name = None,
    trust_remote_code: options.TrustRemoteCode = None,
    workspace: options.WorkspaceFolder = options.DEFAULT_WORKSPACE,
    as_json: options.Json = False,
) -> None:
    """Find the order in which blocks can go.

    Goes on from where an earlier search of the same kind got to.
    """
    _run_and_print(_recipe(context, recipe), "search", workspace, as_json)


def export(
    context: typer.Context,
    run: options.OptionalRun = None,
    output: Output = None,
    push_to_hub: PushToHub = None,
    num_blocks: options.NumBlocks = None,
    ratio: options.Ratio = None,
    export_format: options.ExportFormat = None,
    model: options.Model = None,
    calibration: options.Calibration = None,
    calibration_column: options.CalibrationColumn = None,
    num_samples: options.NumSamples = None,
    sequence_length: options.SequenceLength = None,
    block_kinds: options.BlockKinds = None,
    stock_compatible: options.StockCompatible = None,
    device: options.Device = None,
    export_dtype: options.ExportDtype = None,
    batch_size: options.BatchSize = None,
    metric: options.Metric = None,
    scorer: options.Scorer = None,
    memory_budget: options.MemoryBudget = None,
    compile: options.Compile = None,
    executor: options.Executor = None,
    workers: options.Workers = None,
    ray_address: options.RayAddress = None,
    seed: options.Seed = None,
    name: options.Name = None,
    trust_remote_code: options.TrustRemoteCode = None,
    workspace: options.WorkspaceFolder = options.DEFAULT_WORKSPACE,
    as_json: options.Json = False,
) -> None:
    """Write the pruned model.

    Of a run, or of the search that the options describe, as a folder that transformers or another engine loads.
    """
    if output is not None:
        require_new_folder(output)
    if push_to_hub is not None:
        from blockpruner.hub import check_repository

        check_repository(push_to_hub)
    summary = _run_here(_recipe_of_run(context, run, workspace), "export", workspace, output)
    if push_to_hub is not None:
        _push(summary, push_to_hub)
    from flows.cli_output import print_result

    print_result(summary, as_json=as_json)


def evaluate(
    context: typer.Context,
    run: options.OptionalRun = None,
    model: options.Model = None,
    tasks: options.Tasks = None,
    task_dir: options.TaskDir = None,
    num_fewshot: options.NumFewshot = None,
    limit: options.Limit = None,
    eval_text: options.EvalText = None,
    eval_text_column: options.EvalTextColumn = None,
    calibration: options.Calibration = None,
    calibration_column: options.CalibrationColumn = None,
    num_samples: options.NumSamples = None,
    sequence_length: options.SequenceLength = None,
    num_blocks: options.NumBlocks = None,
    ratio: options.Ratio = None,
    block_kinds: options.BlockKinds = None,
    stock_compatible: options.StockCompatible = None,
    export_format: options.ExportFormat = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    batch_size: options.BatchSize = None,
    metric: options.Metric = None,
    scorer: options.Scorer = None,
    memory_budget: options.MemoryBudget = None,
    compile: options.Compile = None,
    executor: options.Executor = None,
    workers: options.Workers = None,
    ray_address: options.RayAddress = None,
    seed: options.Seed = None,
    name: options.Name = None,
    trust_remote_code: options.TrustRemoteCode = None,
    workspace: options.WorkspaceFolder = options.DEFAULT_WORKSPACE,
    as_json: options.Json = False,
) -> None:
    """Measure perplexity and lm-eval tasks.

    Of a run's dense and pruned model; or with --model, of one model as it is.
    """
    recipe = _recipe_of_run(context, run, workspace)
    prunes = run is not None or recipe.num_blocks is not None or recipe.ratio is not None
    _run_and_print(recipe, "evaluate" if prunes else "measure", workspace, as_json)


def speed(
    context: typer.Context,
    run: options.Run,
    num_blocks: options.NumBlocks = None,
    export_format: options.ExportFormat = None,
    speed_batch_sizes: options.SpeedBatchSizes = None,
    speed_prompt_tokens: options.SpeedPromptTokens = None,
    speed_new_tokens: options.SpeedNewTokens = None,
    speed_repeats: options.SpeedRepeats = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    name: options.Name = None,
    workspace: options.WorkspaceFolder = options.DEFAULT_WORKSPACE,
    as_json: options.Json = False,
) -> None:
    """Time a run's dense and pruned model on this machine.

    Prefill, decoding, peak memory and KV cache, in transformers, each model in a process of its own.
    """
    _run_and_print(_recipe_of_run(context, run, workspace), "speed", workspace, as_json)


def _recipe(context: typer.Context, source: str | None) -> Recipe:
    from flows.recipe import load_recipe

    return load_recipe(source, options.given_settings(context))


def _recipe_of_run(context: typer.Context, run: str | None, workspace: Path) -> Recipe:
    """The recipe of an earlier run with the options that were given; without a run, of the options alone.

    A number of blocks that the run's search has reached is a prefix of it, and needs no other search.
    """
    from flows.recipe import make_recipe

    given = options.given_settings(context)
    if run is None:
        return make_recipe(given)
    from stages.runs import RunStore
    from stages.store_rows import rows_of
    from stages.workspace import log_warning

    store = RunStore(workspace)
    store.workspace.require()
    record = store.resolve(run, to_go_on=True)
    if 1 <= given.get("num_blocks", 0) <= len(rows_of(record, store.workspace, log_warning).search_steps):
        given["export_blocks"] = given.pop("num_blocks")
    return make_recipe(record.config).changed(given)


def _push(summary: RunSummary, repo_id: str) -> None:
    """Upload a run's exports; with several formats, each to a repository that is named after it."""
    from blockpruner.hub import push_folder

    several = len(summary.rows.exports) > 1
    for export in summary.rows.exports:
        address = push_folder(Path(export.path), f"{repo_id}-{export.format}" if several else repo_id)
        typer.echo(f"pushed to {address}", err=True)


def _run_and_print(recipe: Recipe, goal: Goal, workspace: Path, as_json: bool, output: Path | None = None) -> None:
    from flows.cli_output import print_result

    print_result(_run_here(recipe, goal, workspace, output), as_json=as_json)


def _run_here(recipe: Recipe, goal: Goal, workspace: Path, output: Path | None) -> RunSummary:
    """Carry out a recipe as far as a stage, in this process."""
    from flows.reporter import Reporter

    reporter = Reporter()
    with redirect_stdout(sys.stderr):  # whoever else prints does not mean it as a result
        from flows.runner import Runner
        from flows.summary import RunSummary

        runner = Runner(workspace, reporter)
        record = runner.run(recipe, goal)
        summary = RunSummary.of(record, runner.workspace, reporter.warn, output)
        if output is not None:
            for export in summary.rows.exports:
                several = len(summary.rows.exports) > 1
                if several:
                    output.mkdir(parents=True, exist_ok=True)
                copy_model(Path(export.path), output / export.format if several else output)
        return summary
