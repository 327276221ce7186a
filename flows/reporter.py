"""What a person sees of a run under way: a line a stage, a bar or now and then a line while one works, warnings.

Everything goes to standard error; standard output belongs to results. Knows no stage and no Prefect.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar
from rich.spinner import Spinner
from rich.text import Text

from blockpruner.progress import Progress, ProgressCallback, Throughput
from flows.eta import RemainingTime
from flows.terminal import Terminal
from flows.wording import in_units, printable, spell_out

LOADING = "loading torch and transformers"
"""Takes seconds, and on a busy machine half a minute: whoever is about to do it says so."""
_LINE_EVERY_S = 15.0
"""How often a log file hears of a stage that takes long."""


class Reporter:
    """Speaks to the terminal, or in plain lines to whatever standard error is."""

    def __init__(self, console: Terminal | None = None) -> None:
        """Report on a console; by default on standard error as it is now."""
        self.console = console or Terminal(sys.stderr, soft_wrap=True)

    def say(self, line: str, style: str | None = None) -> None:
        """One line of information."""
        self.console.print(line, style=style)

    def warn(self, line: str) -> None:
        """One line that a person should know."""
        self.say(f"Warning: {line}", "yellow")

    def stage_ended(self, label: str, seconds: float, *, cached: bool) -> None:
        """A stage is there: computed now, or taken from the cache."""
        fate = "cached" if cached else f"computed in {spell_out(seconds)}"
        self.say(f"{label:<34} {fate}", "dim" if cached else None)

    def loading(self) -> AbstractContextManager[None]:
        """For a body that imports torch and transformers: see `waiting`; nothing where they are there already."""
        return nullcontext() if "transformers" in sys.modules else self.waiting(LOADING)

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Say what a person waits for while the body runs: on a terminal a spinner that goes away again, else a line.

        What the body prints goes where it would without: a library that is imported meanwhile may keep the streams.
        """
        if not self.console.is_interactive:
            self.say(f"{what} ...")
            yield
            return
        spinner = Spinner("line", Text(f"{what} ..."))
        with Live(spinner, console=self.console, transient=True, redirect_stdout=False, redirect_stderr=False):
            yield

    @contextmanager
    def working(self, label: str) -> Iterator[ProgressCallback]:
        """Show the progress of one stage while the body runs; what is yielded takes its reports."""
        if not self.console.is_terminal:
            yield _LineProgress(self, label)
            return
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TextColumn("{task.fields[what]}", markup=False),
        )
        with Bar(*columns, console=self.console, transient=True) as bar:
            yield _BarProgress(bar, label)


def describe(progress: Progress, remaining_s: float | None) -> str:
    """What is counted, where it stands, and how long it will take."""
    parts = [progress.unit, progress.note, f"about {spell_out(remaining_s)} left" if remaining_s is not None else ""]
    if progress.throughput is not None:
        parts.append(_speed(progress.throughput))
    return ", ".join(part for part in parts if part)


def _speed(throughput: Throughput) -> str:
    """'12.5 M tokens at 312 TFLOP/s, MFU 0.61'."""
    mfu = f", MFU {throughput.mfu:.2f}" if throughput.mfu is not None else ""
    return f"{in_units(throughput.tokens).rstrip()} tokens at {in_units(throughput.flops_per_s)}FLOP/s{mfu}"


class _BarProgress:
    """Moves a bar."""

    def __init__(self, bar: Bar, label: str) -> None:
        self._bar, self._remaining = bar, RemainingTime()
        self._task = bar.add_task(printable(label), total=None, what="")

    def __call__(self, progress: Progress) -> None:
        what = printable(describe(progress, self._remaining.seconds(progress)))
        self._bar.update(self._task, completed=progress.done, total=progress.total, what=what)


class _LineProgress:
    """Writes a line now and then, for logs."""

    def __init__(self, reporter: Reporter, label: str) -> None:
        self._reporter, self._label, self._remaining = reporter, label, RemainingTime()
        self._said_at = time.monotonic()

    def __call__(self, progress: Progress) -> None:
        remaining_s = self._remaining.seconds(progress)
        if progress.done == progress.total or time.monotonic() - self._said_at < _LINE_EVERY_S:
            return
        self._said_at = time.monotonic()
        of_total = f" of {progress.total}" if progress.total is not None else ""
        self._reporter.say(f"{self._label}: {progress.done}{of_total} {describe(progress, remaining_s)}")
