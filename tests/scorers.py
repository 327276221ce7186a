"""Scorers of tiny models as tests want them: with the plan that a test asks for, and tables that are filled."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor
from transformers import PreTrainedModel

from blockpruner.architectures import Architecture, architecture_of
from blockpruner.blocks import Block
from blockpruner.scoring.build import build_scorer
from blockpruner.scoring.interface import Scorer
from blockpruner.scoring.metrics import metric_of
from blockpruner.scoring.plain import PlainScorer
from blockpruner.scoring.plan import SweepCut, SweepPlan, Team
from blockpruner.scoring.settings import MetricName, ScorerSettings
from blockpruner.scoring.sweep import SweepScorer
from blockpruner.scoring.table import ScoreTable


def row_of(model: PreTrainedModel) -> Architecture:
    """The model's row of the table."""
    return architecture_of(model.config.model_type).for_config(model.config)


def plain_scorer(model: PreTrainedModel, token_ids_BT: Tensor, metric: MetricName = "perplexity") -> PlainScorer:
    """The oracle."""
    return PlainScorer(row_of(model), model, token_ids_BT, 2, metric_of(metric))


def sweep_scorer(
    model: PreTrainedModel,
    token_ids_BT: Tensor,
    metric: MetricName = "perplexity",
    *,
    micro_batch: int = 2,
    branches_per_chunk: int = 3,
    logit_elements: int = 2**12,
    snapshot_bytes: int = 0,
    num_workers: int = 1,
    whole_layers: bool = False,
    on_plan: Callable[[SweepPlan], None] = lambda _: None,
) -> SweepScorer:
    """A sweep on the CPU with this plan."""
    cut = SweepCut(micro_batch=micro_batch, branches_per_chunk=branches_per_chunk, logit_elements=logit_elements)
    scorer = build_scorer(
        *(row_of(model), model, token_ids_BT, "cpu", metric_of(metric), ScorerSettings()),
        cut=cut,
        on_plan=on_plan,
        whole_layers=whole_layers,
        team=Team(num_workers),
    )
    assert isinstance(scorer, SweepScorer)
    scorer.use(SweepPlan(cut, snapshot_bytes))
    return scorer


def filled(scorer: Scorer, removed: Sequence[Block], candidates: Sequence[Block]) -> ScoreTable:
    """All scores of one step."""
    table = ScoreTable.empty(tuple(candidates), scorer.num_sequences)
    scorer.fill(tuple(removed), table, lambda _: None)
    return table
