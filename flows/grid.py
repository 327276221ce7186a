"""A comparison: what a table is to compare, as plain data. Its cells are recipes, all checked before anything runs.

Reads YAML; opens no model, no text and no workspace. What is measured (texts, tasks, lengths) is the same for every
cell, so that the rows can be compared.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from blockpruner.errors import ConfigurationError, nearest
from blockpruner.paths import user_path
from flows.recipe import COMPARISONS_FOLDER, TARGET_FIELDS, NonBlank, Recipe, absolute, make_recipe, paths_beside
from flows.yaml_file import read_yaml

AXES = (
    *("model", "strategy", "strategy_seed", "metric", "block_kinds", "stock_compatible"),
    *("calibration", "calibration_column", "num_samples", "seed", "num_blocks", "ratio"),
)
"""Recipe fields of which a grid may list several values."""
_MEASURED_ALIKE = (
    *("sequence_length", "eval_text", "eval_text_column", "tasks", "task_dir", "task_data", "log_samples"),
    *("num_fewshot", "limit", "dtype", "device"),
)
"""What no cell may have for itself: its row could not be compared with the others."""
EXTERNAL_ROLE = "external:"
"""How the role of a text begins that an external checkpoint's own tokenizer has cut."""
DENSE = "dense"
"""What a table calls the line of a dense model."""
_MOST_CELLS = 10_000


def _as_blocks(value: object) -> object:
    """A single block means a list of one."""
    return (value,) if isinstance(value, Mapping) else value


class External(BaseModel):
    """A checkpoint that something else has pruned: evaluated, and not searched."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: NonBlank = Field(description="The folder with config.json and safetensors weights, or a hub id.")
    label: NonBlank = Field(description="What its row is called: the method that pruned it.")
    model: NonBlank | None = Field(
        default=None, description="The model that it was made from; none where the grid has a single one."
    )

    def anchored(self) -> External:
        """The same with a path that means the same from any folder."""
        return self.model_copy(update={"path": absolute(self.path)})


class Comparison(BaseModel):
    """A grid of runs, and how they are measured."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: NonBlank = Field(description="Name of the comparison; its runs carry it.")
    description: str | None = Field(default=None, description="What it is to show.")
    base: dict[str, Any] = Field(description="Recipe fields that all cells share.")
    grid: Annotated[tuple[dict[str, Any], ...], BeforeValidator(_as_blocks)] = Field(
        default=(),
        description="Recipe fields with one value or a list; each block gives every combination of its lists.",
    )
    external: tuple[External, ...] = Field(default=(), description="Checkpoints pruned elsewhere.")
    speed: bool = Field(default=False, description="Time every model as well, one after another at the end.")

    @cached_property
    def cells(self) -> tuple[Cell, ...]:
        """Every cell, in the order of the grid, those that are the same once; then the external checkpoints.

        Raises:
            ConfigurationError: naming the first thing that is not valid.
        """
        every = (recipe for block in self.grid for recipe in self._recipes(block))
        listed = list(itertools.islice(every, _MOST_CELLS + 1))
        if len(listed) > _MOST_CELLS:
            raise ConfigurationError(f"the grid has more than {_MOST_CELLS:,} cells; give shorter lists")
        recipes = tuple(dict.fromkeys(listed))
        labels = _labels(recipes)
        searched = [Cell(label, self._named(recipe, label)) for label, recipe in zip(labels, recipes, strict=True)]
        cells = (*searched, *self._externals(recipes, {*labels, *(recipe.strategy for recipe in recipes)}))
        if not cells:
            raise ConfigurationError("there is nothing to compare; give a grid, such as `grid: {ratio: [0.1, 0.2]}`")
        return cells

    def _recipes(self, block: Mapping[str, Any]) -> Iterator[Recipe]:
        """Every combination of one block's lists, the last axis fastest."""
        _check_block(block)
        axes = {name: value if isinstance(value, list | tuple) else [value] for name, value in block.items()}
        for values in itertools.product(*axes.values()):
            recipe = make_recipe({**self._without_old_target(block), **dict(zip(axes, values, strict=True))})
            recipe.require_target()
            yield _heeded(recipe)

    def _without_old_target(self, block: Mapping[str, Any]) -> dict[str, Any]:
        """The base, less its target where the block gives one."""
        replaced = TARGET_FIELDS if block.keys() & set(TARGET_FIELDS) else ()
        return {name: value for name, value in self.base.items() if name not in replaced}

    def _externals(self, recipes: tuple[Recipe, ...], taken: Set[str]) -> Iterator[Cell]:
        """The external checkpoints, each with the recipe of the model that it was made from."""
        names = [external.label for external in self.external]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ConfigurationError(f"two external checkpoints are labelled {twice!r}; give each a label of its own")
        if same := next((name for name in names if name in {*taken, DENSE}), None):
            raise ConfigurationError(
                f"an external checkpoint is labelled {same!r}, as another row of the table is; give it another label, "
                f"such as '{same} elsewhere'"
            )
        for external in self.external:
            recipe = self._recipe_of_external(external, recipes)
            yield Cell(external.label, self._named(recipe, external.label), external)

    def _recipe_of_external(self, external: External, recipes: tuple[Recipe, ...]) -> Recipe:
        models = list(dict.fromkeys(recipe.model for recipe in recipes))
        if external.model is None and len(models) > 1:
            raise ConfigurationError(
                f"which model {external.label} was made from is not said, and the grid has {len(models)}; "
                f"give it in the recipe, `model:` under `external:`, one of {', '.join(models)}"
            )
        chosen = external.model or (models[0] if models else None)
        first = next((recipe for recipe in recipes if recipe.model == chosen), None)
        if first is not None:
            return first
        return make_recipe({**self.base, **({"model": chosen} if chosen else {})})

    def _named(self, recipe: Recipe, label: str) -> Recipe:
        return recipe.model_copy(update={"name": f"{self.name}: {label}"})


@dataclass(frozen=True)
class Cell:
    """One run of a comparison."""

    label: str
    """What distinguishes it from the others."""
    recipe: Recipe
    """Its `name` is the run's: the comparison's and the label."""
    external: External | None = None
    """The checkpoint that takes the place of search and export."""

    @property
    def family(self) -> str:
        """The same for cells that differ only in how far they prune: they share one search."""
        apart = {*TARGET_FIELDS, "name", "export_blocks", "export_format", "export_dtype"}
        return json.dumps([self.recipe.model_dump(mode="json", exclude=apart), self._external])

    @property
    def key(self) -> str:
        """Identifies the cell among all cells of its comparison."""
        content = json.dumps([self.recipe.model_dump(mode="json"), self._external])
        return hashlib.sha256(content.encode()).hexdigest()

    @property
    def _external(self) -> Any:
        return self.external.model_dump(mode="json") if self.external else None


def in_families(cells: tuple[Cell, ...]) -> list[list[Cell]]:
    """The cells that share a search together, the one that goes furthest first: the others read its prefix."""
    families: dict[str, list[Cell]] = {}
    for cell in cells:
        families.setdefault(cell.family, []).append(cell)
    return [sorted(family, key=_how_far, reverse=True) for family in families.values()]


def _how_far(cell: Cell) -> tuple[float, int]:
    return (cell.recipe.ratio or 0.0, cell.recipe.num_blocks or 0)


def make_comparison(values: Mapping[str, Any]) -> Comparison:
    """A comparison from its fields, with every cell checked.

    Raises:
        ConfigurationError: naming the first field that is unknown or not valid.
    """
    if "grid" not in values and "external" not in values:
        raise ConfigurationError(
            "no grid is given: a comparison has `base:` with what its runs share and `grid:` with lists of what differs"
        )
    try:
        comparison = Comparison.model_validate(values)
    except ValidationError as error:
        # A misspelt field may be the one that is missing.
        problem = sorted(error.errors(), key=lambda each: each["type"] != "extra_forbidden")[0]
        field = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            known = External.model_fields if "." in field else Comparison.model_fields
            hint = nearest(field.rpartition(".")[2], known)
            raise ConfigurationError(
                f"unknown field {field!r} of a comparison{hint}; valid are {', '.join(known)}"
            ) from error
        raise ConfigurationError(f"{field} of the comparison: {problem['msg'].lower()}") from error
    _ = comparison.cells
    return comparison


def load_comparison(source: str, overrides: Mapping[str, Any], more: Mapping[str, Any]) -> Comparison:
    """A comparison from a YAML file, or one of the project's by its name.

    Args:
        source: the file or the name.
        overrides: recipe fields that take the place of the base's.
        more: the comparison's own fields, in place of the file's; external checkpoints are added to the file's.

    Raises:
        ConfigurationError: if there is no such comparison, or it is not valid.
    """
    path = _locate(source)
    values = read_yaml(path)
    base, grid = values.get("base", {}), _as_blocks(values.get("grid", ()))
    blocks = grid if isinstance(grid, list | tuple) else ()
    values = {
        "name": path.stem,
        **values,
        **{name: value for name, value in more.items() if name != "external"},
        "base": _override(base, blocks, overrides, path.parent) if isinstance(base, Mapping) else base,
    }
    if blocks:
        values["grid"] = [paths_beside(path.parent, b) if isinstance(b, Mapping) else b for b in blocks]
    if isinstance(listed := values.get("external"), list):
        values["external"] = [paths_beside(path.parent, e) if isinstance(e, Mapping) else e for e in listed]
    if added := more.get("external"):
        values["external"] = [*values.get("external", ()), *added]
    return make_comparison(values)


def comparison_names() -> list[str]:
    """The project's own comparisons."""
    return sorted(path.stem for path in COMPARISONS_FOLDER.glob("*.yaml"))


def _locate(source: str) -> Path:
    if (path := user_path(source)).is_file():
        return path
    if source in comparison_names():
        return COMPARISONS_FOLDER / f"{source}.yaml"
    problem = f"{source!r} is a folder" if source and path.is_dir() else f"there is no comparison {source!r}"
    raise ConfigurationError(
        f"{problem}; give a YAML file, or one of: {', '.join(comparison_names())}{nearest(source, comparison_names())}"
    )


def _override(base: Mapping[str, Any], blocks: Any, overrides: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    for block in blocks:
        if isinstance(block, Mapping) and (both := sorted(block.keys() & overrides.keys())):
            raise ConfigurationError(
                f"{both[0]} differs from cell to cell in this grid, and cannot be given for all; change the recipe"
            )
    kept = {
        name: value
        for name, value in base.items()
        if name not in TARGET_FIELDS or not overrides.keys() & set(TARGET_FIELDS)
    }
    return {**paths_beside(folder, kept), **overrides}


def _check_block(block: Mapping[str, Any]) -> None:
    for name, value in block.items():
        if name not in Recipe.model_fields:
            raise ConfigurationError(f"unknown axis {name!r} of the grid{nearest(name, AXES)}; {_valid_axes()}")
        if name == "name" or name in _MEASURED_ALIKE:
            why = "all cells are measured alike" if name in _MEASURED_ALIKE else "runs are named after their cells"
            raise ConfigurationError(f"{name} is no axis of a grid: {why}; give it under `base:`, or leave it out")
        if isinstance(value, list | tuple):
            if name not in AXES:
                raise ConfigurationError(
                    f"{name} is no axis of a grid, and takes one value in a block; {_valid_axes()}"
                )
            if not value:
                raise ConfigurationError(f"the axis {name} of the grid has no values; give some, or leave it out")


def _valid_axes() -> str:
    return f"axes are {', '.join(AXES)}"


_ORDER = (*AXES, *(name for name in Recipe.model_fields if name not in AXES))
"""In which a label names them."""


def _heeded(recipe: Recipe) -> Recipe:
    """The recipe without what its strategy does not heed, so that nothing is searched or shown twice for that."""
    return recipe.model_copy(update={name: Recipe.model_fields[name].default for name in recipe.unheeded})


def _labels(recipes: tuple[Recipe, ...]) -> list[str]:
    """What tells each recipe from the others, in words: model and strategy, and what differs among their own.

    With what all share, and with how far each prunes, a label is all that a reader needs: of other axes on which
    strategies differ, what it does not name is the default.
    """
    dumped = [recipe.model_dump() for recipe in recipes]
    first = [name for name in ("model", "strategy") if _varies(name, dumped)]
    apart = [name for name in AXES if name not in TARGET_FIELDS and _varies(name, dumped)]
    alike: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for values in dumped:
        alike.setdefault(tuple(values[name] for name in first), []).append(values)
    varying = {own: [name for name in Recipe.model_fields if _varies(name, group)] for own, group in alike.items()}
    short = {name: _short_names({values[name] for values in dumped}) for name in ("model", "calibration")}

    def label(values: Mapping[str, Any], names: Iterable[str]) -> str:
        shown = {**values, **{name: known[values[name]] for name, known in short.items()}}
        order = sorted(names, key=_ORDER.index)
        return " ".join(_labelled(name, shown[name]) for name in order if _is_given(name, values))

    def told(values: Mapping[str, Any]) -> set[str]:
        unusual = (name for name in apart if values[name] != Recipe.model_fields[name].default)
        return {*first, *varying[tuple(values[name] for name in first)], *unusual}

    return [label(values, told(values)) or label(values, ["model", *TARGET_FIELDS]) for values in dumped]


def _is_given(name: str, values: Mapping[str, Any]) -> bool:
    return values[name] is not None or name == "num_samples"


def _varies(name: str, dumped: list[dict[str, Any]]) -> bool:
    return len({repr(values[name]) for values in dumped}) > 1


def _short_names(paths: Set[str]) -> dict[str, str]:
    """Each path's last parts, as many as tell it from the others."""
    parts = {path: Path(path).parts or (path,) for path in paths}
    found = dict[str, str]()
    for length in range(1, max(map(len, parts.values()), default=0) + 1):
        ends = {path: own[-length:] for path, own in parts.items()}
        times = Counter(ends.values())
        found |= {path: str(Path(*end)) for path, end in ends.items() if times[end] == 1 and path not in found}
    return {path: found.get(path, path) for path in paths}  # one that is written in two ways stays as it is


def _labelled(name: str, value: Any) -> str:
    if name in ("model", "calibration", "strategy", "metric"):
        return str(value)
    return f"{name}={'all' if value is None else value}"
