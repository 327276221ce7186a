"""What a person sees of a comparison under way: how many cells are done and left, and what each running one is at.

On a terminal a bar and a line a cell, elsewhere lines for a log. Everything goes to standard error.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

import blockpruner.progress
from flows.cell_worker import Event
from flows.eta import RemainingTime
from flows.reporter import Reporter
from flows.wording import count, printable, spell_out

_LINE_EVERY_S = 15.0


class CompareProgress:
    """Follows the cells. Its methods may be called from any thread."""

    def __init__(self, reporter: Reporter, total: int) -> None:
        """Follow so many pieces of work."""
        self._reporter, self._total, self._done, self._kept = reporter, total, 0, 0
        self._remaining, self._guard = RemainingTime(), threading.Lock()
        self._bar = _bar(reporter) if reporter.console.is_terminal else None
        self._overall: TaskID | None = None

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
            self._overall = self._bar.add_task("cells", total=self._total, what="")
        self._remaining.seconds(self._state())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def begin(self, label: str) -> Callable[[Event], None]:
        """A piece of work begins; what is returned takes what is heard of it."""
        if self._bar is None:
            self._reporter.say(f"{label}: begun")
            return _Lines(self._reporter, label)
        return _Bar(self._reporter, self._bar, label)

    def end(self, label: str, listener: Callable[[Event], None], event: Event, seconds: float) -> None:
        """It is over."""
        with self._guard:
            self._done += not event.stopped
            self._kept += event.cached
            left, remaining_s = self._total - self._done, self._remaining.seconds(self._state())
        about = f", about {spell_out(remaining_s)}" if remaining_s is not None and left else ""
        standing = f"{self._done} of {self._total} done, {left} left{about}"
        if event.stopped:
            self._reporter.say(f"{label}: {event.text} ({standing})", "yellow")
        elif event.text:
            self._reporter.say(f"{label}: failed: {event.text} ({standing})", "red")
        else:
            fate = "was done before" if event.cached else f"done in {spell_out(seconds)}"
            self._reporter.say(f"{label}: {fate} ({standing})", "dim" if event.cached else None)
        if self._bar is not None:
            assert self._overall is not None
            self._bar.update(self._overall, completed=self._done, what=f"{count(left, 'cell')} left{about}")
            if isinstance(listener, _Bar):
                listener.close()

    def _state(self) -> blockpruner.progress.Progress:
        return blockpruner.progress.Progress(self._done, self._total, "cells", resumed=self._kept)


def _bar(reporter: Reporter) -> Progress:
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[what]}", markup=False),
    )
    return Progress(*columns, console=reporter.console, transient=True)


class _Lines:
    """A line for every stage that was computed, and now and then one while it is."""

    def __init__(self, reporter: Reporter, label: str) -> None:
        self._reporter, self._label = reporter, label
        self._said_at = time.monotonic()

    def __call__(self, event: Event) -> None:
        if event.kind == "warn":
            self._reporter.warn(f"{self._label}: {event.text}")
        elif event.kind == "stage" and not event.cached:
            self._reporter.say(f"{self._label}: {event.text} computed in {spell_out(event.seconds)}")
        elif event.kind == "say":
            self._reporter.say(f"{self._label}: {event.text}")
        elif event.kind == "progress" and time.monotonic() - self._said_at >= _LINE_EVERY_S:
            self._said_at = time.monotonic()
            self._reporter.say(f"{self._label}: {event.text}")


class _Bar:
    """A line below the bar, for as long as the cell runs."""

    def __init__(self, reporter: Reporter, bar: Progress, label: str) -> None:
        self._reporter, self._bar, self._label = reporter, bar, label
        self._task = bar.add_task(printable(label), total=None, what="")

    def __call__(self, event: Event) -> None:
        if event.kind == "warn":
            self._reporter.warn(f"{self._label}: {event.text}")
        elif event.kind in ("progress", "stage"):
            self._bar.update(self._task, what=printable(event.text))

    def close(self) -> None:
        """Take it away."""
        self._bar.remove_task(self._task)
