"""A search's scorer on Ray: session, crew and spread scorer put together, for as long as they are needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor

from blockpruner.scoring.metrics import metric_of
from blockpruner.scoring.plan import SweepCut
from blockpruner.scoring.spread import SpreadScorer
from blockpruner.scoring.work import Meter
from stages.executor import ExecutorSettings
from stages.ray_crew import RayCrew, Share
from stages.ray_session import has_died, ray_session, workers_environment
from stages.search_scorer import ScoringJob


@contextmanager
def ray_scorer(
    job: ScoringJob,
    token_ids_BT: Tensor,
    settings: ExecutorSettings,
    cut_so_far: Callable[[str], SweepCut | None],
    keep_cut: Callable[[str, SweepCut], None],
) -> Iterator[SpreadScorer]:
    """A scorer of the calibration set [B, T] whose workers are there while the body runs.

    Args:
        job: what is scored, and how.
        token_ids_BT: the calibration set.
        settings: which workers.
        cut_so_far: the cut that the search was begun with, by the purpose that it was made for, if there is one.
        keep_cut: told of purpose and cut, now and when the cut has to shrink.

    Raises:
        ConfigurationError: if there are too few devices for the workers, or one has too little memory.
        ExecutorError: if Ray does not start, or no worker finds a place.
    """
    with ray_session(settings) as ray:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        share = Share.of(nodes, job.device, settings.workers)
        crew = RayCrew(ray, job, token_ids_BT, share, workers_environment(settings), lambda: has_died(ray))
        try:
            purpose, cut = crew.assemble(cut_so_far)
            keep_cut(purpose, cut)
            yield SpreadScorer(
                crew,
                len(token_ids_BT),
                job.num_layers,
                metric_of(job.metric),
                cut,
                Meter(peak=crew.peak),
                lambda smaller: keep_cut(purpose, smaller),
            )
        finally:
            crew.close()
