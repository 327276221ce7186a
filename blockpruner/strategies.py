"""The ways to choose what is removed, as a table: what goes in one step, what it is judged by, whose idea it is.

Plain data and names; `search`, `ordered_search` and `collapse` do the work. Imports nothing heavy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt

from blockpruner.blocks import BlockKinds
from blockpruner.errors import ConfigurationError
from blockpruner.scoring.settings import MetricName

StrategyName = Literal["blockpruner", "oneshot", "layers", "shortgpt", "rm", "laco", "random"]

Procedure = Literal["greedy", "ordered", "collapse"]
"""greedy: everything that remains is scored anew after each removal. ordered: scored once, removed in the order of the
scores. collapse: layers are merged into one before them, from the top down, as long as the model stays the same."""

Importance = Literal["metric", "block_influence", "relative_magnitude", "dissimilarity", "chance"]
"""What a score is: the search's metric without the candidate, a measure of a layer's input and output, or a draw."""


@dataclass(frozen=True)
class Strategy:
    """One way to choose."""

    name: StrategyName
    procedure: Procedure
    importance: Importance
    source: str
    """Who described it."""
    whole_layers: bool = False
    """Whether both blocks of a layer go together, in one step."""

    @property
    def uses_metric(self) -> bool:
        """Whether the search's metric decides; elsewhere it has no say."""
        return self.importance == "metric"


def check_settings(name: StrategyName, block_kinds: BlockKinds, metric: MetricName) -> None:
    """Refuse settings that a strategy would not heed.

    Raises:
        ConfigurationError: naming the setting.
    """
    strategy = STRATEGIES[name]
    if strategy.whole_layers and block_kinds != "both":
        raise ConfigurationError(
            f"block_kinds is {block_kinds!r}, and strategy {name} removes whole layers; leave block_kinds out, or take "
            "another strategy"
        )
    if not strategy.uses_metric and metric != "perplexity":
        raise ConfigurationError(
            f"metric is {metric!r}, and strategy {name} has an importance of its own; leave metric out, or take "
            f"strategy {' or '.join(each.name for each in STRATEGIES.values() if each.uses_metric)}"
        )


_BLOCKPRUNER = "Zhong et al., BlockPruner, Findings of ACL 2025, doi 10.18653/v1/2025.findings-acl.262"

STRATEGIES: dict[StrategyName, Strategy] = {
    strategy.name: strategy
    for strategy in (
        Strategy("blockpruner", "greedy", "metric", _BLOCKPRUNER),
        Strategy("oneshot", "ordered", "metric", f"{_BLOCKPRUNER}, ablation without search"),
        Strategy("layers", "greedy", "metric", "Song et al., SLEB, ICML 2024, arXiv 2402.09025", whole_layers=True),
        Strategy(
            "shortgpt", "ordered", "block_influence", "Men et al., ShortGPT, 2024, arXiv 2403.03853", whole_layers=True
        ),
        Strategy(
            "rm",
            "ordered",
            "relative_magnitude",
            "Samragh et al., Weight subcloning, 2023, arXiv 2312.09299, as ShortGPT compares with it",
            whole_layers=True,
        ),
        Strategy("laco", "collapse", "dissimilarity", "Yang et al., LaCo, 2024, arXiv 2402.11187", whole_layers=True),
        Strategy("random", "ordered", "chance", "blocks drawn at random; what any method must beat"),
    )
}


class LacoSettings(BaseModel):
    """The hyperparameters of LaCo (Yang et al. 2024, Algorithm 1), by the paper's letters. Layers count from 0."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    layers_per_merge: Annotated[int, Field(ge=2)] = 4
    """C: how many layers become one in a merge, at most."""
    first_layer: NonNegativeInt = 0
    """L: the lowest layer that others are merged into."""
    last_layer: PositiveInt | None = None
    """H: merging begins C layers below this one; None: the number of layers."""
    interval: PositiveInt = 2
    """I: so many layers lower is the next attempt after a merge."""
    threshold: Annotated[float, Field(ge=-1, lt=1)] = 0.65
    """T: a merge stays if the cosine similarity of the last hidden states with the dense model's is above this."""
