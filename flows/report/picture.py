"""A picture of the report: how it is drawn in each theme, and the same numbers as a table. Draws nothing itself.

A figure is plain data in plotly's own terms, so that it needs no plotly to be made; plotly.js draws it.
"""

from __future__ import annotations

import html
import math
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from flows.report.theme import Theme
from flows.table_formats import DataTable
from flows.wording import one_line

Figure = dict[str, Any]
"""`data`, `layout`: https://plotly.com/javascript/reference/"""

_LABEL_LENGTH = 34
_LEGEND_LINE = 19
"""Of a legend, in CSS pixels."""
_LEGEND_WIDTH = {True: 800, False: 330}
"""On a wide page, by whether the picture takes all of it, in CSS pixels: the picture without what its axis may take."""
_NARROW_LEGEND_WIDTH = 220
"""On a phone."""


@dataclass(frozen=True)
class Picture:
    """One picture."""

    name: str
    """Of its file and its place in the page: a-z, 0-9 and '-'."""
    title: str
    caption: str
    """What it shows and how to read it."""
    draw: Callable[[Theme], Figure]
    table: DataTable
    """The numbers that are drawn."""
    is_wide: bool = True
    """Whether it takes the page's whole width."""


def plain(text: str) -> str:
    """A text as plotly shows it: what looks like markup is none, and a long one has its middle left out."""
    line = one_line(text)
    if len(line) > _LABEL_LENGTH:
        half = (_LABEL_LENGTH - 1) // 2
        line = f"{line[:half]}…{line[-half:]}"
    return html.escape(line, quote=False)


def distinct(texts: Iterable[str]) -> dict[str, str]:
    """Each text as plotly shows it, and no two alike: those that shortening would make the same are whole, on lines."""
    short = {text: plain(text) for text in texts}
    times = Counter(short.values())
    return {text: label if times[label] == 1 else _in_lines(text) for text, label in short.items()}


def _in_lines(text: str) -> str:
    lines = textwrap.wrap(one_line(text), _LABEL_LENGTH)
    return "<br>".join(html.escape(line, quote=False) for line in lines)


def drawable(value: float | None) -> float | None:
    """A number that can be drawn, or a gap."""
    return value if value is not None and math.isfinite(value) else None


def base_layout(
    theme: Theme, height: int, *, legend: Sequence[str] = (), is_wide: bool = True, **more: Any
) -> dict[str, Any]:
    """What all pictures share.

    Args:
        theme: its colours.
        height: in CSS pixels, without the legend; the width is the page's.
        legend: what it names; one name alone needs none.
        is_wide: see `Picture.is_wide`.
        more: of plotly's layout.
    """
    labels = legend if len(legend) > 1 else ()
    return {
        "height": height + _legend_height(labels, _LEGEND_WIDTH[is_wide], 7.0),
        "meta": {"narrowHeight": height + _legend_height(labels, _NARROW_LEGEND_WIDTH, 6.0)},
        "showlegend": bool(labels),
        "autosize": True,
        "paper_bgcolor": theme.surface,
        "plot_bgcolor": theme.surface,
        "font": {"family": "system-ui, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif", "size": 13, "color": theme.text},
        "margin": {"l": 60, "r": 20, "t": 16, "b": 50},
        "dragmode": False,
        "hoverlabel": {"bgcolor": theme.surface, "bordercolor": theme.muted, "font": {"color": theme.text}},
        "legend": {
            "orientation": "h",
            "traceorder": "normal",
            "x": 0,
            "xanchor": "left",
            "y": 1.02,
            "yanchor": "bottom",
            "maxheight": 0.95,
        },
        **more,
    }


def _legend_height(labels: Sequence[str], width: int, letter: float) -> int:
    """How much a legend of these labels takes: plotly sets them in columns as wide as the widest of them."""
    if not labels:
        return 0
    lines = [label.split("<br>") for label in labels]
    widest = 45 + letter * max(len(html.unescape(line)) for label in lines for line in label)
    columns = max(1, int(width // widest))
    rows = [max(len(label) for label in lines[first : first + columns]) for first in range(0, len(lines), columns)]
    return _LEGEND_LINE * sum(rows)


def axis(theme: Theme, title: str = "", **more: Any) -> dict[str, Any]:
    """An axis in the theme's colours."""
    return {
        "title": {"text": title, "font": {"color": theme.muted}, "standoff": 10},
        "gridcolor": theme.grid,
        "linecolor": theme.grid,
        "zerolinecolor": theme.grid,
        "tickfont": {"color": theme.muted},
        "automargin": True,
        "fixedrange": True,
        **more,
    }
