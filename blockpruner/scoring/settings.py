"""The choices that a user has in how scores are computed, as plain data. Imports nothing heavy."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, PositiveInt

MetricName = Literal["perplexity", "kl", "js"]
ScorerName = Literal["sweep", "plain"]
CompileChoice = Literal["auto", "on", "off"]


class ScorerSettings(BaseModel):
    """How to compute; none of it changes the scores beyond the last bits."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    scorer: ScorerName = "sweep"
    """All candidates in one sweep, or a full forward pass for each."""
    memory_budget: PositiveInt | None = None
    """Bytes of the device's memory that may be used in all, weights included; None: what is free."""
    compile: CompileChoice = "auto"
    """Whether parts of the model are compiled; 'auto' where it saves more time than it takes."""
