"""What counts as a task's accuracy: one answer for the average, the table of a comparison and the report."""

from __future__ import annotations

import pytest

from flows.comparison import Pair, _accuracies
from flows.report.data import accuracies
from stages.accuracy import AVERAGE_TASK, primary
from stages.store_schema import EvaluationRow
from stages.task_scores import task_metrics

FILTERED = {
    "results": {
        "gsm": {"acc,strict": 0.5, "acc_stderr,strict": 0.1, "acc,flexible": 0.9, "acc_stderr,flexible": 0.2},
        "piqa": {"acc,none": 0.1, "acc_norm,first": 0.7, "acc_norm,second": 0.2},
        "story": {"word_perplexity,none": 9.0},
    },
    "n-shot": {"gsm": 0, "piqa": 0, "story": 0},
    "n-samples": {name: {"effective": 10} for name in ("gsm", "piqa", "story")},
}


def test_the_average_the_table_and_the_report_count_the_same_of_a_task_with_several_filters() -> None:
    metrics = task_metrics(FILTERED)
    rows = [EvaluationRow("r", "dense", m.task, m.metric, m.value, m.stderr, m.num_fewshot, 10) for m in metrics]
    assert (metrics[-1].task, metrics[-1].value) == (AVERAGE_TASK, pytest.approx(0.6))
    assert _accuracies(rows) == {"gsm": Pair(0.5, None), "piqa": Pair(0.7, None)}
    shown = [(each.task, each.metric, each.value) for each in accuracies(rows)]
    assert shown == [
        ("gsm", "acc,strict", 0.5),
        ("piqa", "acc_norm,first", 0.7),
        (AVERAGE_TASK, "", pytest.approx(0.6)),
    ]


def test_tasks_keep_their_order_whatever_their_metrics() -> None:
    metrics = task_metrics(FILTERED)
    assert list(primary(metrics)) == ["gsm", "piqa"]
    assert list(primary(metrics, ("word_perplexity", "acc"))) == ["gsm", "piqa", "story"]
    assert primary([]) == {}
