"""The terminal, as everything for people reaches it: what a file, a record or a user's name says is text there.

It is no markup and steers nothing, whoever forgot to think of it. Knows no run and no table.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import IO, Any

from rich.console import Console, ConsoleOptions, RenderableType  # noqa: TID251
from rich.segment import Segment
from rich.text import Text

from flows.wording import printable


class Terminal(Console):
    """A console of rich's that shows an escape for every character that would steer the terminal."""

    def __init__(self, file: IO[str], **settings: Any) -> None:
        """A terminal, or whatever else `file` is; `settings` are rich's."""
        super().__init__(file=file, markup=False, emoji=False, highlight=False, **settings)

    def render_str(self, text: str, **settings: Any) -> Text:
        """See rich. Plain strings come by here before they are measured."""
        return super().render_str(printable(text), **settings)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """See rich. Everything comes by here, measured or not; what moves the cursor is marked as rich's own."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)
