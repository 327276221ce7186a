"""The demo's last words: what the numbers mean, where things are, what to try next. Computes one thing: chance."""

from __future__ import annotations

from rich.console import RenderableType
from flows.summary import RunSummary
