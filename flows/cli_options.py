"""The options of the command line, each defined once; commands pick theirs. Imports nothing heavy."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperOption

from blockpruner.errors import ConfigurationError
from blockpruner.paths import user_path
from flows.completion import complete_choice, complete_recipe, complete_run, complete_text
from flows.settings_text import SETTINGS


class Command(TyperCommand):
    """A command no option of which takes the next option for its value, where its own was forgotten."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """See TyperCommand."""
        options = (each for each in self.params if isinstance(each, TyperOption) and not each.is_flag)
        with_value = {name for option in options for name in option.opts}
        for name, value in pairwise(args):
            if name in with_value and value.startswith("--"):
                ctx.fail(f"{name} is given without its value: {value!r} after it begins as an option does")
        return super().parse_args(ctx, args)


def _setting(name: str, metavar: str, **more: Any) -> Any:
    """The option of one of the recipe's settings."""
    return typer.Option(f"--{name.replace('_', '-')}", metavar=metavar, help=SETTINGS[name], **more)


RecipeFile = Annotated[
    str | None,
    typer.Argument(
        metavar="[RECIPE]",
        help="A recipe: a YAML file, or one of the project's by name. Options override its fields.",
        autocompletion=complete_recipe,
    ),
]
Run = Annotated[
    str, typer.Argument(metavar="RUN", help="An id, the start of one, a name, or latest.", autocompletion=complete_run)
]
OptionalRun = Annotated[
    str | None,
    typer.Argument(
        metavar="[RUN]",
        help="The run to go on from: an id, the start of one, a name, or latest. Options override its settings.",
        autocompletion=complete_run,
    ),
]

Model = Annotated[str | None, _setting("model", "ID|DIR")]
Calibration = Annotated[str | None, _setting("calibration", "NAME|FILE", autocompletion=complete_text)]
CalibrationColumn = Annotated[str | None, _setting("calibration_column", "COLUMN")]
NumSamples = Annotated[str | None, _setting("num_samples", "N|all")]
SequenceLength = Annotated[int | None, _setting("sequence_length", "N")]
Seed = Annotated[int | None, _setting("seed", "N")]
NumBlocks = Annotated[int | None, _setting("num_blocks", "K")]
Ratio = Annotated[float | None, _setting("ratio", "R")]
BlockKinds = Annotated[
    str | None, _setting("block_kinds", "mha|mlp|both", autocompletion=complete_choice("mha", "mlp", "both"))
]
ExportFormat = Annotated[
    list[str] | None,
    typer.Option(
        "--format",
        "--export-format",
        metavar="auto|stock|transformers|decilm|gguf|zeroed",
        help=SETTINGS["export_format"],
        autocompletion=complete_choice("auto", "stock", "transformers", "decilm", "gguf", "zeroed"),
    ),
]
ExportDtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        metavar="float32|bfloat16|float16|q8_0",
        help=SETTINGS["export_dtype"],
        autocompletion=complete_choice("float32", "bfloat16", "float16", "q8_0"),
    ),
]
EvalText = Annotated[list[str] | None, _setting("eval_text", "NAME|FILE", autocompletion=complete_text)]
EvalTextColumn = Annotated[str | None, _setting("eval_text_column", "COLUMN")]
Tasks = Annotated[str | None, _setting("tasks", "a,b")]
TaskDir = Annotated[str | None, _setting("task_dir", "DIR")]
TaskData = Annotated[str | None, _setting("task_data", "DIR")]
LogSamples = Annotated[bool | None, typer.Option("--log-samples", help=SETTINGS["log_samples"], show_default=False)]
NumFewshot = Annotated[int | None, _setting("num_fewshot", "N")]
Limit = Annotated[int | None, _setting("limit", "N")]
Device = Annotated[
    str | None, _setting("device", "auto|cpu|cuda", autocompletion=complete_choice("auto", "cpu", "cuda"))
]
Dtype = Annotated[
    str | None,
    _setting("dtype", "auto|float32|bfloat16", autocompletion=complete_choice("auto", "float32", "bfloat16")),
]
BatchSize = Annotated[str | None, _setting("batch_size", "N|auto")]
Metric = Annotated[
    str | None, _setting("metric", "perplexity|kl|js", autocompletion=complete_choice("perplexity", "kl", "js"))
]
Strategy = Annotated[
    str | None,
    _setting(
        "strategy",
        "NAME",
        autocompletion=complete_choice("blockpruner", "oneshot", "layers", "shortgpt", "rm", "laco", "random"),
    ),
]
StrategySeed = Annotated[int | None, _setting("strategy_seed", "N")]
LacoLayersPerMerge = Annotated[int | None, _setting("laco_layers_per_merge", "C")]
LacoFirstLayer = Annotated[int | None, _setting("laco_first_layer", "L")]
LacoLastLayer = Annotated[int | None, _setting("laco_last_layer", "H")]
LacoInterval = Annotated[int | None, _setting("laco_interval", "I")]
LacoThreshold = Annotated[float | None, _setting("laco_threshold", "T")]
Scorer = Annotated[str | None, _setting("scorer", "sweep|plain", autocompletion=complete_choice("sweep", "plain"))]
MemoryBudget = Annotated[str | None, _setting("memory_budget", "SIZE")]
Compile = Annotated[str | None, _setting("compile", "auto|on|off", autocompletion=complete_choice("auto", "on", "off"))]
Executor = Annotated[str | None, _setting("executor", "local|ray", autocompletion=complete_choice("local", "ray"))]
Workers = Annotated[int | None, _setting("workers", "N")]
RayAddress = Annotated[str | None, _setting("ray_address", "HOST:PORT")]
StockCompatible = Annotated[
    bool | None,
    typer.Option("--stock-compatible/--no-stock-compatible", help=SETTINGS["stock_compatible"], show_default=False),
]
SpeedBatchSizes = Annotated[
    str | None, typer.Option("--batch-sizes", metavar="A,B", help=SETTINGS["speed_batch_sizes"])
]
SpeedPromptTokens = Annotated[
    str | None, typer.Option("--prompt-tokens", metavar="A,B", help=SETTINGS["speed_prompt_tokens"])
]
SpeedNewTokens = Annotated[int | None, typer.Option("--new-tokens", metavar="N", help=SETTINGS["speed_new_tokens"])]
SpeedRepeats = Annotated[int | None, typer.Option("--repeats", metavar="N", help=SETTINGS["speed_repeats"])]
TrustRemoteCode = Annotated[bool | None, typer.Option("--trust-remote-code", help=SETTINGS["trust_remote_code"])]
Name = Annotated[str | None, _setting("name", "TEXT")]


def folder(text: str | Path) -> Path:
    """A folder as it was typed.

    Raises:
        ConfigurationError: if it is no path.
    """
    if not str(text).strip():  # which pathlib takes for the current folder
        raise ConfigurationError(f"{str(text)!r} is given where a folder is meant; name one, or leave the option out")
    return user_path(text)


WorkspaceFolder = Annotated[
    Path,
    typer.Option(
        "--workspace",
        metavar="DIR",
        parser=folder,
        envvar="BLOCKPRUNER_WORKSPACE",
        help="The folder where results and everything that was computed are kept.",
    ),
]
Json = Annotated[
    bool, typer.Option("--json", help="Print JSON on one line of standard output, and nothing else there.")
]
Csv = Annotated[bool, typer.Option("--csv", help="Print comma-separated values.")]
Markdown = Annotated[bool, typer.Option("--markdown", help="Print a Markdown table.")]
Latex = Annotated[bool, typer.Option("--latex", help="Print a LaTeX table (booktabs).")]

DEFAULT_WORKSPACE = Path("data")


def given_settings(context: typer.Context) -> dict[str, Any]:
    """The recipe's settings that were given on the command line."""
    return {name: value for name, value in context.params.items() if name in SETTINGS and value not in (None, (), [])}
