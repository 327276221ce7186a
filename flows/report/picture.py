"""A picture of the report: how it is drawn in each theme, and the same numbers as a table. Draws nothing itself.

A figure is plain data in plotly's own terms, so that it needs no plotly to be made; plotly.js draws it.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from flows.report.theme import Theme
from flows.table_formats import DataTable
from flows.wording import one_line

Figure = dict[str, Any]
"""`data`, `layout`: https://plotly.com/javascript/reference/"""

_LABEL_LENGTH = 34


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


def drawable(value: float | None) -> float | None:
    """A number that can be drawn, or a gap."""
    return value if value is not None and math.isfinite(value) else None


def base_layout(theme: Theme, height: int, **more: Any) -> dict[str, Any]:
    """What all pictures share. `height` in CSS pixels; the width is the page's."""
    return {
        "height": height,
        "autosize": True,
        "paper_bgcolor": theme.surface,
        "plot_bgcolor": theme.surface,
        "font": {"family": "system-ui, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif", "size": 13, "color": theme.text},
        "margin": {"l": 60, "r": 20, "t": 16, "b": 50},
        "dragmode": False,
        "hoverlabel": {"bgcolor": theme.surface, "bordercolor": theme.muted, "font": {"color": theme.text}},
        "legend": {"orientation": "h", "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom"},
        **more,
    }


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
