"""What the paper published for its models, so that a table or a picture can show its figures beside ours.

The numbers are data, in `paper_figures.yaml`, with their source. Knows no run: who asks gives a model's name and size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict

CLOSE = 0.03
"""How far two shares of removed parameters may lie apart and still stand side by side."""
_FILE = Path(__file__).with_name("paper_figures.yaml")


class _Published(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    perplexity: float | None = None
    """On WikiText-2 test, sequences of 2048 tokens."""
    average: float | None = None
    """Mean zero-shot accuracy over the paper's five tasks, in percent."""


class PaperDense(_Published):
    """An unpruned model, as the paper measured it."""


class PaperResult(_Published):
    """One method's pruned model, as the paper measured it."""

    strategy: str
    """As `--strategy` has it; `slicegpt`, which we only compare with, as well."""
    ratio: float | None = None
    """Share of all parameters removed (0 to 1); None where the paper does not state it for the row."""
    num_mha: int | None = None
    num_mlp: int | None = None


class PaperModel(BaseModel):
    """One of the paper's models."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    """As the paper calls it."""
    hub_ids: tuple[str, ...]
    num_layers: int
    dense: PaperDense
    results: tuple[PaperResult, ...]

    def results_of(self, strategy: str) -> tuple[PaperResult, ...]:
        """A method's rows: that of the main table first."""
        return tuple(row for row in self.results if row.strategy == strategy)

    def nearest(self, strategy: str, ratio: float) -> PaperResult | None:
        """The method's row whose ratio is nearest to this one; None if none is within `CLOSE` of it.

        Where the paper does not state a row's ratio, it is about that of BlockPruner's in the main table.
        """
        usual = self.results_of("blockpruner")[0].ratio

        def apart(row: PaperResult) -> float:
            stated = row.ratio if row.ratio is not None else usual
            return math.inf if stated is None else abs(stated - ratio)

        found = min(self.results_of(strategy), key=apart, default=None)
        return found if found is not None and apart(found) <= CLOSE else None


class PaperFigures(BaseModel):
    """Everything that was published."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str
    text: str
    """The text that the perplexities are of, by the name under which ours are listed."""
    sequence_length: int
    """Tokens."""
    tasks: tuple[str, ...]
    """The lm-eval tasks that the averages are over; zero-shot, every question."""
    search: dict[str, Any]
    """How blocks were searched for, by the names of a recipe's fields."""
    models: tuple[PaperModel, ...]

    def model(self, typed: str | None, num_layers: int | None = None) -> PaperModel | None:
        """The paper's model that a user means by a hub id, or by a folder that is called like one.

        `num_layers` tells a model of the same name from one of another size; None where it is not known.
        """
        name = _last_part(typed or "")
        return next(
            (
                model
                for model in self.models
                if name in map(_last_part, (model.name, *model.hub_ids)) and num_layers in (None, model.num_layers)
            ),
            None,
        )

    def other_search(self, settings: Mapping[str, Any]) -> list[str]:
        """In which of a search's settings, by the names of a recipe's fields, it is not the paper's.

        What `settings` does not have counts as the paper's, here and in `other_tasks`.
        """
        wanted = {**self.search, "sequence_length": self.sequence_length}
        return [
            f"{name} is {_shown(name, settings[name])}, in the paper {_shown(name, value)}"
            for name, value in wanted.items()
            if settings.get(name, value) != value
        ]

    def other_tasks(self, settings: Mapping[str, Any]) -> list[str]:
        """In what the average is not the paper's."""
        lines = []
        if set(settings.get("tasks", self.tasks)) != set(self.tasks):
            lines.append(f"the tasks are not the paper's ({', '.join(self.tasks)})")
        if shots := settings.get("num_fewshot"):
            lines.append(f"tasks with {shots} examples, in the paper zero-shot")
        if (limit := settings.get("limit")) is not None:
            lines.append(f"only {limit} questions of each task, in the paper all")
        return lines


@cache
def paper_figures() -> PaperFigures:
    """The paper's figures, read once."""
    return PaperFigures.model_validate(yaml.safe_load(_FILE.read_text(encoding="utf-8")))


def _last_part(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2].lower()


def _shown(name: str, value: object) -> str:
    return str(value) if value is not None else "all" if name == "num_samples" else "not given"
