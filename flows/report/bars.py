"""Bars: task accuracy, speed, memory, time; one bar a model or run, with its standard error where there is one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flows.report.data import Accuracy, ReportRun, StageTime
from flows.report.picture import Figure, Picture, axis, base_layout, distinct, drawable, plain
from flows.report.theme import HATCHING, Theme, fill
from flows.table_formats import DataTable, shown
from flows.wording import spell_out
from stages.accuracy import AVERAGE_TASK
from stages.store_schema import SpeedRow

_ROOM_FOR_TEXT, _NARROW_ROOM_FOR_TEXT = 1.2, 1.6
"""How far the axis reaches beyond the longest bar, whose value is written behind it; on a phone letters are wider."""
_EVERY_CASE = "every case"


@dataclass(frozen=True)
class Bar:
    """One bar."""

    category: str
    value: float | None
    error: float | None = None
    text: str = ""
    """The value as people read it."""
    is_hatched: bool = False


@dataclass(frozen=True)
class Series:
    """The bars of one model or run."""

    label: str
    bars: tuple[Bar, ...]
    index: int = 0
    """The number of the run: its colour is that run's in every picture."""
    is_dense: bool = False


def task_bars(runs: Sequence[ReportRun]) -> Picture | None:
    """Accuracy on every task, dense and pruned."""
    dense = [Series(name, _accuracy_bars(found), is_dense=True) for name, found in _dense_accuracies(runs)]
    pruned = [(run, run.accuracies("pruned")) for run in runs]
    series = [
        *dense,
        *(Series(_pruned_name(run, runs), _accuracy_bars(found), run.index) for run, found in pruned if found),
    ]
    if not series:
        return None
    several = any(bar.category == AVERAGE_TASK for each in series for bar in each.bars)
    words = " The average's error takes the tasks as independent." if several else ""
    return Picture(
        name="task-accuracy",
        title="Accuracy on tasks",
        caption="acc_norm where the task has it, else acc. The lines are one standard error to either side: two models "
        f"whose lines overlap were not told apart.{words}",
        draw=lambda theme: _draw(series, theme, "accuracy", tick_format=".0%"),
        table=_table(series, "task", "accuracy"),
    )


def speed_bars(runs: Sequence[ReportRun]) -> list[Picture]:
    """Prefill, decoding, memory and KV cache, dense and pruned, on the machine that the runs were timed on."""
    timed = [run for run in runs if run.summary.rows.speed]
    if not timed:
        return []
    machines = list(dict.fromkeys(row.machine for run in timed for row in run.summary.rows.speed))
    where = f"Measured on {machines[0]}." if len(machines) == 1 else "Measured on several machines."
    new_tokens = sorted({row.new_tokens for run in timed for row in run.summary.rows.speed})
    decoded = " or ".join(map(str, new_tokens))
    measured: tuple[tuple[str, str, str, str, Callable[[SpeedRow], float | None]], ...] = (
        ("prefill", "Prefill", "milliseconds", f"Time to read the prompts of a batch; less is better. {where}",
         lambda row: row.prefill_ms),
        ("decode", "Decoding", "tokens per second",
         f"All sequences of a batch together, over {decoded} tokens; more is better. {where}",
         lambda row: row.decode_tokens_per_s),
        ("memory", "Peak memory", "MB", "Of the device; on a CPU, of the whole process. Less is better.",
         lambda row: row.peak_memory_bytes and row.peak_memory_bytes / 1e6),
        ("kv-cache", "KV cache", "bytes per token of one sequence",
         "What a longer context costs; attention blocks that went take none.",
         lambda row: row.kv_cache_bytes_per_token),
    )  # fmt: skip
    rows = [row for run in timed for row in run.summary.rows.speed]
    return [_speed_picture(runs, *each) for each in measured if any(each[-1](row) is not None for row in rows)]


def stage_bars(runs: Sequence[ReportRun]) -> Picture | None:
    """What every stage took."""
    shown = [run for run in runs if run.stages]
    if not shown:
        return None
    series = [Series(run.label, tuple(_stage_bar(stage) for stage in run.stages), run.index) for run in shown]
    rows = [(run.label, s.label, s.seconds, "cached" if s.cached else s.status) for run in shown for s in run.stages]
    return Picture(
        name="stage-time",
        title="Time per stage",
        caption="What computing the stage's result took. Hatched: computed by another run, and taken as it was.",
        draw=lambda theme: _draw(series, theme, "seconds"),
        table=DataTable(("run", "stage", "seconds", "status"), tuple(rows)),
    )


def _speed_picture(
    runs: Sequence[ReportRun],
    name: str,
    title: str,
    unit: str,
    caption: str,
    value: Callable[[SpeedRow], float | None],
) -> Picture:
    timed = [run for run in runs if run.summary.rows.speed]
    # A KV cache is the same whatever the prompt, but where windows are.
    by_case = name != "kv-cache" or any(
        len(set(_by_case(run, variant, value).values())) > 1 for run in timed for variant in ("dense", "pruned")
    )
    series = [
        *(
            Series(_dense_name(run, runs), _speed_bars(run, "dense", by_case, value), is_dense=True)
            for run in _one_a_model(timed)
        ),
        *(Series(_pruned_name(run, runs), _speed_bars(run, "pruned", by_case, value), run.index) for run in timed),
    ]
    return Picture(
        name=f"speed-{name}",
        title=title,
        caption=caption,
        draw=lambda theme: _draw(series, theme, unit, is_wide=False),
        table=_table(series, "case", unit),
        is_wide=False,
    )


def _speed_bars(
    run: ReportRun, variant: str, by_case: bool, value: Callable[[SpeedRow], float | None]
) -> tuple[Bar, ...]:
    measured = _by_case(run, variant, value)
    if not by_case:
        return tuple(_speed_bar(_EVERY_CASE, number) for number in list(measured.values())[:1])
    return tuple(_speed_bar(f"batch {batch}, prompt {prompt}", number) for (batch, prompt), number in measured.items())


def _by_case(run: ReportRun, variant: str, value: Callable[[SpeedRow], float | None]) -> dict[tuple[int, int], float]:
    """What was measured, by batch size and prompt length."""
    return {case: number for case, row in run.speeds(variant).items() if (number := value(row)) is not None}


def _accuracy_bars(found: Sequence[Accuracy]) -> tuple[Bar, ...]:
    return tuple(Bar(each.task, each.value, each.stderr, f"{each.value:.1%}") for each in found)


def _speed_bar(category: str, value: float) -> Bar:
    return Bar(category, value, text=shown(value))


def _stage_bar(stage: StageTime) -> Bar:
    return Bar(stage.label, stage.seconds, text=spell_out(stage.seconds), is_hatched=stage.cached)


def _dense_accuracies(runs: Sequence[ReportRun]) -> list[tuple[str, list[Accuracy]]]:
    """Every model once; the runs of one share its evaluation, unless they were asked for other tasks."""
    found: dict[tuple[object, ...], tuple[str, list[Accuracy]]] = {}
    for run in runs:
        if dense := run.accuracies("dense"):
            found.setdefault((run.model_key, *dense), (_dense_name(run, runs), dense))
    return list(found.values())


def _one_a_model(runs: Sequence[ReportRun]) -> list[ReportRun]:
    return list({run.model_key: run for run in reversed(runs)}.values())[::-1]


def _dense_name(run: ReportRun, runs: Sequence[ReportRun]) -> str:
    return "dense" if len({each.model_key for each in runs}) == 1 else f"{run.model}, dense"


def _pruned_name(run: ReportRun, runs: Sequence[ReportRun]) -> str:
    return "pruned" if len(runs) == 1 else run.label


def _draw(
    series: Sequence[Series], theme: Theme, unit: str, tick_format: str = ",.3~s", *, is_wide: bool = True
) -> Figure:
    """A group of bars for each category; of a single one, a line for each series, whose name stands beside it."""
    categories = list(dict.fromkeys(bar.category for each in series for bar in each.bars))
    labels = distinct(each.label for each in series)
    if is_single := len(categories) == 1 and len(series) > 1:
        unit = unit if categories == [_EVERY_CASE] else f"{unit}<br>{plain(categories[0])}"
        rows, names = dict.fromkeys(categories, ""), list(labels.values())
        height, gap = 16 + 27 * len(series), 0.28
    else:
        rows = distinct(categories)
        names = list(rows.values())
        per_category = 14 + 17 * len(series) if len(series) > 1 else 34
        height, gap = per_category * len(categories), 14 / per_category if len(series) > 1 else 0.28
    data = [_trace(each, labels[each.label], rows, theme) for each in series]
    largest = max((value for each in series for bar in each.bars if (value := drawable(bar.value))), default=1.0)
    layout = base_layout(
        theme,
        90 + height,
        legend=[] if is_single else [labels[each.label] for each in series],
        is_wide=is_wide,
        barmode="overlay" if is_single else "group",
        bargap=gap,
        xaxis=axis(theme, unit, tickformat=tick_format, range=[0, _ROOM_FOR_TEXT * largest], nticks=7),
        yaxis=axis(
            theme, type="category", categoryorder="array", categoryarray=names, autorange="reversed", showgrid=False
        ),
    )
    if any(trace["textposition"] == "outside" for trace in data):
        layout["meta"]["narrowRange"] = [0, _NARROW_ROOM_FOR_TEXT * largest]
    return {"data": data, "layout": layout}


def _trace(series: Series, name: str, rows: Mapping[str, str], theme: Theme) -> dict[str, Any]:
    """`name`: of the series. `rows`: where the bars of each category stand; where it says none, at the series' name."""
    errors = [bar.error for bar in series.bars]
    stands_beside_it = not all(rows.values())
    pattern = "" if series.is_dense or stands_beside_it else fill(series.index)
    trace: dict[str, Any] = {
        "type": "bar",
        "orientation": "h",
        "name": name,
        "y": [rows[bar.category] or name for bar in series.bars],
        "x": [drawable(bar.value) for bar in series.bars],
        "marker": {
            "color": theme.dense if series.is_dense else theme.series_color(series.index),
            "pattern": {
                "shape": [HATCHING if bar.is_hatched else pattern for bar in series.bars],
                "fillmode": "overlay",
                "fgcolor": theme.surface,
                "fgopacity": 0.3 if pattern and any(error is not None for error in errors) else 0.55,
                "size": 6,
            },
        },
        "text": [bar.text for bar in series.bars],
        "textposition": "inside" if any(error is not None for error in errors) else "outside",
        "insidetextanchor": "start",
        "insidetextfont": {"color": theme.surface},
        "outsidetextfont": {"color": theme.text},
        "constraintext": "none",
        "cliponaxis": False,
        "hovertemplate": f"%{{y}}: %{{text}}<extra>{name}</extra>",
    }
    if any(error is not None for error in errors):
        trace["error_x"] = {"type": "data", "array": errors, "color": theme.text, "thickness": 1.5, "width": 4}
    return trace


def _table(series: Sequence[Series], category: str, unit: str) -> DataTable:
    has_errors = any(bar.error is not None for each in series for bar in each.bars)
    columns = ("model", category, unit, *(("standard error",) if has_errors else ()))
    rows = [
        (each.label, bar.category, bar.value, *((bar.error,) if has_errors else ()))
        for each in series
        for bar in each.bars
    ]
    return DataTable(columns, tuple(rows))
