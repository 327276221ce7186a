"""Perplexity against the share of parameters removed: as a search goes, and of the finished models on held-out text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from flows.paper_figures import PaperModel, paper_figures
from flows.report.data import ReportRun
from flows.report.picture import Figure, Picture, axis, base_layout, distinct, drawable, plain
from flows.report.theme import DASHES, Theme, again, symbol
from flows.table_formats import DataTable

CALIBRATION = "calibration"
_LINEAR_BELOW, _FINE_BELOW, _POWERS_ABOVE = 4.0, 20.0, 1000.0
"""The highest perplexity over the lowest: from where on the axis is logarithmic, has few ticks, powers of ten only."""


@dataclass(frozen=True)
class Point:
    """One model, dense or pruned."""

    ratio: float
    """Share of all parameters removed."""
    perplexity: float
    note: str


@dataclass(frozen=True)
class Curve:
    """What one run, or several that differ in their ratio alone, or the paper, gives."""

    label: str
    points: tuple[Point, ...]
    index: int = 0
    """The number of the run that it is drawn for: its colour is that run's in every picture."""
    is_published: bool = False


def search_curves(runs: Sequence[ReportRun]) -> Picture | None:
    """Perplexity on the calibration set after every removal; of runs that share a search, as far as any went."""
    groups: dict[object, list[ReportRun]] = {}
    for run in runs:
        groups.setdefault(run.summary.rows.runs[0].search_family or run.record.run_id, []).append(run)
    labels = _labels(list(groups.values()))
    curves = [
        curve for each in zip(groups.values(), labels, strict=True) if (curve := _search_curve(*each)) is not None
    ]
    if not curves:
        return None
    return Picture(
        name="perplexity-search",
        title="Perplexity as blocks go",
        caption="On the calibration set, after every removal of the search. Lower is better.",
        draw=lambda theme: _draw(curves, theme),
        table=_table(curves),
    )


def held_out_curves(runs: Sequence[ReportRun], papers: Sequence[PaperModel]) -> list[Picture]:
    """Perplexity on each evaluation text, dense and pruned, with the paper's where it measured that text."""
    pictures = []
    for number, text in enumerate(_texts(runs), 1):
        curves = _text_curves(runs, text)
        published = list(_published(papers)) if text == paper_figures().text else []
        words = " Diamonds are the paper's own figures." if published else ""
        pictures.append(
            Picture(
                name=f"perplexity-text-{number}",
                title=f"Perplexity on {text}",
                caption=f"Of the dense model (nothing removed) and of the exported one, on text that took no part in "
                f"the search. Lower is better.{words}",
                draw=lambda theme, drawn=[*curves, *published]: _draw(drawn, theme),  # type: ignore[misc]
                table=_table([*curves, *published]),
            )
        )
    return pictures


def _search_curve(members: Sequence[ReportRun], label: str) -> Curve | None:
    run = max(members, key=lambda member: len(member.summary.rows.search_steps))
    steps, dense = run.summary.rows.search_steps, run.summary.perplexity("dense")
    if not steps:
        return None
    start = [Point(0.0, dense, "dense")] if dense is not None else []
    removals = [Point(s.ratio, s.perplexity, f"step {s.step}: {s.block_kind} {s.layer_index}") for s in steps]
    return Curve(label, (*start, *removals), members[0].index)


def _texts(runs: Sequence[ReportRun]) -> list[str]:
    found = (row.text for run in runs for row in run.summary.rows.perplexities if row.text != CALIBRATION)
    return list(dict.fromkeys(found))


def _text_curves(runs: Sequence[ReportRun], text: str) -> list[Curve]:
    """A curve for each method on each model; runs that differ in their ratio alone are points of one.

    Draws are searches of their own, and so are several settings of one method: a line between them would mean nothing.
    """
    groups: dict[object, list[ReportRun]] = {}
    for run in runs:
        if run.summary.perplexity("dense", text) is not None or run.summary.perplexity("pruned", text) is not None:
            groups.setdefault(_method(run), []).append(run)
    labels = _labels(list(groups.values()))
    return [
        Curve(label, _text_points(group, text), group[0].index)
        for group, label in zip(groups.values(), labels, strict=True)
    ]


def _text_points(members: Sequence[ReportRun], text: str) -> tuple[Point, ...]:
    dense = next((v for run in members if (v := run.summary.perplexity("dense", text)) is not None), None)
    start = [Point(0.0, dense, "dense")] if dense is not None else []
    pruned = [
        Point(run.summary.ratio, value, run.label)
        for run in members
        if run.summary.ratio is not None and (value := run.summary.perplexity("pruned", text)) is not None
    ]
    return (*start, *sorted(pruned, key=lambda point: point.ratio))


def _method(run: ReportRun) -> object:
    record = run.record
    if record.strategy is None:
        return record.run_id
    searched = (record.strategy, record.metric, record.block_kinds, run.settings)
    return (run.model_key, record.sequence_length, *searched, record.calibration, record.num_samples, record.seed)


def _labels(groups: Sequence[Sequence[ReportRun]]) -> list[str]:
    """A run that is alone in its group goes by its own name; several go by what they share."""
    several_models = len({run.model_key for group in groups for run in group}) > 1
    return [group[0].label if len(group) == 1 else _method_name(group, several_models) for group in groups]


def _method_name(members: Sequence[ReportRun], several_models: bool) -> str:
    record = members[0].record
    kinds = record.block_kinds if record.block_kinds != "both" else None
    metric = record.metric if record.metric in ("kl", "js") else None
    model = members[0].model if several_models else None
    return ", ".join(filter(None, (model, record.strategy, kinds, metric, members[0].settings))) or members[0].label


def _published(papers: Sequence[PaperModel]) -> Iterator[Curve]:
    for paper in papers:
        dense = [Point(0.0, paper.dense.perplexity, "dense")] if paper.dense.perplexity else []
        rows = [row for row in paper.results if row.ratio is not None and row.perplexity is not None]
        pruned = [Point(row.ratio or 0.0, row.perplexity or 0.0, row.strategy) for row in rows]
        yield Curve(f"paper: {paper.name}", (*dense, *pruned), is_published=True)


def _draw(curves: Sequence[Curve], theme: Theme) -> Figure:
    last = max((point.ratio for curve in curves for point in curve.points), default=0.0) or 1.0
    ratios = {"tickformat": ".0%", "range": [-0.03 * last, 1.05 * last], "zeroline": False}
    labels = distinct(curve.label for curve in curves)
    return {
        "data": [_trace(curve, labels[curve.label], theme) for curve in curves],
        "layout": base_layout(
            theme,
            380,
            legend=[labels[curve.label] for curve in curves],
            xaxis=axis(theme, "parameters removed", **ratios),
            yaxis=_perplexity_axis(curves, theme),
        ),
    }


def _trace(curve: Curve, name: str, theme: Theme) -> dict[str, Any]:
    index = curve.index
    color = theme.muted if curve.is_published else theme.series_color(index)
    sign = "diamond-open" if curve.is_published else symbol(index)
    return {
        "type": "scatter",
        "mode": "markers" if curve.is_published else "lines+markers",
        "name": name,
        "x": [point.ratio for point in curve.points],
        "y": [drawable(point.perplexity) for point in curve.points],
        "text": [plain(point.note) for point in curve.points],
        "line": {"color": color, "width": 2, "dash": DASHES[again(index) % len(DASHES)]},
        "marker": {"color": color, "size": 12 if curve.is_published else 8, "symbol": sign, "line": {"color": color}},
        "cliponaxis": False,
        "hovertemplate": "%{text}<br>perplexity %{y:.4g}, %{x:.2%} removed<extra></extra>",
    }


def _perplexity_axis(curves: Sequence[Curve], theme: Theme) -> dict[str, Any]:
    """Logarithmic, but where the values lie so close that it would have no ticks."""
    drawn = [drawable(point.perplexity) for curve in curves for point in curve.points]
    values = [value for value in drawn if value]
    span = max(values) / min(values) if values else 1.0
    if span < _LINEAR_BELOW:
        return axis(theme, "perplexity", nticks=7)
    ticks = [
        digit * 10.0**power
        for power in range(math.floor(math.log10(min(values))), math.ceil(math.log10(max(values))) + 1)
        for digit in ((1,) if span > _POWERS_ABOVE else (1, 2, 5) if span > _FINE_BELOW else (1, 1.5, 2, 3, 5, 7))
    ]
    return axis(theme, "perplexity", type="log", tickvals=ticks, ticktext=[f"{tick:,.4g}" for tick in ticks])


def _table(curves: Sequence[Curve]) -> DataTable:
    rows = [(curve.label, point.note, point.ratio, point.perplexity) for curve in curves for point in curve.points]
    return DataTable(("series", "model", "parameters removed", "perplexity"), tuple(rows))
