"""How long-running work reports where it stands. Plain data; who shows it, and how, is the caller's business."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Throughput:
    """How fast arithmetic goes, where somebody counts it."""

    tokens: int
    """Tokens scored, those of every candidate."""
    flops_per_s: float
    """Of matrix products."""
    mfu: float | None
    """Their share of what the device's matrix products reach at best, as measured; None where that is not known."""


@dataclass(frozen=True)
class Progress:
    """One report of a piece of work under way."""

    done: int
    """Units finished, counting those taken over from an earlier, interrupted try."""
    total: int | None
    """Units in all; None where that is not known yet."""
    unit: str
    """What is counted, in the plural: 'candidates', 'sequences', 'files'."""
    note: str = ""
    """A few words for people: the step of a search, the task of an evaluation."""
    resumed: int = 0
    """How many of `done` were taken over, so that a rate or an ETA counts only what was computed now."""
    throughput: Throughput | None = None


ProgressCallback = Callable[[Progress], None]


def silent(_: Progress) -> None:
    """A callback for callers that do not want to hear of progress."""
