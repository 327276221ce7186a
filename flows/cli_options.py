"""The options of the command line, each defined once; commands pick theirs. Imports nothing heavy."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
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

_SETTINGS: Mapping[str, Any] = {
    "model": Annotated[str | None, _setting("model", "ID|DIR")],
    "calibration": Annotated[str | None, _setting("calibration", "NAME|FILE", autocompletion=complete_text)],
    "calibration_column": Annotated[str | None, _setting("calibration_column", "COLUMN")],
    "num_samples": Annotated[str | None, _setting("num_samples", "N|all")],
    "sequence_length": Annotated[int | None, _setting("sequence_length", "N")],
    "seed": Annotated[int | None, _setting("seed", "N")],
    "num_blocks": Annotated[int | None, _setting("num_blocks", "K")],
    "ratio": Annotated[float | None, _setting("ratio", "R")],
    "block_kinds": Annotated[
        str | None, _setting("block_kinds", "mha|mlp|both", autocompletion=complete_choice("mha", "mlp", "both"))
    ],
    "export_format": Annotated[
        list[str] | None,
        typer.Option(
            "--format",
            "--export-format",
            metavar="auto|stock|transformers|decilm|gguf|zeroed",
            help=SETTINGS["export_format"],
            autocompletion=complete_choice("auto", "stock", "transformers", "decilm", "gguf", "zeroed"),
        ),
    ],
    "export_dtype": Annotated[
        str | None,
        typer.Option(
            "--dtype",
            metavar="float32|bfloat16|float16|q8_0",
            help=SETTINGS["export_dtype"],
            autocompletion=complete_choice("float32", "bfloat16", "float16", "q8_0"),
        ),
    ],
    "eval_text": Annotated[list[str] | None, _setting("eval_text", "NAME|FILE", autocompletion=complete_text)],
    "eval_text_column": Annotated[str | None, _setting("eval_text_column", "COLUMN")],
    "tasks": Annotated[str | None, _setting("tasks", "a,b")],
    "task_dir": Annotated[str | None, _setting("task_dir", "DIR")],
    "task_data": Annotated[str | None, _setting("task_data", "DIR")],
    "log_samples": Annotated[
        bool | None, typer.Option("--log-samples", help=SETTINGS["log_samples"], show_default=False)
    ],
    "num_fewshot": Annotated[int | None, _setting("num_fewshot", "N")],
    "limit": Annotated[int | None, _setting("limit", "N")],
    "device": Annotated[
        str | None, _setting("device", "auto|cpu|cuda", autocompletion=complete_choice("auto", "cpu", "cuda"))
    ],
    "dtype": Annotated[
        str | None,
        _setting("dtype", "auto|float32|bfloat16", autocompletion=complete_choice("auto", "float32", "bfloat16")),
    ],
    "batch_size": Annotated[str | None, _setting("batch_size", "N|auto")],
    "metric": Annotated[
        str | None, _setting("metric", "perplexity|kl|js", autocompletion=complete_choice("perplexity", "kl", "js"))
    ],
    "strategy": Annotated[
        str | None,
        _setting(
            "strategy",
            "NAME",
            autocompletion=complete_choice("blockpruner", "oneshot", "layers", "shortgpt", "rm", "laco", "random"),
        ),
    ],
    "strategy_seed": Annotated[int | None, _setting("strategy_seed", "N")],
    "laco_layers_per_merge": Annotated[int | None, _setting("laco_layers_per_merge", "C")],
    "laco_first_layer": Annotated[int | None, _setting("laco_first_layer", "L")],
    "laco_last_layer": Annotated[int | None, _setting("laco_last_layer", "H")],
    "laco_interval": Annotated[int | None, _setting("laco_interval", "I")],
    "laco_threshold": Annotated[float | None, _setting("laco_threshold", "T")],
    "scorer": Annotated[
        str | None, _setting("scorer", "sweep|plain", autocompletion=complete_choice("sweep", "plain"))
    ],
    "memory_budget": Annotated[str | None, _setting("memory_budget", "SIZE")],
    "compile": Annotated[
        str | None, _setting("compile", "auto|on|off", autocompletion=complete_choice("auto", "on", "off"))
    ],
    "executor": Annotated[
        str | None, _setting("executor", "local|ray", autocompletion=complete_choice("local", "ray"))
    ],
    "workers": Annotated[int | None, _setting("workers", "N")],
    "ray_address": Annotated[str | None, _setting("ray_address", "HOST:PORT")],
    "stock_compatible": Annotated[
        bool | None,
        typer.Option("--stock-compatible/--no-stock-compatible", help=SETTINGS["stock_compatible"], show_default=False),
    ],
    "speed_batch_sizes": Annotated[
        str | None, typer.Option("--batch-sizes", metavar="A,B", help=SETTINGS["speed_batch_sizes"])
    ],
    "speed_prompt_tokens": Annotated[
        str | None, typer.Option("--prompt-tokens", metavar="A,B", help=SETTINGS["speed_prompt_tokens"])
    ],
    "speed_new_tokens": Annotated[
        int | None, typer.Option("--new-tokens", metavar="N", help=SETTINGS["speed_new_tokens"])
    ],
    "speed_repeats": Annotated[int | None, typer.Option("--repeats", metavar="N", help=SETTINGS["speed_repeats"])],
    "trust_remote_code": Annotated[
        bool | None, typer.Option("--trust-remote-code", help=SETTINGS["trust_remote_code"])
    ],
    "name": Annotated[str | None, _setting("name", "TEXT")],
}
"""The option of each of the recipe's settings."""

CALIBRATION = ("calibration", "calibration_column", "num_samples", "sequence_length")
TARGET = ("num_blocks", "ratio")
KINDS = ("block_kinds", "stock_compatible")
TASKS = ("tasks", "task_dir", "task_data", "log_samples", "num_fewshot", "limit")
TEXTS = ("eval_text", "eval_text_column")
MACHINE = ("device", "dtype", "batch_size")
SEARCH = (
    *("metric", "strategy", "strategy_seed"),
    *("laco_layers_per_merge", "laco_first_layer", "laco_last_layer", "laco_interval", "laco_threshold"),
    *("scorer", "memory_budget", "compile", "executor", "workers", "ray_address"),
)
SPEED = ("speed_batch_sizes", "speed_prompt_tokens", "speed_new_tokens", "speed_repeats")
GENERAL = ("seed", "name", "trust_remote_code")


def of_recipe(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command options of the recipe's settings, shown ahead of its workspace.

    It finds what was given in its context: see `given_settings`.
    """

    def extended(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True)
        settings = [
            inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None, annotation=_SETTINGS[name])
            for name in names
        ]
        at = list(own.parameters).index("workspace")
        parameters = list(own.parameters.values())

        @functools.wraps(command)
        def called(**given: Any) -> None:
            command(**{name: given[name] for name in own.parameters})

        vars(called)["__signature__"] = own.replace(parameters=[*parameters[:at], *settings, *parameters[at:]])
        return called

    return extended


def given_settings(context: typer.Context) -> dict[str, Any]:
    """The recipe's settings that were given on the command line."""
    return {name: value for name, value in context.params.items() if name in SETTINGS and value not in (None, (), [])}


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
