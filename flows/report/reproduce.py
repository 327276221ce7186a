"""How a run can be done again: its recipe, and the commands that carry it out."""

from __future__ import annotations

from typing import Any

import yaml

from flows.grid import External
from flows.recipe import Recipe
from stages.runs import RunRecord

_COMMANDS = {
    "speed": "blockpruner search recipe.yaml && blockpruner speed latest{trust}",
    "export": "blockpruner search recipe.yaml && blockpruner export latest",
    "search": "blockpruner search recipe.yaml",
    "baseline": "blockpruner baseline recipe.yaml",
    "calibration": "blockpruner calibrate recipe.yaml",
}
"""By the last thing that a run did; the first that fits counts. What goes on from a run has to be told again whose code
it may run: no record is believed in that."""
_OF_A_SEARCH = frozenset(
    {"name", "num_blocks", "ratio", "strategy", "strategy_seed", "metric", "block_kinds", "stock_compatible"}
)
"""Settings that mean nothing for a model that was pruned elsewhere, beside LaCo's and the export's."""
_OF_AN_EVALUATION = (
    *("model", "tasks", "task_dir", "task_data", "log_samples", "num_fewshot", "limit"),
    *("eval_text", "eval_text_column", "sequence_length", "device", "dtype", "name"),
)


def recipe_text(record: RunRecord) -> str:
    """The run's settings as a recipe (YAML), less those that are as they are without being given.

    Of a model that was pruned elsewhere it is the recipe of a comparison with that one row.
    """
    settings = _settings(record)
    if record.external is not None:
        external = External(path=record.external, label=record.strategy or "external")
        name = record.comparison or settings.pop("name", None) or "external"
        base = {key: value for key, value in settings.items() if key not in _OF_A_SEARCH}
        settings = {"name": name, "base": base, "external": [external.model_dump(exclude_none=True)]}
    return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True, width=120)


def _settings(record: RunRecord) -> dict[str, Any]:
    defaults = {name: field.default for name, field in Recipe.model_fields.items()}
    settings = {
        name: _plain(value)
        for name, value in record.config.items()
        if name not in defaults or _plain(value) != _plain(defaults[name])
    }
    if record.config.get("num_samples", 0) is None:
        settings["num_samples"] = "all"
    return settings


def commands(record: RunRecord) -> str:
    """The shell commands that do the run again, given its recipe as recipe.yaml."""
    roles = {stage.role.partition(":")[0] for stage in record.stages}
    if record.external is not None:
        return "blockpruner compare recipe.yaml"
    if any(stage.role == "evaluate:pruned" for stage in record.stages) or not roles:
        return "blockpruner run recipe.yaml"
    if "search" not in roles and any(stage.role == "evaluate:dense" for stage in record.stages):
        return f"blockpruner evaluate{_as_options(record)}{_trust(record)}"
    command = next((command for role, command in _COMMANDS.items() if role in roles), "blockpruner run recipe.yaml")
    return command.format(trust=_trust(record))


def script(record: RunRecord) -> str:
    """Both in one piece, to be pasted into a shell."""
    return f"cat > recipe.yaml <<'END_OF_RECIPE'\n{recipe_text(record)}END_OF_RECIPE\n{commands(record)}\n"


def _as_options(record: RunRecord) -> str:
    """`evaluate` of a model as it is takes no recipe."""
    import shlex

    settings, words = _settings(record), list[str]()
    for name in _OF_AN_EVALUATION:
        value = settings.get(name)
        option = f"--{name.replace('_', '-')}"
        if value in (None, []):
            continue
        if value is True:
            words.append(option)
        elif name == "tasks":
            words += [option, ",".join(value)]
        else:
            for each in value if isinstance(value, list) else [value]:
                words += [option, str(each)]
    return "".join(f" {shlex.quote(word)}" for word in words)


def _trust(record: RunRecord) -> str:
    return " --trust-remote-code" if record.config.get("trust_remote_code") else ""


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
