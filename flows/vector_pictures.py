"""Two small pictures of a run as SVG, drawn at once and without a browser: for Prefect's server.

The report draws the same with plotly, larger and with all that can be pointed at.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence

from flows.report.theme import LIGHT
from flows.summary import RunSummary
from flows.table_formats import shown

_CELL, _LEFT, _TOP = 22, 44, 26
_WIDTH, _HEIGHT = 560, 220
_KINDS = ("mha", "mlp")


def blocks_svg(summary: RunSummary) -> str | None:
    """The network as a strip, a column a layer; what is gone shows the step at which it went."""
    num_layers = summary.record.num_layers
    if not num_layers or not summary.removed:
        return None
    steps = {(step.block_kind, step.layer_index): step.step for step in summary.removed}
    parts = [_text(_LEFT + (index + 0.5) * _CELL, 17, str(index), "middle") for index in range(0, num_layers, 4)]
    for row, kind in enumerate(_KINDS):
        top = _TOP + row * _CELL
        parts.append(_text(_LEFT - 8, top + 15, kind.upper(), "end"))
        for index in range(num_layers):
            step = steps.get((kind, index))
            left, color = _LEFT + index * _CELL, LIGHT.kept if step is None else LIGHT.series[0]
            parts.append(f'<rect x="{left}" y="{top}" width="{_CELL - 2}" height="{_CELL - 2}" rx="3" fill="{color}"/>')
            if step is not None:
                parts.append(_text(left + (_CELL - 2) / 2, top + 14.5, str(step), "middle", LIGHT.surface))
    return _svg(parts, _LEFT + num_layers * _CELL + 12, _TOP + len(_KINDS) * _CELL + 8)


def perplexity_svg(summary: RunSummary) -> str | None:
    """Perplexity on the calibration set, from the dense model to the last removal; the axis is logarithmic."""
    dense = summary.perplexity("dense")
    values = [*([dense] if dense else []), *(step.perplexity for step in summary.removed)]
    finite = [value for value in values if math.isfinite(value) and value > 0]
    if len(finite) < 2 or len(finite) < len(values):
        return None
    points = _places(finite)
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    parts = [
        f'<polyline points="{line}" fill="none" stroke="{LIGHT.series[0]}" stroke-width="2"/>',
        *(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{LIGHT.series[0]}"/>' for x, y in points),
        _text(12, 20, "perplexity on the calibration set, by blocks removed", "start", LIGHT.muted),
    ]
    for index in sorted({0, len(finite) - 1}):
        anchor = "start" if index == 0 else "end"
        parts.append(_text(points[index][0], points[index][1] - 10, shown(finite[index]), anchor))
        parts.append(_text(points[index][0], _HEIGHT - 10, str(index), anchor, LIGHT.muted))
    return _svg(parts, _WIDTH, _HEIGHT)


def data_uri(svg: str) -> str:
    """The picture as an address that needs no server."""
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"


def _places(values: Sequence[float]) -> list[tuple[float, float]]:
    logs = [math.log(value) for value in values]
    low, span = min(logs), (max(logs) - min(logs)) or 1.0
    across = (_WIDTH - 48) / (len(values) - 1)
    return [(24 + index * across, 178 - 120 * (log - low) / span) for index, log in enumerate(logs)]


def _text(x: float, y: float, text: str, anchor: str, color: str = LIGHT.text) -> str:
    """Only numbers and words of our own come here."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{color}">{text}</text>'


def _svg(parts: Sequence[str], width: float, height: float) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'font-family="system-ui, sans-serif" font-size="11"><rect width="100%" height="100%" rx="6" '
        f'fill="{LIGHT.surface}"/>{"".join(parts)}</svg>'
    )
