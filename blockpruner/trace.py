"""What a search leaves behind, as plain data: every step, and in it every candidate's score; and its two files.

`search.json` says what was searched, `trace.jsonl` holds one step a line. NaN and infinity are written as strings.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, PositiveInt

from blockpruner.blocks import Block


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class CandidateScore(_Record):
    """What one step found for one candidate block."""

    block: Block
    score: float
    """The importance: the metric's value without the block; lower means less important."""
    perplexity: float
    rank: PositiveInt
    """1 is the least important."""
    chosen: bool
    tied: bool = False
    """Whether the score is too close to the chosen one's for the arithmetic to tell them apart."""


class SearchStep(_Record):
    """One removal, with everything it was chosen from."""

    step: PositiveInt
    block: Block
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


class SearchSummary(_Record):
    """What was searched."""

    dense_perplexity: float
    """Of the unpruned model on the calibration set."""
    num_layers: int
    num_parameters: int
    """Of the whole model; tied ones count once."""


class SearchTrace(_Record):
    """A finished search."""

    summary: SearchSummary
    steps: tuple[SearchStep, ...]

    def removed(self, num_blocks: int | None = None) -> tuple[Block, ...]:
        """The first `num_blocks` blocks of the pruning order (None: all)."""
        return tuple(step.block for step in self.steps[:num_blocks])


SUMMARY_FILE = "search.json"
TRACE_FILE = "trace.jsonl"


def write_trace(folder: Path, summary: SearchSummary, steps: Sequence[SearchStep]) -> None:
    """Write the two files of a finished search."""
    (folder / SUMMARY_FILE).write_text(summary.model_dump_json(indent=2) + "\n", encoding="utf-8")
    (folder / TRACE_FILE).write_text("".join(step.model_dump_json() + "\n" for step in steps), encoding="utf-8")


def read_trace(folder: Path) -> SearchTrace:
    """Read the two files of a finished search."""
    summary = SearchSummary.model_validate_json((folder / SUMMARY_FILE).read_bytes())
    lines = (folder / TRACE_FILE).read_text(encoding="utf-8").splitlines()
    return SearchTrace(summary=summary, steps=tuple(SearchStep.model_validate_json(line) for line in lines))
