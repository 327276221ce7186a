"""The blocks of the network: which went when, and what every one of them scored at every step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from flows.report.data import ReportRun
from flows.report.picture import Figure, Picture, axis, base_layout, distinct
from flows.report.theme import Theme
from flows.table_formats import DataTable
from stages.store_schema import ScoreRow, StepRow

KINDS = {"mha": "MHA (attention)", "mlp": "MLP (feed-forward)"}
_SMALLEST = 1e-12
"""What a divergence of nothing counts as on a logarithmic scale."""
_CLIPPED_SHARE = 0.9
"""Scores above this quantile share the last colour: the few blocks that nothing works without would hide the rest."""

HOW_TO_READ = (
    "In the maps of scores, from one removal to the next: pale blocks can go; dark ones (bright, on a dark page) carry "
    "the model. A ring marks the block that went; after it, its column is empty. The colour is the score over the "
    "lowest of its step, on a logarithmic scale; the highest tenth share the last colour."
)
_ABOVE, _BETWEEN, _BELOW = 80, 60, 50
_TIMES = "\u00d7"
_RUN, _BETWEEN_RUNS = 72, 34
"""Around and between the heat maps of the two kinds, and of the rows of two runs, in CSS pixels."""

Cells = list[list[float | None]]


def removal_map(runs: Sequence[ReportRun]) -> Picture | None:
    """Which blocks went, and at which step, a row of layers for each kind and run."""
    shown = [run for run in runs if run.summary.removed and run.record.num_layers]
    if not shown:
        return None
    rows = [
        (run.label, step.step, step.block_kind, step.layer_index, step.perplexity, step.ratio)
        for run in shown
        for step in run.summary.removed
    ]
    return Picture(
        name="removed-blocks",
        title="What was removed, and when",
        caption="One column a layer. The number is the step at which the block went; grey blocks are still there.",
        draw=lambda theme: _draw_removals(shown, theme),
        table=DataTable(("run", "step", "block", "layer", "perplexity after", "parameters removed"), tuple(rows)),
    )


_SCORE_IS = {
    "perplexity": "the perplexity of the model without the block",
    "kl": "the KL divergence in nats a token of the model without the block",
    "js": "the JS divergence in nats a token of the model without the block",
    "block_influence": "the Block Influence of the block's layer",
    "relative_magnitude": "the relative magnitude of the block's layer",
    "dissimilarity": "1 less the similarity of the last hidden states with the layers merged",
    "chance": "a number drawn at random",
}
"""In words, by a search's metric."""


def score_map(run: ReportRun, number: int) -> Picture | None:
    """The score of every block at every step of a run's search; `HOW_TO_READ` says how to read it."""
    scores = [row for row in run.summary.rows.block_scores if not math.isnan(row.score)]
    if not scores:
        return None
    metric = run.record.metric or "perplexity"
    return Picture(
        name=f"block-scores-{number}",
        title=f"Every block at every step: {run.label}",
        caption=f"The score is {_SCORE_IS.get(metric, metric)}.",
        draw=lambda theme: _draw_scores(scores, run.record.num_layers or 0, theme),
        table=_score_table(run.summary.rows.search_steps, scores),
    )


def _score_table(steps: Sequence[StepRow], scores: Sequence[ScoreRow]) -> DataTable:
    """What went at each step beside what came closest; all scores are in the database's table block_scores."""
    rows = []
    for step in steps:
        others = [row for row in scores if row.step == step.step and not row.chosen]
        second = min(others, key=lambda row: row.score, default=None)
        worst = max(others, key=lambda row: row.score, default=None)
        rows.append((step.step, _name(step), step.score, *_named(second), *_named(worst)))
    columns = ("step", "removed", "score", "second best", "its score", "most important", "its score ")
    return DataTable(columns, tuple(rows))


def _named(row: ScoreRow | None) -> tuple[str | None, float | None]:
    return (_name(row), row.score) if row is not None else (None, None)


def _name(row: ScoreRow | StepRow) -> str:
    return f"{row.block_kind}:{row.layer_index}"


def _draw_removals(runs: Sequence[ReportRun], theme: Theme) -> Figure:
    num_layers = max(run.record.num_layers or 0 for run in runs)
    inside = len(runs) * (_RUN + _BETWEEN_RUNS) - _BETWEEN_RUNS
    layout = base_layout(theme, inside + 40 + _BELOW, annotations=[])
    layout["margin"] |= {"t": 40, "b": _BELOW}
    layout["xaxis"] = axis(
        theme,
        "layer",
        anchor="y" if len(runs) == 1 else f"y{len(runs)}",
        showgrid=False,
        zeroline=False,
        tick0=0,
        dtick=_layer_ticks(num_layers),
        range=[-0.5, num_layers - 0.5],
    )
    data: list[dict[str, Any]] = []
    labels = distinct(run.label for run in runs)
    for place, run in enumerate(runs):
        suffix = "" if place == 0 else str(place + 1)
        top = 1 - place * (_RUN + _BETWEEN_RUNS) / inside
        domain = [max(0.0, top - _RUN / inside), top]
        layout[f"yaxis{suffix}"] = axis(
            theme, autorange="reversed", showgrid=False, type="category", domain=domain, ticks=""
        )
        layout["annotations"].append(_heading(labels[run.label].replace("<br>", " "), top, theme))
        data += _removals(run, f"y{suffix}", theme)
    return {"data": data, "layout": layout}


def _removals(run: ReportRun, yaxis: str, theme: Theme) -> list[dict[str, Any]]:
    """Two rows of layers: what is there, and over it when what is gone went."""
    num_layers, kinds = run.record.num_layers or 0, [kind.upper() for kind in KINDS]
    steps = {(step.block_kind, step.layer_index): step.step for step in run.summary.removed}
    when = [[steps.get((kind, index)) for index in range(num_layers)] for kind in KINDS]
    last = len(steps)
    grid = {"type": "heatmap", "x": list(range(num_layers)), "y": kinds, "yaxis": yaxis, "xgap": 3, "ygap": 3}
    kept = {"z": [[0] * num_layers for _ in KINDS], "hoverinfo": "skip", "colorscale": _flat(theme.kept)}
    gone = {
        "z": when,
        "zmin": 1,
        "zmax": last * 1.25 + 1,  # the first steps are the strongest, and the last still stand out from what is kept
        "colorscale": _colorscale(theme.scale[:0:-1]),
        "texttemplate": "%{z}",
        "hovertemplate": "layer %{x}: step %{z}<extra></extra>",
    }
    return [{**grid, **kept, "showscale": False}, {**grid, **gone, "showscale": False}]


def _draw_scores(scores: Sequence[ScoreRow], num_layers: int, theme: Theme) -> Figure:
    lowest = _lowest(scores)
    num_steps = max(lowest)
    num_layers = max(num_layers, 1 + max(row.layer_index for row in scores))
    kinds = [kind for kind in KINDS if any(row.block_kind == kind for row in scores)]
    facet = min(440, max(120, 22 * num_steps))
    inside = len(kinds) * (facet + _BETWEEN) - _BETWEEN
    layout = base_layout(
        theme,
        inside + _ABOVE + _BELOW,
        coloraxis=_coloraxis([_log(row.score) - lowest[row.step] for row in scores], theme),
    )
    layout["margin"] |= {"t": _ABOVE, "b": _BELOW}
    layout["annotations"] = []
    data: list[dict[str, Any]] = []
    for place, kind in enumerate(kinds):
        of_kind = [row for row in scores if row.block_kind == kind]
        suffix = "" if place == 0 else str(place + 1)
        top = 1 - place * (facet + _BETWEEN) / inside
        layout[f"xaxis{suffix}"] = axis(
            theme,
            "layer" if place + 1 == len(kinds) else "",
            anchor=f"y{suffix}",
            showgrid=False,
            zeroline=False,
            range=[-0.5, num_layers - 0.5],
            tick0=0,
            dtick=_layer_ticks(num_layers),
        )
        layout[f"yaxis{suffix}"] = axis(
            theme,
            "step",
            domain=[max(0.0, top - facet / inside), top],
            showgrid=False,
            zeroline=False,
            range=[num_steps + 0.5, 0.5],
            tick0=1,
            dtick=max(1, num_steps // 8),
        )
        layout["annotations"].append(_heading(KINDS[kind], top, theme))
        data += [_heat(of_kind, lowest, num_layers, suffix), _rings(of_kind, suffix, theme)]
    return {"data": data, "layout": layout}


def _heat(rows: Sequence[ScoreRow], lowest: Mapping[int, float], num_layers: int, suffix: str) -> dict[str, Any]:
    num_steps = max(lowest)
    colors: Cells = [[None] * num_layers for _ in range(num_steps)]
    shown: list[list[str]] = [[""] * num_layers for _ in range(num_steps)]
    for row in rows:
        colors[row.step - 1][row.layer_index] = _log(row.score) - lowest[row.step]
        shown[row.step - 1][row.layer_index] = f"{row.score:.4g} (rank {row.rank})"
    return {
        "type": "heatmap",
        "x": list(range(num_layers)),
        "y": list(range(1, num_steps + 1)),
        "z": colors,
        "text": shown,
        "coloraxis": "coloraxis",
        "xaxis": f"x{suffix}",
        "yaxis": f"y{suffix}",
        "xgap": 1,
        "ygap": 1,
        "hoverongaps": False,
        "hovertemplate": "step %{y}, layer %{x}: %{text}<extra></extra>",
    }


def _rings(rows: Sequence[ScoreRow], suffix: str, theme: Theme) -> dict[str, Any]:
    chosen = [row for row in rows if row.chosen]
    return {
        "type": "scatter",
        "mode": "markers",
        "x": [row.layer_index for row in chosen],
        "y": [row.step for row in chosen],
        "xaxis": f"x{suffix}",
        "yaxis": f"y{suffix}",
        "marker": {"symbol": "circle-open", "size": 9, "color": theme.chosen, "line": {"width": 2.5}},
        "hoverinfo": "skip",
    }


def _coloraxis(values: Sequence[float], theme: Theme) -> dict[str, Any]:
    values = sorted(values)
    low, high = values[0], values[min(len(values) - 1, int(_CLIPPED_SHARE * len(values)))]
    if high - low < 1e-6:
        low, high = low - 0.5, high + 0.5
    ticks = [low + (high - low) * part / 4 for part in range(5)]
    return {
        "cmin": low,
        "cmax": high,
        "colorscale": _colorscale(theme.scale),
        "colorbar": {
            "thickness": 12,
            "tickvals": ticks,
            "ticktext": [*(f"{10**tick:.3g}{_TIMES}" for tick in ticks[:-1]), f"≥ {10 ** ticks[-1]:.3g}{_TIMES}"],
            "tickfont": {"color": theme.muted},
            "outlinewidth": 0,
            "orientation": "h",
            "yref": "container",
            "y": 1.0,
            "yanchor": "top",
            "ypad": 4,
            "len": 1.0,
            "x": 0.5,
            "xanchor": "center",
        },
    }


def _lowest(scores: Sequence[ScoreRow]) -> dict[int, float]:
    """log10 of each step's lowest score."""
    lowest: dict[int, float] = {}
    for row in scores:
        lowest[row.step] = min(lowest.get(row.step, math.inf), _log(row.score))
    return lowest


def _log(score: float) -> float:
    """log10, with a large number for infinity."""
    return math.log10(max(score, _SMALLEST)) if math.isfinite(score) else 300.0


def _heading(text: str, top: float, theme: Theme) -> dict[str, Any]:
    return {
        "text": text,
        "x": 0,
        "y": top,
        "xref": "paper",
        "yref": "paper",
        "xanchor": "left",
        "yanchor": "bottom",
        "showarrow": False,
        "font": {"color": theme.text, "size": 13},
    }


def _flat(color: str) -> list[list[Any]]:
    return [[0, color], [1, color]]


def _colorscale(colors: Sequence[str]) -> list[list[Any]]:
    return [[index / (len(colors) - 1), color] for index, color in enumerate(colors)]


def _layer_ticks(num_layers: int) -> int:
    return 1 if num_layers <= 12 else 2 if num_layers <= 24 else 4
