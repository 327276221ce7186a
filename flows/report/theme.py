"""The colours of the pictures, for light and for dark pages.

The series colours are those of Okabe and Ito, which remain apart for colour-blind readers, made darker or lighter until
each stands out from its page by 3:1 or more (WCAG 2, non-text contrast). A second sign, a symbol, a pattern or a
number, goes with each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Theme:
    """One page's colours."""

    name: Literal["light", "dark"]
    surface: str
    """Behind the pictures."""
    text: str
    muted: str
    grid: str
    dense: str
    """Of everything that was measured of the unpruned model."""
    series: tuple[str, ...]
    """Of the runs, in order."""
    kept: str
    """Of a block that is still there."""
    chosen: str
    """Of the mark on a block that went."""
    scale: tuple[str, ...]
    """A sequence from little to much, whose luminance alone tells the order."""

    def series_color(self, index: int) -> str:
        """The colour of the run with this number; after the last they begin again, with another sign (`again`)."""
        return self.series[index % len(self.series)]


LIGHT = Theme(
    name="light",
    surface="#ffffff",
    text="#1c2430",
    muted="#5a6675",
    grid="#e3e8ee",
    dense="#77818f",
    series=("#0072b2", "#d55e00", "#00805f", "#a8528a", "#8f6b00", "#2f4b8f", "#b3322b", "#4c7a14"),
    kept="#e8edf3",
    chosen="#d55e00",
    scale=("#eef4fa", "#bfd8ee", "#7fb2dc", "#3a86c4", "#145a99", "#08305c"),
)
DARK = Theme(
    name="dark",
    surface="#171c23",
    text="#e6ebf1",
    muted="#9aa7b6",
    grid="#2c3541",
    dense="#8b96a5",
    series=("#5ab0f2", "#ff8f50", "#35c99a", "#e79bc8", "#e5b84b", "#a9b8ff", "#ff8b85", "#a5d65e"),
    kept="#2b333e",
    chosen="#ff8f50",
    scale=("#1d2733", "#1f4468", "#2b6ca5", "#5097d3", "#93c2ea", "#e2f0fb"),
)
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "triangle-down", "star-triangle-up")
DASHES = ("solid", "dash", "dot", "dashdot")
HATCHING = "/"
_FILLS = ("", ".", "x", "+")


def again(index: int) -> int:
    """How often the colours have been used up before the run with this number."""
    return index // len(LIGHT.series)


def symbol(index: int) -> str:
    """Of the points of the run with this number; another one than that of the run whose colour it has."""
    return SYMBOLS[(index + again(index)) % len(SYMBOLS)]


def fill(index: int) -> str:
    """The pattern of the bars of the run with this number."""
    return _FILLS[again(index) % len(_FILLS)]
