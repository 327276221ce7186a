"""One run's measurements as one table, dense beside pruned: for papers, for spreadsheets and for Prefect's server."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from flows.summary import RunSummary
from flows.table_formats import DataTable
from stages.accuracy import AVERAGE_TASK
from stages.store_schema import EvaluationRow

_COLUMNS = ("measured", "dense", "pruned", "dense standard error", "pruned standard error")
Row = tuple[Any, ...]


def results_table(summary: RunSummary) -> DataTable:
    """A row for the size, for every perplexity, every metric of every task and every speed; None: not measured.

    The columns of standard errors are there where there is one.
    """
    rows = [*_sizes(summary), *_perplexities(summary), *_metrics(summary), *_speeds(summary)]
    padded = [(*row, *[None] * (len(_COLUMNS) - len(row))) for row in rows]
    num_columns = len(_COLUMNS) if any(row[3:] != (None, None) for row in padded) else 3
    return DataTable(_COLUMNS[:num_columns], tuple(row[:num_columns] for row in padded))


def _sizes(summary: RunSummary) -> Iterator[Row]:
    record, export = summary.record, summary.export
    if record.num_blocks_total is not None and record.num_blocks_removed is not None:
        yield ("blocks", record.num_blocks_total, record.num_blocks_total - record.num_blocks_removed)
    if record.num_parameters is not None:
        yield ("parameters", record.num_parameters, export.num_parameters if export else None)


def _perplexities(summary: RunSummary) -> Iterator[Row]:
    for row in summary.texts:
        yield (f"perplexity on {row.text}", *(summary.perplexity(variant, row.text) for variant in ("dense", "pruned")))


def _metrics(summary: RunSummary) -> Iterator[Row]:
    found: dict[tuple[str, str], dict[str, EvaluationRow]] = {}
    for row in summary.rows.evaluations:
        found.setdefault((row.task, row.metric), {})[row.variant] = row
    averaged = len({task for task, _ in found} - {AVERAGE_TASK}) > 1
    for (task, metric), by_variant in found.items():
        if task == AVERAGE_TASK and not averaged:
            continue
        pair = [by_variant.get(variant) for variant in ("dense", "pruned")]
        yield (f"{task}, {metric}", *(row and row.value for row in pair), *(row and row.stderr for row in pair))


def _speeds(summary: RunSummary) -> Iterator[Row]:
    rows = {(row.variant, row.batch_size, row.prompt_tokens): row for row in summary.rows.speed}
    for batch, prompt in dict.fromkeys((batch, prompt) for _, batch, prompt in rows):
        pair = [rows.get((variant, batch, prompt)) for variant in ("dense", "pruned")]
        case = f"batch {batch}, prompt {prompt}"
        yield (f"prefill ms, {case}", *(row and row.prefill_ms for row in pair))
        yield (f"decode tokens/s, {case}", *(row and row.decode_tokens_per_s for row in pair))
        yield (f"peak memory bytes, {case}", *(row and row.peak_memory_bytes for row in pair))
