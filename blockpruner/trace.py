"""What a search leaves behind, as plain data: every step, and in it every candidate's score; and its two files.

`search.json` says what was searched, `trace.jsonl` holds one step a line. NaN and infinity are written as strings.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt

from blockpruner.blocks import Block
from blockpruner.errors import ArtifactError, ConfigurationError, one_line
from blockpruner.strategies import StrategyName


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class LayerMerge(_Record):
    """Layers that became one: what each that is gone has more than the one that stays was added to it (LaCo)."""

    layer_index: NonNegativeInt
    """The layer that stays."""
    merged: tuple[NonNegativeInt, ...]
    """The layers that were added to it and are gone, as they were by then: with what was merged into them before."""


class CandidateScore(_Record):
    """What one step found for one candidate: a block, or whole layers."""

    block: Block
    also: tuple[Block, ...] = Field(default=(), exclude_if=lambda value: not value)
    """The blocks that leave with it, where a whole layer, or several, are one step."""
    score: float
    """The importance: the metric's value without the block, or the strategy's own; lower means less important."""
    perplexity: float | None
    """Of the model without it; None where it was not measured, for the strategy did not ask."""
    rank: PositiveInt
    """1 is the least important."""
    chosen: bool
    tied: bool = False
    """Whether the score is too close to the chosen one's for the arithmetic to tell them apart."""

    @property
    def blocks(self) -> tuple[Block, ...]:
        """All blocks that leave."""
        return (self.block, *self.also)


class SearchStep(_Record):
    """One removal, with everything it was chosen from."""

    step: PositiveInt
    block: Block
    also: tuple[Block, ...] = Field(default=(), exclude_if=lambda value: not value)
    """The blocks that leave with it, where a whole layer, or several, are one step."""
    score: float
    perplexity: float
    """Of the model on the calibration set once this block is gone as well."""
    num_parameters_removed: int
    """By this step and all before it."""
    ratio: float
    """`num_parameters_removed` over all of the model's parameters."""
    seconds: float
    work_saved: float = 0.0
    """The share of a whole sweep that did not have to be computed again after the step before."""
    candidates: tuple[CandidateScore, ...]
    """In stream order."""
    merge: LayerMerge | None = Field(default=None, exclude_if=lambda value: value is None)
    """What became of the removed layers' weights, where they are not just gone."""

    @property
    def blocks(self) -> tuple[Block, ...]:
        """All blocks that leave."""
        return (self.block, *self.also)


class SearchSummary(_Record):
    """What was searched."""

    dense_perplexity: float
    """Of the unpruned model on the calibration set."""
    num_layers: int
    num_parameters: int
    """Of the whole model; tied ones count once."""
    strategy: StrategyName = Field(default="blockpruner", exclude_if=lambda value: value == "blockpruner")


class SearchTrace(_Record):
    """A finished search."""

    summary: SearchSummary
    steps: tuple[SearchStep, ...]

    @property
    def num_blocks(self) -> int:
        """How many blocks the search removed."""
        return sum(len(step.blocks) for step in self.steps)

    def reaching(self, num_blocks: int | None = None) -> tuple[SearchStep, ...]:
        """The first steps, as many as remove `num_blocks` blocks (None: all).

        Raises:
            ConfigurationError: if no step ends there.
        """
        if num_blocks is None:
            return self.steps
        ends, count = [], 0
        for number, step in enumerate(self.steps, start=1):
            count += len(step.blocks)
            ends.append(count)
            if count == num_blocks:
                return self.steps[:number]
        in_steps = f" in steps that end at {', '.join(map(str, ends))}" if count > len(ends) else ""
        valid = "one of these" if in_steps else f"1 to {count}"
        raise ConfigurationError(
            f"num_blocks is {num_blocks}, but the search removed {count}{in_steps}; give {valid}, or search further"
        )

    def removed(self, num_blocks: int | None = None) -> tuple[Block, ...]:
        """The first `num_blocks` blocks of the pruning order (None: all).

        Raises:
            ConfigurationError: if no step ends there.
        """
        return tuple(block for step in self.reaching(num_blocks) for block in step.blocks)

    def merges(self, num_blocks: int | None = None) -> tuple[LayerMerge, ...]:
        """What became of the weights of those blocks, in order; empty where they are just gone.

        Raises:
            ConfigurationError: if no step ends there.
        """
        return tuple(step.merge for step in self.reaching(num_blocks) if step.merge is not None)


SUMMARY_FILE = "search.json"
TRACE_FILE = "trace.jsonl"


def write_trace(folder: Path, summary: SearchSummary, steps: Sequence[SearchStep]) -> None:
    """Write the two files of a finished search."""
    (folder / SUMMARY_FILE).write_text(summary.model_dump_json(indent=2) + "\n", encoding="utf-8")
    (folder / TRACE_FILE).write_text("".join(step.model_dump_json() + "\n" for step in steps), encoding="utf-8")


def read_trace(folder: Path) -> SearchTrace:
    """Read the two files of a finished search.

    Raises:
        ArtifactError: if they are not what a search writes.
    """
    try:
        summary = SearchSummary.model_validate_json((folder / SUMMARY_FILE).read_bytes())
        lines = (folder / TRACE_FILE).read_text(encoding="utf-8").splitlines()
        return SearchTrace(summary=summary, steps=tuple(SearchStep.model_validate_json(line) for line in lines))
    except (FileNotFoundError, ValueError) as error:  # pydantic's and Unicode's errors are ValueErrors
        raise ArtifactError(
            f"{folder} holds no trace of a search ({one_line(error)}); delete it and search again"
        ) from error
