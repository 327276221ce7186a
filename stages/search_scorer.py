"""From what a search is about to the scorer that computes it, here: loads the model, asks the device, builds.

The search stage uses it in its own process; a Ray worker uses it in another, perhaps on another machine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from blockpruner.architectures import Architecture, architecture_of
from blockpruner.checkpoint import Checkpoint
from blockpruner.errors import ConfigurationError
from blockpruner.loading import DtypeName, load_model, torch_dtype
from blockpruner.scoring.build import build_scorer, is_streamed, made_for
from blockpruner.scoring.interface import SurveyScorer
from blockpruner.scoring.kernels import await_preparation, prepare
from blockpruner.scoring.metrics import metric_of
from blockpruner.scoring.plan import SweepCut, SweepPlan, Team
from blockpruner.scoring.settings import MetricName, ScorerSettings


@dataclass(frozen=True)
class ScoringJob:
    """What is scored, and how."""

    model: Checkpoint
    num_layers: int
    num_parameters: int
    dtype: DtypeName
    metric: MetricName
    device: str
    batch_size: int | None = None
    settings: ScorerSettings = field(default_factory=ScorerSettings)
    trust_remote_code: bool = False
    whole_layers: bool = False
    """Whether a candidate stands for its layer."""
    can_stream: bool = True
    """Whether a model that is too large for the device may lie on the host."""

    @property
    def purpose(self) -> str:
        """What a cut is made for, on this machine."""
        return made_for(self.device, self.settings, self.batch_size)

    def parts(
        self,
        token_ids_BT: Tensor,
        cut: SweepCut | None,
        on_plan: Callable[[SweepPlan], None] = lambda _: None,
        team: Team | None = None,
    ) -> tuple[SurveyScorer, Architecture, PreTrainedModel]:
        """Load the model and build a scorer of the calibration set [B, T] for it; see `build_scorer`.

        Raises:
            ConfigurationError: if the device has too little memory for the model and the scorer.
        """
        try:
            return self._built(token_ids_BT, cut, on_plan, team)
        except torch.OutOfMemoryError as error:
            raise ConfigurationError(
                "the device has too little memory for the model and the scorer; give a larger --memory-budget, or "
                "--scorer sweep, which fetches weights layer by layer where they do not fit"
            ) from error

    def _built(
        self, token_ids_BT: Tensor, cut: SweepCut | None, on_plan: Callable[[SweepPlan], None], team: Team | None
    ) -> tuple[SurveyScorer, Architecture, PreTrainedModel]:
        weight_bytes = self.num_parameters * torch_dtype(self.dtype).itemsize
        can_stream = self.can_stream and self.settings.scorer == "sweep"
        streamed = can_stream and is_streamed(weight_bytes, self.device, self.settings.memory_budget)
        if not self.trust_remote_code:  # such code may call modules while it loads, which `prepare` would disturb
            prepare(
                self.device,
                self.settings,
                self.metric,
                num_layers=self.num_layers,
                num_parameters=self.num_parameters,
                num_tokens=token_ids_BT.numel(),
            )
        try:
            model = load_model(
                self.model,
                device="cpu" if streamed else self.device,
                dtype=self.dtype,
                trust_remote_code=self.trust_remote_code,
            )
        except BaseException:
            await_preparation()  # whatever this process does next may call modules
            raise
        architecture = architecture_of(self.model.model_type).for_config(model.config)
        scorer = build_scorer(
            architecture,
            model,
            token_ids_BT,
            self.device,
            metric_of(self.metric),
            self.settings,
            self.batch_size,
            cut,
            on_plan,
            whole_layers=self.whole_layers,
            team=team,
        )
        return scorer, architecture, model
