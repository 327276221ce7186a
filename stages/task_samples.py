"""What a model answered to every question of lm-eval's tasks, as one Parquet file.

One row a question (and filter, where a task has several). lm-eval's nested fields are JSON text, its metrics are
columns, so that two models' answers are compared by a join on `task` and `doc_id`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

_NESTED = {"doc": "doc", "target": "target", "arguments": "arguments", "resps": "responses"}
"""lm-eval's name of a field to ours: the question, its answer, what the model read, and what it said."""


def write_samples(samples: Mapping[str, list[dict[str, Any]]], path: Path) -> None:
    """Write lm-eval's samples.

    Columns: task, doc_id (position of the question in its file), filter; doc, target, arguments (a pair of context and
    continuation for every choice) and responses (for a choice: log-likelihood in nats, and whether it is the greedy
    continuation) as JSON text; and one column a metric, float64, null where a question has no single number for it.

    Args:
        samples: by task, as `simple_evaluate` returns them.
        path: the file to write.
    """
    rows = [(task, sample) for task, answered in samples.items() for sample in answered]
    columns: dict[str, pa.Array] = {
        "task": pa.array([task for task, _ in rows], pa.string()),
        "doc_id": pa.array([sample["doc_id"] for _, sample in rows], pa.int64()),
        "filter": pa.array([sample["filter"] for _, sample in rows], pa.string()),
    }
    for theirs, ours in _NESTED.items():
        columns[ours] = pa.array([_json(sample[theirs]) for _, sample in rows], pa.string())
    for metric in dict.fromkeys(name for _, sample in rows for name in sample["metrics"]):
        if metric not in columns:
            columns[metric] = pa.array([_number(sample.get(metric)) for _, sample in rows], pa.float64())
    pq.write_table(pa.table(columns), path, compression="zstd")


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=_plain)


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else str(value)


def _number(value: Any) -> float | None:
    is_number = isinstance(value, bool | int | float | np.bool_ | np.number)
    return float(value) if is_number else None
