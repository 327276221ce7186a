"""A comparison's rows as tables: with every number for programs, as in papers, and for the terminal."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from flows.comparison import Pair, Published, Row, as_json
from flows.grid import DENSE, Comparison
from flows.paper_figures import paper_figures
from flows.summary import dump_json
from flows.table_formats import DataTable, TableFormat, formatted, in_markdown, shown
from flows.wording import count, one_line, spell_out

_ASKED = ("model", "strategy", "draw", "metric", "block kinds", "calibration", "rows", "seed", "settings", "target")
"""Columns of what was asked for: the terminal has the cells' labels for what differs, and the rest above the table."""

_WIDEST_WORD = 24
"""Characters of a cell's label that a narrow terminal does not break."""
_REMARKS = ("error", "note")
"""Columns of sentences, which the terminal has below the table."""
_OF_CELLS_ALONE: Sequence[str] = (
    *("strategy_seed", "metric", "block_kinds", "num_samples", "ratio_asked", "num_blocks_asked", "num_blocks_removed"),
    *("error", "note", "prefill_speedup", "decode_speedup", "search_seconds", "seconds", "run_id", "speed_run_id"),
)
"""What a dense model's line has nothing for."""


@dataclass(frozen=True)
class _Column:
    name: str
    value: Callable[[Row], Any]


def comparison_text(comparison: Comparison, rows: Sequence[Row], form: TableFormat, **more: Any) -> str:
    """The comparison in a form for programs and papers; `more` goes into JSON's object."""
    if form == "json":
        return dump_json({"comparison": comparison.name, **more, "rows": [as_json(row) for row in rows]})
    if form == "csv":
        return formatted(full_table(rows), form)
    mark, written = ("% ", one_line) if form == "latex" else ("", in_markdown)
    notes = [f"{mark}{written(note)}" for note in _paper_notes(rows)]
    return "\n\n".join([formatted(people_table(rows), form), *notes])


def full_table(rows: Sequence[Row]) -> DataTable:
    """Every number, a line a cell."""
    first = ("label", "model", "strategy", "strategy_seed", "metric", "block_kinds", "calibration", "num_samples")
    reached = ("ratio_asked", "num_blocks_asked", "ratio", "num_blocks_removed")
    last = ("prefill_speedup", "decode_speedup", "search_seconds", "seconds", "status", "error", "note")
    columns = [_Column(name, _getter(name)) for name in (*first, "seed")]
    columns += [_Column("settings", _settings), *(_Column(name, _getter(name)) for name in reached)]
    columns += [
        _Column(f"perplexity_{variant}_{text}", _pair_getter("perplexities", text, variant))
        for text in _keys(rows, "perplexities")
        for variant in ("dense", "pruned")
    ]
    columns += [
        _Column(f"accuracy_{variant}_{task}", _pair_getter("accuracies", task, variant))
        for task in _keys(rows, "accuracies")
        for variant in ("dense", "pruned")
    ]
    columns += [_Column(f"average_{variant}", _average_getter(variant)) for variant in ("dense", "pruned")]
    columns += [_Column(name, _getter(name)) for name in ("retained", *last)]
    columns += [
        _Column("paper_ratio", _of_paper(lambda paper: paper.ratio)),
        _Column("paper_perplexity_dense", _of_paper(lambda paper: paper.perplexity.dense)),
        _Column("paper_perplexity_pruned", _of_paper(lambda paper: paper.perplexity.pruned)),
        _Column("paper_average_dense", _of_paper(lambda paper: paper.average.dense)),
        _Column("paper_average_pruned", _of_paper(lambda paper: paper.average.pruned)),
        _Column("not_as_in_paper", lambda row: "; ".join(row.not_as_in_paper) or None),
        *(_Column(name, _getter(name)) for name in ("run_id", "speed_run_id")),
    ]
    return _table(columns, rows)


def people_table(rows: Sequence[Row]) -> DataTable:
    """As people and papers want it: a line for each dense model, then its cells."""
    return _table(_people_columns(rows), _with_dense(rows))


def comparison_view(comparison: Comparison, rows: Sequence[Row]) -> RenderableType:
    """For the terminal: what all cells share above the table, which has the rest."""
    shared = _shared(rows)
    heading = ", ".join(f"{name} {shown(value)}" for name, value in shared.items() if value is not None)
    parts: list[RenderableType] = [Text(one_line(comparison.name), style="bold")]
    parts += [Text(one_line(text), style="dim") for text in (comparison.description, heading) if text]
    parts += [Text(), _terminal_table(rows, has_target="target" not in shared)]
    remarks = [f"{row.label}: {text}" for row in rows for text in (row.error, row.note) if text]
    if remarks:
        parts += [Text(), *(Text(one_line(text), style="red") for text in remarks)]
    if notes := _paper_notes(rows):
        parts += [Text(), *(Text(one_line(note), style="dim") for note in notes)]
    return Group(*parts)


def _terminal_table(rows: Sequence[Row], *, has_target: bool) -> Table:
    """A cell goes by its label, which has what it does not share with the others."""
    left_out = {*_ASKED, *_REMARKS} - ({"target"} if has_target else set())
    if all(row.status == "completed" for row in rows):
        left_out.add("status")
    cell, lines = _Column("cell", _cell(rows)), _with_dense(rows)
    columns = [cell, *(column for column in _people_columns(rows) if column.name not in left_out)]
    longest = max((len(word) for row in lines for word in cell.value(row).split()), default=0)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(
            column.name,
            justify="left" if column.name in ("cell", "target", "status") else "right",
            overflow="fold",
            min_width=min(_WIDEST_WORD, longest) if column is cell else None,
        )
    for row in lines:
        style = "dim" if row.status == DENSE else "red" if row.error else None
        table.add_row(*(Text(_in_terminal(column.value(row))) for column in columns), style=style)
    return table


def _paper_notes(rows: Sequence[Row]) -> list[str]:
    """Where the paper's figures are from, and why which rows have none."""
    notes = [f"paper: {paper_figures().source}"] if any(row.published for row in rows) else []
    labels_of, reasons = dict[str, list[str]](), dict[str, list[str]]()
    for row in rows:
        for difference in row.not_as_in_paper:
            labels_of.setdefault(difference, []).append(row.label)
    for difference, labels in labels_of.items():
        whose = "every row" if len(labels) == len(rows) else ", ".join(labels)
        reasons.setdefault(whose, []).append(difference)
    return notes + [f"the paper's figures are left out of {whose}: {'; '.join(why)}" for whose, why in reasons.items()]


def standing(rows: Sequence[Row]) -> str | None:
    """What failed, in one line; None if nothing did."""
    failed = sum(row.error is not None for row in rows)
    if not failed:
        return None
    return f"{failed} of {count(len(rows), 'cell')} failed; give the same command again to try them again"


def _people_columns(rows: Sequence[Row]) -> list[_Column]:
    columns = [
        _Column("model", lambda row: row.model),
        _Column("strategy", lambda row: row.strategy),
        *(
            [_Column("draw", lambda row: row.strategy_seed)]
            if any(row.strategy_seed is not None for row in rows)
            else []
        ),
        _Column("metric", lambda row: row.metric),
        _Column("block kinds", lambda row: row.block_kinds),
        _Column("calibration", lambda row: row.calibration),
        _Column("rows", lambda row: "all" if row.num_samples is None and row.status != DENSE else row.num_samples),
        _Column("seed", lambda row: row.seed if row.status != DENSE else None),
        *([_Column("settings", _settings)] if any(row.settings for row in rows) else []),
        _Column("target", _target),
        _Column("removed", lambda row: _percent(row.ratio)),
        _Column("blocks", lambda row: row.num_blocks_removed),
    ]
    texts, tasks = _keys(rows, "perplexities"), _keys(rows, "accuracies")
    columns += [_Column(f"PPL {text}", _pair_getter("perplexities", text, "pruned")) for text in texts]
    columns += [_Column(task, _percent_of(_pair_getter("accuracies", task, "pruned"))) for task in tasks]
    if tasks:
        if len(tasks) > 1:
            columns.append(_Column("average", lambda row: _percent(row.average.pruned)))
        columns.append(_Column("retained", lambda row: _percent(row.retained)))
    if any(row.prefill_speedup is not None for row in rows):
        columns.append(_Column("prefill", lambda row: _times(row.prefill_speedup)))
        columns.append(_Column("decode", lambda row: _times(row.decode_speedup)))
    if any(row.published for row in rows):
        columns.append(_Column("paper removed", _of_paper(lambda paper: _percent(paper.ratio))))
    if any(row.published and row.published.perplexity.pruned is not None for row in rows):
        columns.append(_Column("paper PPL", _of_paper(lambda paper: paper.perplexity.pruned)))
    if any(row.published and row.published.average.pruned is not None for row in rows):
        columns.append(_Column("paper average", _of_paper(lambda paper: _percent(paper.average.pruned))))
    columns.append(_Column("search", lambda row: None if row.search_seconds is None else spell_out(row.search_seconds)))
    columns.append(_Column("time", lambda row: None if row.seconds is None else spell_out(row.seconds)))
    columns.append(_Column("status", lambda row: row.status))
    return columns + [_Column(name, _getter(name)) for name in _REMARKS if any(getattr(row, name) for row in rows)]


def _with_dense(rows: Sequence[Row]) -> list[Row]:
    """The rows with one for each dense model before the first of its own."""
    lines = list[Row]()
    for model in dict.fromkeys(row.model for row in rows):
        own = [row for row in rows if row.model == model]
        measured = next((row for row in own if any(pair.dense is not None for pair in row.perplexities.values())), None)
        if measured is not None:
            lines.append(_dense_row(measured, next((row for row in own if row.published), measured)))
        lines += own
    return lines


def _dense_row(row: Row, with_paper: Row) -> Row:
    """The dense model's line, from what a cell says of it."""

    def dense(pairs: Any) -> dict[str, Pair]:
        return {name: Pair(pair.dense, pair.dense) for name, pair in pairs.items()}

    nothing: dict[str, Any] = dict.fromkeys(_OF_CELLS_ALONE)
    return replace(
        row,
        label=DENSE,
        strategy=DENSE,
        status=DENSE,
        calibration="",
        settings={},
        ratio=0.0,
        perplexities=dense(row.perplexities),
        accuracies=dense(row.accuracies),
        average=Pair(row.average.dense, row.average.dense),
        published=_dense_published(with_paper.published),
        **nothing,
    )


def _dense_published(found: Published | None) -> Published | None:
    if found is None:
        return None
    perplexity, average = found.perplexity.dense, found.average.dense
    return replace(found, ratio=0.0, perplexity=Pair(perplexity, perplexity), average=Pair(average, average))


def _cell(rows: Sequence[Row]) -> Callable[[Row], str]:
    """A row's name, for which several dense models need their own."""
    several = len({row.model for row in rows}) > 1
    return lambda row: f"{row.model} {row.label}" if several and row.status == DENSE else row.label


def _shared(rows: Sequence[Row]) -> dict[str, Any]:
    """What was asked of every cell alike, by column."""
    columns = {column.name: column for column in _people_columns(rows) if column.name in _ASKED}
    searched = [row for row in rows if row.metric is not None] or list(rows)
    found = {name: {column.value(row) for row in searched} for name, column in columns.items()}
    return {name: next(iter(values)) for name, values in found.items() if len(values) == 1}


def _table(columns: Sequence[_Column], rows: Sequence[Row]) -> DataTable:
    lines = tuple(tuple(column.value(row) for column in columns) for row in rows)
    return DataTable(tuple(column.name for column in columns), lines)


def _keys(rows: Sequence[Row], name: str) -> list[str]:
    """The texts or tasks of all rows, in order."""
    return list(dict.fromkeys(key for row in rows for key in getattr(row, name)))


def _getter(name: str) -> Callable[[Row], Any]:
    return lambda row: getattr(row, name)


def _pair_getter(name: str, key: str, variant: str) -> Callable[[Row], Any]:
    return lambda row: getattr(getattr(row, name).get(key, Pair()), variant)


def _of_paper(value: Callable[[Published], Any]) -> Callable[[Row], Any]:
    return lambda row: value(row.published) if row.published else None


def _average_getter(variant: str) -> Callable[[Row], Any]:
    return lambda row: getattr(row.average, variant)


def _in_terminal(value: Any) -> str:
    """As elsewhere, but with the zeros at the end of a number, so that those of a column stand below each other."""
    is_small = isinstance(value, float) and math.isfinite(value) and abs(value) < 999.95
    return f"{value:#.4g}" if is_small else shown(value)


def _target(row: Row) -> str | None:
    if row.num_blocks_asked is not None:
        return count(row.num_blocks_asked, "block")
    return None if row.ratio_asked is None else f"{100 * row.ratio_asked:.4g}%"


def _settings(row: Row) -> str | None:
    """LaCo's under their own names, for the row names the strategy."""
    return ", ".join(f"{name.removeprefix('laco_')}={value}" for name, value in row.settings.items()) or None


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{100 * share:.2f}%"


def _percent_of(getter: Callable[[Row], float | None]) -> Callable[[Row], str | None]:
    return lambda row: _percent(getter(row))


def _times(speedup: float | None) -> str | None:
    return None if speedup is None else f"{speedup:.2f}x"
