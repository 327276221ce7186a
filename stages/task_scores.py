"""The numbers in what lm-eval returns: every metric of every task, and the average as in the paper's tables."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from statistics import fmean
from typing import Any

import numpy as np

from stages.accuracy import AVERAGE_METRIC, AVERAGE_TASK, primary
from stages.contract import StageManifest


class TaskMetric(StageManifest):
    """One number of one task."""

    task: str
    """A task, a group of them that has scores of its own, or AVERAGE_TASK."""
    metric: str
    """lm-eval's name: 'acc'; with the filter's name behind a comma where there is one: 'exact_match,strict-match'."""
    value: float
    stderr: float | None
    """Standard error; None where lm-eval gives none."""
    num_fewshot: int | None
    """Examples in the prompt; None for a group whose tasks differ."""
    num_examples: int
    """Examples that were scored."""


def task_metrics(results: Mapping[str, Any]) -> tuple[TaskMetric, ...]:
    """Every number in what lm-eval returned, by task and metric, in its order; the average last, if there is one."""
    metrics = tuple(
        TaskMetric(
            task=task,
            metric=_metric_name(key),
            value=float(value),
            stderr=_stderr(scores, key),
            num_fewshot=_num_fewshot(results, task),
            num_examples=_num_examples(results, task),
        )
        for task, scores in results["results"].items()
        for key, value in scores.items()
        if _is_metric(key, value)
    )
    return metrics + _average(metrics, results.get("group_subtasks", {}))


def _average(metrics: tuple[TaskMetric, ...], groups: Mapping[str, list[str]]) -> tuple[TaskMetric, ...]:
    """The mean of the tasks' accuracies, each normalised where the task has that (Zhong et al. 2025, Table 1).

    A group with a score of its own counts once, and so do the tasks of one that has none; what has no accuracy
    (perplexity, generated text) does not count. The standard error is that of a mean of independent estimates,
    sqrt(sum of squares) / number.
    """
    accuracies = primary(metrics)
    counted = [accuracies[name] for name in dict.fromkeys(_counted(accuracies, groups))]
    if not counted:
        return ()
    errors = [metric.stderr for metric in counted if metric.stderr is not None]
    shots = {metric.num_fewshot for metric in counted}
    average = TaskMetric(
        task=AVERAGE_TASK,
        metric=AVERAGE_METRIC,
        value=fmean(metric.value for metric in counted),
        stderr=math.hypot(*errors) / len(counted) if len(errors) == len(counted) else None,
        num_fewshot=shots.pop() if len(shots) == 1 else None,
        num_examples=sum(metric.num_examples for metric in counted),
    )
    return (average,)


def _counted(accuracies: Mapping[str, TaskMetric], groups: Mapping[str, list[str]]) -> Iterator[str]:
    """The names that count: whatever is in no group, and below a group without a score its members."""
    members = {child for children in groups.values() for child in children}

    def below(name: str) -> Iterator[str]:
        if name in accuracies:
            yield name
        else:
            for child in groups.get(name, ()):
                yield from below(child)

    for name in (*groups, *accuracies):
        if name not in members:
            yield from below(name)


def _is_metric(key: str, value: object) -> bool:
    """lm-eval writes 'metric,filter' and 'metric_stderr,filter' among the task's name, alias and size."""
    metric, comma, _ = key.partition(",")
    is_number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    return bool(comma) and not metric.endswith("_stderr") and is_number


def _metric_name(key: str) -> str:
    return key.removesuffix(",none")


def _stderr(scores: Mapping[str, Any], key: str) -> float | None:
    metric, _, filter_name = key.partition(",")
    value = scores.get(f"{metric}_stderr,{filter_name}")
    return None if value is None or isinstance(value, str) else float(value)


def _num_fewshot(results: Mapping[str, Any], task: str) -> int | None:
    value = results["n-shot"].get(task)
    return value if isinstance(value, int) else None


def _num_examples(results: Mapping[str, Any], task: str) -> int:
    counts = results["n-samples"].get(task)
    return int(counts["effective"] if counts else results["results"][task].get("sample_len", 0))
