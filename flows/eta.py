"""How long a piece of work will take, from what was computed in this try alone. Shows nothing."""

from __future__ import annotations

import time
from collections.abc import Callable

from blockpruner.progress import Progress


class RemainingTime:
    """Estimates from the mean speed since the first report; what an earlier try left behind counts as no work."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Nothing is known before the second report."""
        self._clock = clock
        self._first: Progress | None = None
        self._started = 0.0

    def seconds(self, progress: Progress) -> float | None:
        """Seconds until the total is reached; None while that cannot be told."""
        now = self._clock()
        if self._first is None:
            self._first, self._started = progress, now
        computed = (progress.done - progress.resumed) - (self._first.done - self._first.resumed)
        if progress.total is None or computed <= 0:
            return None
        return max(0.0, (now - self._started) * (progress.total - progress.done) / computed)
