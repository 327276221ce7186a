"""What runs in a Ray actor: a scorer of its own, which answers requests for micro-batches.

Says what is wrong in words, as plain data: an exception that crosses processes brings a page of traceback with it.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib.metadata import version

import torch
from torch import Tensor

from blockpruner.checkpoint import Checkpoint
from blockpruner.errors import BlockPrunerError
from blockpruner.loading import resolve_device
from blockpruner.scoring.build import device_memory
from blockpruner.scoring.micro_batches import BatchRequest, Refused, Reply, answer
from blockpruner.scoring.plan import SweepCut, Team
from blockpruner.scoring.sweep import SweepScorer
from stages.search_scorer import ScoringJob

_SOFTWARE = ("torch", "transformers")
"""Whose versions decide the last bits of a score."""


def software() -> tuple[str, ...]:
    """What computes here."""
    import blockpruner

    return (f"blockpruner {blockpruner.__version__}", *(f"{name} {version(name)}" for name in _SOFTWARE))


@dataclass(frozen=True)
class Introduction:
    """Where a worker has been placed, and what is there."""

    node: str
    purpose: str
    """What a cut is made for there."""
    software: tuple[str, ...]


@dataclass(frozen=True)
class Place:
    """What a worker has where it is."""

    team: Team
    num_threads: int | None
    """Of a CPU; None on a GPU."""
    is_elsewhere: bool
    """Whether it is on another machine than the one that searches, and must look for the model's files there."""


@dataclass(frozen=True)
class Prepared:
    """A worker is ready."""

    cut: SweepCut
    """What it can do."""
    peak: float | None
    """Operations a second of its device's matrix products, if measured."""


class RayWorker:
    """An actor: introduced, then prepared, then asked for micro-batches one at a time."""

    def __init__(self) -> None:
        self._scorer: SweepScorer | None = None
        self._lasting = ExitStack()

    def introduce(self, device: str, job: ScoringJob) -> Introduction | Refused:
        """Say where this is."""
        import ray

        try:
            resolve_device(device)
        except BlockPrunerError as error:
            return Refused(str(error))
        return Introduction(ray.get_runtime_context().get_node_id(), job.purpose, software())

    def prepare(self, job: ScoringJob, token_ids_BT: Tensor, cut: SweepCut | None, place: Place) -> Prepared | Refused:
        """Load the model and make a scorer with this cut (None: what fits)."""
        if place.num_threads is not None:  # what the user or Ray has set goes before, as it does in one process
            given = os.environ.get("OMP_NUM_THREADS", "")
            torch.set_num_threads(int(given) if given.isdecimal() and int(given) > 0 else place.num_threads)
        try:
            if place.is_elsewhere:
                job = replace(job, model=_found_here(job.model))
            self._lasting.enter_context(device_memory(job.device, job.settings.memory_budget))
            token_ids_BT = token_ids_BT.clone()  # what comes from Ray cannot be written to
            scorer, _, _ = job.parts(token_ids_BT, cut, team=place.team)
        except BlockPrunerError as error:
            return Refused(str(error))
        assert isinstance(scorer, SweepScorer)
        self._scorer = scorer
        return Prepared(scorer.plan.cut, scorer.meter.peak)

    def score(self, request: BatchRequest) -> Reply:
        """Compute a micro-batch."""
        assert self._scorer is not None
        return answer(self._scorer, request)


def _found_here(model: Checkpoint) -> Checkpoint:
    """The same model on this machine: in the same folder, or by its hub id.

    Raises:
        CheckpointError: if there is none.
        BlockPrunerError: if it is another.
    """
    here = Checkpoint.open(str(model.path) if model.path.is_dir() else model.name)
    if here.fingerprint != model.fingerprint:
        raise BlockPrunerError(f"{here.path} holds another model than on the machine that searches; copy it anew")
    return here
