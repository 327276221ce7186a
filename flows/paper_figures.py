"""What the paper published for its models, so that a table or a picture can show its figures beside ours.

The numbers are data, in `paper_figures.yaml`, with their source. Knows no run: who asks gives a model's name and size.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict

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

    def result(self, strategy: str) -> PaperResult | None:
        """The method's row in the main table, or else in the ablations."""
        return next((row for row in self.results if row.strategy == strategy), None)


class PaperFigures(BaseModel):
    """Everything that was published."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str
    text: str
    """The text that the perplexities are of, by the name under which ours are listed."""
    sequence_length: int
    """Tokens."""
    tasks: tuple[str, ...]
    """The lm-eval tasks that the averages are over."""
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


@cache
def paper_figures() -> PaperFigures:
    """The paper's figures, read once."""
    return PaperFigures.model_validate(yaml.safe_load(_FILE.read_text(encoding="utf-8")))


def _last_part(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2].lower()
