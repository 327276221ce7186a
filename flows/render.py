"""Runs and query results for people and for programs: tables, the strip of blocks. Computes nothing."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from typing import Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult  # noqa: TID251
from rich.table import Table
from rich.text import Text

from flows.summary import RunSummary
from flows.table_formats import DataTable
from flows.terminal import Terminal
from flows.wording import count, one_line, printable, size, spell_out
from stages.accuracy import AVERAGE_TASK
from stages.runs import RunRecord
from stages.store_schema import EvaluationRow, ExportRow, SpeedRow, StepRow

KEPT, DROPPED = "■", "·"
BARS = "▁▂▃▄▅▆▇█"
_FLAT = 1e-9
"""Logarithms that lie closer than this are drawn as equal."""
_KINDS = ("mha", "mlp")
_WITHOUT_END = 1_000_000
"""Characters on a line that is never broken."""
_GAP = 2
"""Columns of the terminal between two columns of a table."""
_NARROW = 22
"""To no fewer columns of the terminal is a query's column cut: the id of a run stays whole."""
_LEFT_OUT = "…"


def on_stdout() -> Terminal:
    """The console for results. A file or a pipe has no width: there, lines are as long as they need."""
    return Terminal(sys.stdout, width=None if sys.stdout.isatty() else _WITHOUT_END)


def strip(num_layers: int, removed: Iterable[StepRow]) -> Text:
    """The network as a strip: a column a layer, attention above feed-forward, what is gone as a dot."""
    gone = {(step.block_kind, step.layer_index) for step in removed}
    lines = [Text("layer " + "".join(f"{index:<5}" for index in range(0, num_layers, 5)).rstrip(), style="dim")]
    for kind in _KINDS:
        line = Text(f"{kind:<6}")
        for index in range(num_layers):
            dropped = (kind, index) in gone
            line.append(DROPPED if dropped else KEPT, style="red" if dropped else "green")
        lines.append(line)
    return Text("\n").join(lines)


def sparkline(values: Sequence[float]) -> str:
    """The values as a row of bars, the lowest and the highest as far apart as it goes, on a logarithmic scale."""
    logs = [math.log(value) for value in values if math.isfinite(value) and value > 0]
    low, span = (min(logs), max(logs) - min(logs)) if logs else (0.0, 0.0)
    return "".join(_bar(value, low, span) for value in values)


def _bar(value: float, low: float, span: float) -> str:
    if not math.isfinite(value) or value <= 0:
        return "?" if math.isnan(value) else "∞"
    return BARS[round((math.log(value) - low) / span * (len(BARS) - 1)) if span > _FLAT else 0]


def perplexity_line(summary: RunSummary) -> Text:
    """Perplexity on the calibration set from the dense model to the last block that went, as a sparkline."""
    dense = summary.perplexity("dense")
    values = [*([dense] if dense is not None else []), *(step.perplexity for step in summary.removed)]
    line = Text("ppl   ")
    line.append(sparkline(values), style="cyan")
    return line.append(f"  {number(values[0])} -> {number(values[-1])} on the calibration set", style="dim")


def order_line(steps: Iterable[StepRow]) -> str:
    """The pruning order in one line: 'mha:7 mlp:3 ...'."""
    return " ".join(f"{step.block_kind}:{step.layer_index}" for step in steps)


def run_view(summary: RunSummary) -> RenderableType:
    """Everything about one run."""
    record = summary.record
    parts: list[RenderableType] = [_headline(record)]
    if summary.rows.search_steps and record.num_layers:
        parts += [strip(record.num_layers, summary.removed), perplexity_line(summary), _steps_table(summary)]
    if summary.rows.perplexities:
        parts.append(perplexity_table(summary))
    if summary.rows.evaluations:
        parts.append(task_table(summary.rows.evaluations))
    if summary.samples:
        parts.append(Text("\n").join(_cell(f"answers, {name}: {path}") for name, path in summary.samples.items()))
    if summary.export:
        parts.append(_export_lines(summary))
    if summary.rows.speed:
        parts += [speed_sizes(summary.rows.speed), speed_table(summary.rows.speed)]
    parts.append(_stages_table(record))
    spaced = [element for part in parts for element in (part, Text())]
    return Group(*spaced[:-1])


def runs_table(records: Sequence[RunRecord]) -> Table:
    """One line a run, newest first."""
    table = _table("run", "name", "status", "created", "model", "removed", "stages", "error")
    table.columns[0].no_wrap = True  # it is there to be copied
    for record in records:
        done = sum(stage.status == "completed" for stage in record.stages)
        table.add_row(
            record.run_id,
            _cell(one_line(record.name or "")),
            _status(record.status),
            _when(record.created_at),
            _cell(record.model),
            _removed(record),
            f"{done} of {len(record.stages)}",
            _cell(record.error),
        )
    return table


def perplexity_table(summary: RunSummary) -> Table:
    """Perplexity on every text, dense and pruned."""
    table = _table("perplexity on", "tokens", "dense", "pruned", "times", title=None)
    for row in summary.texts:
        dense, pruned = summary.perplexity("dense", row.text), summary.perplexity("pruned", row.text)
        times = "" if dense is None or pruned is None else f"{pruned / dense:.2f}"
        tokens = "" if row.num_tokens is None else f"{row.num_tokens:,}"
        table.add_row(_cell(row.text), tokens, number(dense), number(pruned), times)
    return table


def task_table(evaluations: Sequence[EvaluationRow]) -> Table:
    """Every metric of every task, dense and pruned, with its standard error; of several tasks the average as well."""
    table = _table("task", "metric", "dense", "pruned", "questions")
    by_variant = {(row.variant, row.task, row.metric): row for row in evaluations}
    averaged = len({row.task for row in evaluations} - {AVERAGE_TASK}) > 1
    for task, metric in dict.fromkeys(
        (row.task, row.metric) for row in evaluations if averaged or row.task != AVERAGE_TASK
    ):
        pair = [by_variant.get((variant, task, metric)) for variant in ("dense", "pruned")]
        questions = next((str(row.num_examples) for row in pair if row and row.num_examples is not None), "")
        table.add_row(_cell(task), metric, *(_with_error(row) for row in pair), questions)
    return table


def speed_sizes(rows: Sequence[SpeedRow]) -> Text:
    """What of the two models does not depend on batch and prompt, in one line."""
    sizes = {row.variant: row for row in rows}
    pair = [sizes[variant] for variant in ("dense", "pruned") if variant in sizes]
    numbers = " -> ".join("?" if row.num_parameters is None else f"{row.num_parameters:,}" for row in pair)
    weights = " -> ".join("?" if row.weight_bytes is None else size(row.weight_bytes) for row in pair)
    return Text(f"dense -> pruned: {numbers} parameters, weights of {weights} on disk")


def speed_table(rows: Sequence[SpeedRow]) -> Table:
    """Dense and pruned side by side: speeds as measured, and how many times the dense model's."""
    table = _table("batch", "prompt", "prefill ms", "times", "decode tokens/s", "times", "memory", "cache B/token")
    dense = {(row.batch_size, row.prompt_tokens): row for row in rows if row.variant == "dense"}
    for row in rows:
        before = dense.get((row.batch_size, row.prompt_tokens))
        if row.variant != "pruned" or before is None:
            continue
        table.add_row(
            str(row.batch_size),
            str(row.prompt_tokens),
            f"{before.prefill_ms:.4g} -> {row.prefill_ms:.4g}",
            f"{before.prefill_ms / row.prefill_ms:.2f}",
            f"{before.decode_tokens_per_s:.4g} -> {row.decode_tokens_per_s:.4g}",
            f"{row.decode_tokens_per_s / before.decode_tokens_per_s:.2f}",
            " -> ".join("?" if b is None else size(b) for b in (before.peak_memory_bytes, row.peak_memory_bytes)),
            f"{before.kv_cache_bytes_per_token:.0f} -> {row.kv_cache_bytes_per_token:.0f}",
        )
    return table


def query_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Table:
    """A query's answer, with the digits that can be compared by eye; CSV and JSON have them all."""
    table = _table(*columns)
    for column, is_number in zip(
        table.columns, DataTable(tuple(columns), tuple(map(tuple, rows))).numeric, strict=True
    ):
        column.justify = "right" if is_number else "left"
    for row in rows:
        table.add_row(*map(_answered, row))
    return table


@dataclass(frozen=True)
class Answer:
    """A query's answer, on a terminal cut to its width; a file or a pipe has it all.

    Much as DuckDB's own shell does it: first long cells are cut, then columns in the middle are left out.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """See rich."""
        if not console.is_terminal:
            yield query_table(self.columns, self.rows)
            return
        shown, widest = _fitting([self._width(index) for index in range(len(self.columns))], options.max_width)
        order = list(_with_gap(shown, len(self.columns)))
        names = [_LEFT_OUT if index is None else self.columns[index] for index in order]
        cut = [[_LEFT_OUT if index is None else row[index] for index in order] for row in self.rows]
        table = query_table(names, cut)
        for column in table.columns:
            column.max_width, column.no_wrap, column.overflow = widest, True, "ellipsis"
        yield table
        if len(shown) < len(self.columns):
            left_out = f"{len(self.columns)} columns, {len(shown)} shown; --csv and --json give them all"
            yield Text(left_out, style="dim")

    def _width(self, index: int) -> int:
        cells = (_answered(row[index]).plain for row in self.rows)
        return max(cell_len(line) for cell in (self.columns[index], *cells) for line in cell.splitlines() or [""])


def _fitting(widths: Sequence[int], room: int) -> tuple[list[int], int]:
    """Which columns of these widths have room, and how wide the widest may be."""
    shown = list(range(len(widths)))

    def fits(widest: int) -> bool:
        total = sum(min(widths[index], widest) + _GAP for index in shown) - _GAP
        return total + (len(_LEFT_OUT) + _GAP if len(shown) < len(widths) else 0) <= room

    for widest in range(min(room, max(widths)), _NARROW, -1):
        if fits(widest):
            return shown, widest
    while len(shown) > 1 and not fits(_NARROW):
        del shown[len(shown) // 2]
    return shown, _NARROW


def _with_gap(indices: Sequence[int], end: int) -> Iterator[int | None]:
    """The numbers, and None after one that is not followed by the next, up to the end."""
    for index, following in pairwise((*indices, end)):
        yield index
        if following != index + 1:
            yield None


def _answered(value: Any) -> Text:
    return _cell(f"{value:.6g}" if isinstance(value, float) else value)


def number(value: float | None) -> str:
    """A measured number with the digits that matter."""
    if value is None:
        return ""
    return f"{value:.4g}" if math.isfinite(value) and abs(value) < 1000 else f"{value:,.0f}"


def _headline(record: RunRecord) -> Table:
    table = Table.grid(padding=(0, 2))
    lines = {
        "run": f"{record.run_id}  {one_line(record.name or '')}".rstrip(),
        "status": record.status + (f": {record.error}" if record.error else ""),
        "model": record.model or "",
        "size": _size(record),
        "calibration": _calibration(record),
        "search": _search(record),
        "created": _when(record.created_at) + _took(record),
    }
    for name, value in lines.items():
        if value:
            table.add_row(Text(name, style="dim"), _cell(value))
    return table


def _size(record: RunRecord) -> str:
    if record.num_layers is None or record.num_parameters is None:
        return ""
    return f"{count(record.num_layers, 'layer')}, {record.num_parameters:,} parameters"


def _calibration(record: RunRecord) -> str:
    if record.calibration is None:
        return ""
    if record.num_sequences is None:
        return f"{record.calibration}, seed {record.seed}"
    sequences = f"{count(record.num_sequences, 'sequence')} of {record.sequence_length}"
    return f"{record.calibration}, {sequences}, seed {record.seed}"


def _search(record: RunRecord) -> str:
    if record.strategy is None:
        return ""
    if record.external is not None:
        return f"none here: {record.strategy} made {record.external}"
    return f"{record.strategy}, {record.metric}, blocks: {record.block_kinds}, {record.dtype} on {record.device}"


def _removed(record: RunRecord) -> str:
    return "" if record.num_blocks_removed is None else f"{record.num_blocks_removed} of {record.num_blocks_total}"


def _took(record: RunRecord) -> str:
    if record.finished_at is None:
        return ""
    return f", took {spell_out((record.finished_at - record.created_at).total_seconds())}"


def _steps_table(summary: RunSummary) -> Table:
    table = _table("step", "removed", "perplexity", "of all parameters", "time")
    num_removed = len(summary.removed)
    for row, step in enumerate(summary.rows.search_steps, start=1):
        style = None if row <= num_removed else "dim"
        block = f"{step.block_kind}:{step.layer_index}" + ("" if row <= num_removed else " (searched, kept)")
        table.add_row(
            str(step.step), block, number(step.perplexity), f"{step.ratio:.2%}", spell_out(step.seconds), style=style
        )
    return table


def _export_lines(summary: RunSummary) -> Text:
    return Text("\n".join(_export_text(summary, export) for export in summary.rows.exports))


def _export_text(summary: RunSummary, export: ExportRow) -> str:
    checked = f"verified with {export.verified_with}" if export.verified else "not verified"
    difference = "" if export.max_logit_difference is None else f", logits differ by {export.max_logit_difference:.1e}"
    only = len(summary.rows.exports) == 1
    return (
        f"exported model: {summary.export_path if only else export.path}\n"
        f"  {export.format} format, {export.num_parameters:,} parameters, {size(export.bytes)}, {checked}{difference}"
    )


def _stages_table(record: RunRecord) -> Table:
    table = _table("stage", "status", "time", "fingerprint", "error")
    for stage in record.stages:
        status = "cached" if stage.cached and stage.status == "completed" else stage.status
        table.add_row(
            _cell(stage.label),
            _status(status),
            spell_out(stage.seconds),
            (stage.fingerprint or "")[:12],
            _cell(stage.error),
        )
    return table


def _table(*columns: str, title: str | None = None) -> Table:
    table = Table(title=title, box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(_cell(column), overflow="fold")
    return table


def _status(status: str) -> Text:
    styles = {"completed": "green", "cached": "dim", "running": "cyan", "failed": "red", "crashed": "red"}
    return Text(status, style=styles.get(status, ""))


def _cell(value: object) -> Text:
    """Any value as plain text: what a user named is no markup, and steers no terminal."""
    return Text("" if value is None else printable(str(value)))


def _with_error(row: EvaluationRow | None) -> str:
    if row is None or row.value is None:
        return ""
    return number(row.value) + (f" ± {row.stderr:.3f}" if row.stderr is not None else "")


def _when(instant: datetime) -> str:
    return instant.astimezone().strftime("%Y-%m-%d %H:%M:%S")
