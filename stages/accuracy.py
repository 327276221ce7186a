"""Which of a task's metrics is its accuracy, for everything that shows or averages one. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol, TypeVar

AVERAGE_TASK = "average"
"""Under this name the average is listed among the tasks."""
AVERAGE_METRIC = "acc_norm or acc"
"""Its metric: no task's own, so that whoever selects a metric does not get the average among the tasks."""
ACCURACIES = ("acc_norm", "acc")
"""What is a task's accuracy, the first that it has: as in the paper, normalised by length where there is that."""


class Measured(Protocol):
    """One metric of one task."""

    @property
    def task(self) -> str:
        """The task's name."""
        ...

    @property
    def metric(self) -> str:
        """lm-eval's name, with the filter's behind a comma where there is one."""
        ...


M = TypeVar("M", bound=Measured)


def primary(metrics: Iterable[M], wanted: Sequence[str] = ACCURACIES) -> dict[str, M]:
    """By task, the first of `wanted` that it has, and of several filters the first. A task without any is not there."""
    found: dict[str, M] = {}
    for each in metrics:
        rank = _rank(each, wanted)
        if rank < len(wanted) and (each.task not in found or rank < _rank(found[each.task], wanted)):
            found[each.task] = each
    return found


def _rank(measured: Measured, wanted: Sequence[str]) -> int:
    name = measured.metric.partition(",")[0]
    return wanted.index(name) if name in wanted else len(wanted)
