"""The recipe: every setting of a run, checked, as plain data. Reads YAML; opens no model, no text and no workspace.

The same class gives the Prefect server its form and the command line its checks. A path in a recipe file that exists
beside the file means that one; any other path is relative to the current folder, as on the command line.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from blockpruner.blocks import BlockKinds
from blockpruner.errors import ConfigurationError, nearest
from blockpruner.export.names import ExportDtype, FormatChoice, dtypes_of
from blockpruner.memory_size import parse_memory_size
from blockpruner.paths import shortened, user_path
from blockpruner.scoring.settings import CompileChoice, MetricName, ScorerName, ScorerSettings
from blockpruner.strategies import STRATEGIES, LacoSettings, StrategyName, check_settings
from flows.settings_text import SETTINGS
from flows.yaml_file import read_yaml
from stages.executor import ExecutorName, ExecutorSettings, check_address

RECIPES_FOLDER = Path(__file__).parent / "recipes"
COMPARISONS_FOLDER = RECIPES_FOLDER / "compare"
"""Recipes of another kind: see `flows.grid`."""
_PATH_FIELDS = ("model", "calibration", "eval_text", "task_dir", "task_data")
_PATHS_IN_FILES = (*_PATH_FIELDS, "path")
"""The last is that of a comparison's external checkpoint."""
TARGET_FIELDS = ("num_blocks", "ratio")
"""How far to prune: one of them is given."""
_SEARCH_FIELDS = (
    *("model", "calibration", "calibration_column", "num_samples", "sequence_length", "seed"),
    *("block_kinds", "stock_compatible", "metric", "strategy", "strategy_seed", "laco"),
    *("device", "dtype", "trust_remote_code"),
)
"""What a pruning order may depend on, beside how far it goes."""
_NUMBER_FIELDS = (
    *("num_samples", "sequence_length", "seed", "num_blocks", "ratio", "export_blocks"),
    *("num_fewshot", "limit", "batch_size", "workers", "strategy_seed", "laco_layers_per_merge"),
    *("laco_first_layer", "laco_last_layer", "laco_interval", "laco_threshold"),
    *("speed_new_tokens", "speed_repeats"),
)
_DEVICE = re.compile(r"auto|cpu|cuda(:\d{1,4})?")

# Far beyond anything that can be computed, and within what every library and database column behind can hold: a slip of
# the pen is refused here and not somewhere in the middle.
_MOST_TOKENS = 2**24
_MOST_ROWS = 10**12
_MOST_BLOCKS = 10**6
_MOST_EXAMPLES = 10**9
_MOST_SHOTS = 10**4
_MOST_SEQUENCES_AT_ONCE = 2**20
_MOST_WORKERS = 2**12


def _as_list(value: object) -> object:
    """One text means a list of one."""
    return (value,) if isinstance(value, str) else value


def _split_at_commas(value: object) -> object:
    """'a,b' means the list of a and b."""
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


def _number(value: object) -> object:
    """A number may be written as text, as the command line gives it."""
    return int(value) if isinstance(value, str) and re.fullmatch(r"-?\d{1,18}", value) else value


def _number_or_all(value: object) -> object:
    """'all' rows means no number of rows."""
    return None if value == "all" else _number(value)


def _number_or_auto(value: object) -> object:
    """'auto' means that no number is given: the device decides."""
    return None if value == "auto" else _number(value)


def _known_device(value: object) -> object:
    if isinstance(value, str) and not _DEVICE.fullmatch(value):
        hint = nearest(value, ("auto", "cpu", "cuda"))
        raise PydanticCustomError("device", f"unknown device {value!r}; valid are auto, cpu, cuda and cuda:N{hint}")
    return value


def _amount_of_memory(value: object) -> object:
    """As it was written, once it is known to be one; a number without a unit is none."""
    if value is None:
        return None
    try:
        parse_memory_size(str(value))
    except ConfigurationError as error:
        raise PydanticCustomError("memory", "{reason}", {"reason": str(error)}) from error
    return value


def _host_and_port(value: object) -> object:
    if isinstance(value, str):
        try:
            check_address(value)
        except ConfigurationError as error:
            raise PydanticCustomError("executor", "{reason}", {"reason": str(error)}) from error
    return value


def _on_or_off(value: object) -> object:
    """YAML takes `on` and `off` for truth values."""
    return ("off", "on")[value] if isinstance(value, bool) else value


def _numbers(value: object) -> object:
    """'1,8' means the list of 1 and 8, and a number a list of one."""
    if isinstance(value, int):
        return (value,)
    parts = _split_at_commas(value)
    return tuple(map(_number_or_all, parts)) if isinstance(parts, tuple) else parts


def _dtype_or_none(value: object) -> object:
    """llama.cpp writes Q8_0; 'none' leaves weights as they are."""
    lower = value.lower() if isinstance(value, str) else value
    return None if lower == "none" else lower


def _no_truth_value(value: object) -> object:
    """Which Python takes for 0 or 1."""
    if isinstance(value, bool):
        raise PydanticCustomError("number", "Input should be a number")
    return value


_Count = Annotated[int, BeforeValidator(_no_truth_value), Field(ge=1, le=2**20)]
NonBlank = Annotated[str, Field(min_length=1, pattern=r"\S")]
# What a schema (the form of Prefect's server) says is valid before it is made the field's own type.
_Texts = str | tuple[str, ...]
_Numbers = int | str | tuple[int, ...]


class Recipe(BaseModel):
    """What to prune, how, how far, and what to measure before and after."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model: NonBlank = Field(description=SETTINGS["model"])
    calibration: NonBlank = Field(default="alpaca", description=SETTINGS["calibration"])
    calibration_column: NonBlank | None = Field(default=None, description=SETTINGS["calibration_column"])
    num_samples: Annotated[
        int | None, BeforeValidator(_number_or_all, json_schema_input_type=int | Literal["all"] | None)
    ] = Field(default=256, ge=1, le=_MOST_ROWS, description=SETTINGS["num_samples"])
    sequence_length: int = Field(default=2048, ge=2, le=_MOST_TOKENS, description=SETTINGS["sequence_length"])
    seed: int = Field(default=42, ge=0, lt=2**32, description=SETTINGS["seed"])
    num_blocks: int | None = Field(default=None, ge=1, le=_MOST_BLOCKS, description=SETTINGS["num_blocks"])
    ratio: float | None = Field(default=None, gt=0, lt=1, description=SETTINGS["ratio"])
    block_kinds: BlockKinds = Field(default="both", description=SETTINGS["block_kinds"])
    export_blocks: int | None = Field(default=None, ge=1, le=_MOST_BLOCKS, description=SETTINGS["export_blocks"])
    export_format: Annotated[
        tuple[FormatChoice, ...], BeforeValidator(_split_at_commas, json_schema_input_type=_Texts)
    ] = Field(default=("auto",), min_length=1, description=SETTINGS["export_format"])
    export_dtype: Annotated[ExportDtype | None, BeforeValidator(_dtype_or_none)] = Field(
        default=None, description=SETTINGS["export_dtype"]
    )
    eval_text: Annotated[tuple[NonBlank, ...], BeforeValidator(_as_list, json_schema_input_type=_Texts)] = Field(
        default=(), description=SETTINGS["eval_text"]
    )
    eval_text_column: NonBlank | None = Field(default=None, description=SETTINGS["eval_text_column"])
    tasks: Annotated[tuple[NonBlank, ...], BeforeValidator(_split_at_commas, json_schema_input_type=_Texts)] = Field(
        default=(), description=SETTINGS["tasks"]
    )
    task_dir: NonBlank | None = Field(default=None, description=SETTINGS["task_dir"])
    task_data: NonBlank | None = Field(default=None, description=SETTINGS["task_data"])
    log_samples: bool = Field(default=False, description=SETTINGS["log_samples"])
    num_fewshot: int | None = Field(default=None, ge=0, le=_MOST_SHOTS, description=SETTINGS["num_fewshot"])
    limit: int | None = Field(default=None, ge=1, le=_MOST_EXAMPLES, description=SETTINGS["limit"])
    device: Annotated[str, BeforeValidator(_known_device)] = Field(default="auto", description=SETTINGS["device"])
    dtype: Literal["auto", "float32", "bfloat16"] = Field(default="auto", description=SETTINGS["dtype"])
    batch_size: Annotated[
        int | None, BeforeValidator(_number_or_auto, json_schema_input_type=int | Literal["auto"] | None)
    ] = Field(default=None, ge=1, le=_MOST_SEQUENCES_AT_ONCE, description=SETTINGS["batch_size"])
    stock_compatible: bool = Field(default=False, description=SETTINGS["stock_compatible"])
    metric: MetricName = Field(default="perplexity", description=SETTINGS["metric"])
    strategy: StrategyName = Field(default="blockpruner", description=SETTINGS["strategy"])
    strategy_seed: int = Field(default=0, ge=0, lt=2**32, description=SETTINGS["strategy_seed"])
    laco_layers_per_merge: int = Field(default=4, ge=2, le=_MOST_BLOCKS, description=SETTINGS["laco_layers_per_merge"])
    laco_first_layer: int = Field(default=0, ge=0, le=_MOST_BLOCKS, description=SETTINGS["laco_first_layer"])
    laco_last_layer: int | None = Field(default=None, ge=1, le=_MOST_BLOCKS, description=SETTINGS["laco_last_layer"])
    laco_interval: int = Field(default=2, ge=1, le=_MOST_BLOCKS, description=SETTINGS["laco_interval"])
    laco_threshold: float = Field(default=0.65, ge=-1, lt=1, description=SETTINGS["laco_threshold"])
    scorer: ScorerName = Field(default="sweep", description=SETTINGS["scorer"])
    memory_budget: Annotated[NonBlank | None, BeforeValidator(_amount_of_memory)] = Field(
        default=None, description=SETTINGS["memory_budget"]
    )
    compile: Annotated[CompileChoice, BeforeValidator(_on_or_off)] = Field(
        default="auto", description=SETTINGS["compile"]
    )
    executor: ExecutorName = Field(default="local", description=SETTINGS["executor"])
    workers: int | None = Field(default=None, ge=1, le=_MOST_WORKERS, description=SETTINGS["workers"])
    ray_address: Annotated[NonBlank | None, BeforeValidator(_host_and_port)] = Field(
        default=None, description=SETTINGS["ray_address"]
    )
    speed_batch_sizes: Annotated[tuple[_Count, ...], BeforeValidator(_numbers, json_schema_input_type=_Numbers)] = (
        Field(default=(1, 8), min_length=1, description=SETTINGS["speed_batch_sizes"])
    )
    speed_prompt_tokens: Annotated[tuple[_Count, ...], BeforeValidator(_numbers, json_schema_input_type=_Numbers)] = (
        Field(default=(128, 512), min_length=1, description=SETTINGS["speed_prompt_tokens"])
    )
    speed_new_tokens: int = Field(default=32, ge=1, le=2**20, description=SETTINGS["speed_new_tokens"])
    speed_repeats: int = Field(default=5, ge=1, le=1000, description=SETTINGS["speed_repeats"])
    trust_remote_code: bool = Field(default=False, description=SETTINGS["trust_remote_code"])
    name: NonBlank | None = Field(default=None, description=SETTINGS["name"])

    _are_no_truth_values = field_validator(*_NUMBER_FIELDS, mode="before")(_no_truth_value)

    @model_validator(mode="after")
    def _one_target(self) -> Self:
        if self.num_blocks is not None and self.ratio is not None:
            raise PydanticCustomError(
                "target", "both num_blocks and ratio are given; give one of them (--num-blocks K or --ratio R)"
            )
        return self

    @model_validator(mode="after")
    def _heeded_by_the_strategy(self) -> Self:
        try:
            check_settings(self.strategy, self.block_kinds, self.metric)
        except ConfigurationError as error:
            raise PydanticCustomError("strategy", "{reason}", {"reason": str(error)}) from error
        return self

    @model_validator(mode="after")
    def _dtype_of_every_format(self) -> Self:
        for name in self.export_format:
            if self.export_dtype is not None and self.export_dtype not in dtypes_of(name):
                raise PydanticCustomError(
                    "export_dtype",
                    "format {name} has no dtype {dtype} (it has {valid}, and none: as they are); "
                    "{dtype} is for format gguf alone",
                    {"name": name, "dtype": self.export_dtype, "valid": ", ".join(dtypes_of(name))},
                )
        return self

    @model_validator(mode="after")
    def _one_executor(self) -> Self:
        given = [name for name in ("workers", "ray_address") if getattr(self, name) is not None]
        if self.executor == "local":
            if given:
                raise PydanticCustomError("executor", f"{given[0]} is for executor ray; give --executor ray as well")
        elif self.scorer == "plain":
            raise PydanticCustomError("executor", "scorer plain knows no executor ray; leave one of them out")
        elif self.strategy == "laco":
            raise PydanticCustomError(
                "executor", "strategy laco merges one model, and knows no executor ray; leave one of them out"
            )
        elif ":" in self.device:
            raise PydanticCustomError(
                "executor", "device {device} with executor ray: Ray chooses the GPU; give cuda", {"device": self.device}
            )
        return self

    @property
    def title(self) -> str:
        """What its run is called where runs of many models are listed."""
        return self.name or self.model

    @property
    def spread(self) -> ExecutorSettings:
        """Who is to compute a search's scores."""
        return ExecutorSettings(executor=self.executor, workers=self.workers, ray_address=self.ray_address)

    @property
    def stock_compatible_at(self) -> str | None:
        """Where the search must end with what can be repacked: its target, as text."""
        target = f"{self.num_blocks} blocks" if self.num_blocks is not None else f"ratio {self.ratio}"
        return target if self.stock_compatible else None

    @property
    def judged_by(self) -> str:
        """The metric, or where the strategy has an importance of its own, that."""
        strategy = STRATEGIES[self.strategy]
        return self.metric if strategy.uses_metric else strategy.importance

    @property
    def unheeded(self) -> frozenset[str]:
        """The fields that its strategy does not heed."""
        strategy, names = STRATEGIES[self.strategy], set[str]()
        if strategy.importance != "chance":
            names |= {"strategy_seed"}
        if strategy.procedure != "collapse":
            names |= {f"laco_{name}" for name in LacoSettings.model_fields}
        if strategy.whole_layers:
            names |= {"stock_compatible"}
        return frozenset(names)

    @property
    def laco(self) -> LacoSettings:
        """The settings of strategy laco."""
        return LacoSettings(
            **{name: getattr(self, f"laco_{name}") for name in LacoSettings.model_fields},
        )

    @property
    def scoring(self) -> ScorerSettings:
        """How a search is to compute its scores."""
        budget = parse_memory_size(self.memory_budget) if self.memory_budget else None
        return ScorerSettings(scorer=self.scorer, memory_budget=budget, compile=self.compile)

    def require_target(self) -> None:
        """Make sure that the recipe says how far to prune.

        Raises:
            ConfigurationError: if it gives neither a number of blocks nor a ratio.
        """
        if self.num_blocks is None and self.ratio is None:
            raise ConfigurationError("how far to prune is not said; give --num-blocks K or --ratio R")

    def changed(self, changes: Mapping[str, Any]) -> Recipe:
        """The recipe with other values, checked again; a new target replaces the old one.

        Raises:
            ConfigurationError: if a change is not valid.
        """
        return make_recipe(_overridden(self.model_dump(), changes))

    def going_on(self, changes: Mapping[str, Any], num_searched: int) -> Recipe:
        """The recipe of a run, changed so as to go on from it.

        A number of blocks counts from the whole model, whatever the run exported. Where the run's search has reached
        it, it is a prefix of that search's order, and needs no other search; beyond, it is a new target. Without one,
        what is exported stays as it was. Another format begins with the weights' own dtype.

        Args:
            changes: fields given anew.
            num_searched: how many blocks the run's search removed.

        Raises:
            ConfigurationError: if a change is not valid.
        """
        if "export_format" in changes:  # the dtype was of the format before
            changes = {"export_dtype": None, **changes}
        asked = self.changed(changes)
        same_search = all(getattr(asked, field) == getattr(self, field) for field in _SEARCH_FIELDS)
        if not same_search or not 1 <= changes.get("num_blocks", 0) <= num_searched:
            return asked
        others = {field: value for field, value in changes.items() if field not in TARGET_FIELDS}
        return self.changed({**others, "export_blocks": asked.num_blocks})

    def anchored(self) -> Recipe:
        """The recipe with the paths that exist made absolute, so that it means the same from any folder."""
        return self.model_copy(update={field: _mapped(getattr(self, field), absolute) for field in _PATH_FIELDS})


def make_recipe(values: Mapping[str, Any]) -> Recipe:
    """A recipe from its fields.

    Raises:
        ConfigurationError: naming the first field that is unknown or not valid.
    """
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        problems = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
        raise ConfigurationError(_describe(problems[0])) from error  # a misspelt field may be the one that is missing


def load_recipe(source: str | None, overrides: Mapping[str, Any]) -> Recipe:
    """A recipe from a YAML file, or one of the project's by its name, or none, with some fields given anew.

    Raises:
        ConfigurationError: if there is no such recipe, or it is not valid, or a field that is given anew is one that
            its strategy does not heed.
    """
    recipe = make_recipe(_overridden({} if source is None else _read(_locate(source)), overrides))
    for name in overrides:
        if name in recipe.unheeded - {"stock_compatible"}:  # which whole layers are in any case
            heeding = "laco" if name.startswith("laco_") else "random"
            raise ConfigurationError(
                f"{name} is given, and strategy {recipe.strategy} does not heed it; leave it out, or give strategy "
                f"{heeding}"
            )
    return recipe


def recipe_names() -> list[str]:
    """The project's own recipes."""
    return sorted(path.stem for path in RECIPES_FOLDER.glob("*.yaml"))


def _overridden(values: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The values with some given anew.

    A target replaces the one before, whichever of the two fields that is, and with it the number of blocks to export:
    that was a part of the old one.
    """
    replaced = {*TARGET_FIELDS, "export_blocks"} if overrides.keys() & set(TARGET_FIELDS) else set()
    return {**{name: value for name, value in values.items() if name not in replaced}, **overrides}


def _locate(source: str) -> Path:
    if (path := user_path(source)).is_file():
        return path
    if source in recipe_names():
        return RECIPES_FOLDER / f"{source}.yaml"
    if source in (path.stem for path in COMPARISONS_FOLDER.glob("*.yaml")):
        raise ConfigurationError(f"{source} is a comparison of runs; give `blockpruner compare {source}`")
    problem = f"{source!r} is a folder" if source and path.is_dir() else f"there is no recipe file {source!r}"
    raise ConfigurationError(
        f"{problem}; give a YAML file, or one of: {', '.join(recipe_names())}{nearest(source, recipe_names())}"
    )


def _read(path: Path) -> dict[str, Any]:
    return paths_beside(path.parent, read_yaml(path))


def paths_beside(folder: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a recipe, or of an external checkpoint, with the paths that exist in the folder made those."""
    return {
        name: _mapped(value, lambda text: _beside(folder, text)) if name in _PATHS_IN_FILES else value
        for name, value in values.items()
    }


def _mapped(value: Any, change: Any) -> Any:
    """`change` of a text, or of each text of a list; anything else is left for the checks to refuse."""
    if isinstance(value, str):
        return change(value)
    return tuple(_mapped(item, change) for item in value) if isinstance(value, list | tuple) else value


def _beside(folder: Path, text: str) -> str:
    path = folder / text
    if not text.strip() or not _exists(path):
        return text
    resolved = path.resolve()
    return str(resolved.relative_to(Path.cwd()) if resolved.is_relative_to(Path.cwd()) else resolved)


def absolute(text: str) -> str:
    """A path that exists, made absolute; anything else as it is."""
    try:
        path = user_path(text)
    except ConfigurationError:  # said by whoever opens it
        return text
    return str(path.resolve()) if _exists(path) else text


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a text that cannot be a path: too long, or with a null byte
        return False


def _describe(problem: ErrorDetails) -> str:
    """One of pydantic's findings as one line: what came, what is valid."""
    field = ".".join(str(part) for part in problem["loc"][:1])
    came, kind = problem["input"], problem["type"]
    if kind == "extra_forbidden":
        return f"unknown recipe field {field!r}{nearest(field, SETTINGS)}; valid are {', '.join(SETTINGS)}"
    if kind == "missing":
        return f"no {field} is given; give --{field.replace('_', '-')}, or name it in the recipe"
    if kind == "literal_error":
        valid = re.findall(r"'([^']*)'", problem["ctx"]["expected"])
        return f"unknown {field} {came!r}; valid are {', '.join(valid)}{nearest(str(came), valid)}"
    if kind in ("device", "executor", "export_dtype", "strategy", "target"):
        return problem["msg"]
    if kind == "too_short":
        return f"{field} is {shortened(repr(came))}; give at least 1 item"
    or_all = {"num_samples": ", or all", "batch_size": ", or auto"}.get(field, "")
    valid_is = problem["msg"].replace("Input ", "it ")
    return f"{field} is {shortened(repr(came))}: {valid_is}{or_all}"
