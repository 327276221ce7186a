"""Run as a program of its own: carries out cells of a comparison, one after another, for the process that started it.

A request is a line of JSON on standard input, what happens is lines of JSON on what was standard output; whatever else
prints goes to standard error. The end of standard input ends this process, in the midst of a cell as well: a comparison
that was killed leaves nothing behind that goes on computing.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Literal, Self

from pydantic import BaseModel, ConfigDict

from blockpruner.progress import Progress, ProgressCallback
from flows.eta import RemainingTime
from flows.grid import External
from flows.interruptions import INTERRUPTIONS
from flows.recipe import Recipe
from flows.reporter import Reporter, describe
from flows.wording import in_plain_words, one_line

_GRACE_S = 20.0
"""For a cell to close its records once it was told to end; native code may be at work."""
_PROGRESS_EVERY_S = 0.5


class Request(BaseModel):
    """One cell to be carried out."""

    model_config = ConfigDict(frozen=True)

    recipe: Recipe
    goal: Literal["evaluate", "speed"]
    comparison: str
    external: External | None = None


class Event(BaseModel):
    """What a worker says: that a stage is there, how far one is, a warning, or that the cell is over."""

    model_config = ConfigDict(frozen=True)

    kind: Literal["say", "warn", "stage", "progress", "end"]
    text: str = ""
    """A line, or a stage's label; at the end, what went wrong."""
    seconds: float = 0.0
    cached: bool = False
    """Of a stage; at the end, whether the cell had been done before."""
    stopped: bool = False
    """At the end: it did not fail, somebody ended it."""
    run_id: str | None = None


class _Channel:
    """The way back."""

    def __init__(self, file: IO[str]) -> None:
        self._file, self._lock = file, threading.Lock()

    @classmethod
    def take_standard_output(cls) -> Self:
        """Have standard output for this alone; what others print goes to standard error."""
        own = os.dup(1)
        os.dup2(2, 1)
        return cls(os.fdopen(own, "w", encoding="utf-8"))

    def send(self, event: Event) -> None:
        with self._lock:
            try:
                self._file.write(event.model_dump_json() + "\n")
                self._file.flush()
            except BrokenPipeError:  # nobody listens any more; the lifeline ends us
                pass


class _SendingReporter(Reporter):
    """Tells the parent what a person would be told."""

    def __init__(self, channel: _Channel) -> None:
        super().__init__()
        self._channel = channel

    def say(self, line: str, style: str | None = None) -> None:
        self._channel.send(Event(kind="say", text=line))

    def warn(self, line: str) -> None:
        self._channel.send(Event(kind="warn", text=line))

    def stage_ended(self, label: str, seconds: float, *, cached: bool) -> None:
        self._channel.send(Event(kind="stage", text=label, seconds=seconds, cached=cached))

    @contextmanager
    def working(self, label: str) -> Iterator[ProgressCallback]:
        remaining, sent_at = RemainingTime(), float("-inf")
        self._channel.send(Event(kind="progress", text=label))

        def show(progress: Progress) -> None:
            nonlocal sent_at
            remaining_s = remaining.seconds(progress)
            if time.monotonic() - sent_at < _PROGRESS_EVERY_S:
                return
            sent_at = time.monotonic()
            of_total = f" of {progress.total}" if progress.total is not None else ""
            text = f"{label}: {progress.done}{of_total} {describe(progress, remaining_s)}"
            self._channel.send(Event(kind="progress", text=text))

        yield show


class _Requests:
    """The requests as they come in; their end interrupts whatever is being done."""

    def __init__(self, lines: IO[str]) -> None:
        self._lines, self._queue = lines, queue.Queue[str | None]()
        self._busy = threading.Event()
        threading.Thread(target=self._read, name="requests", daemon=True).start()

    def __iter__(self) -> Iterator[Request]:
        while (line := self._queue.get()) is not None:
            self._busy.set()
            yield Request.model_validate_json(line)
            self._busy.clear()

    def _read(self) -> None:
        for line in self._lines:
            self._queue.put(line)
        self._queue.put(None)
        if self._busy.is_set():
            # To that thread, so that a system call in which it waits is interrupted.
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
            time.sleep(_GRACE_S)
            os._exit(1)


def _carry_out(workspace: Path, request: Request, reporter: Reporter) -> Event:
    """Do the cell, or find that it was done; the event that says how it ended."""
    from flows.runner import Runner

    runner: Runner | None = None
    try:
        runner = Runner(workspace, reporter)
        found = runner.finished(request.recipe, request.goal, request.comparison, request.external)
        if found is not None:
            return Event(kind="end", run_id=found.run_id, cached=True)
        record = runner.run(request.recipe, request.goal, comparison=request.comparison, external=request.external)
    except Exception as error:  # noqa: BLE001  # whatever it is, it is this cell's, and the others go on
        begun = runner.begun if runner else None
        INTERRUPTIONS.heed()  # what native code, or an import, made of the order to end
        words = in_plain_words(error) or one_line(f"{type(error).__name__}: {error}")
        return Event(kind="end", text=words, run_id=begun.run_id if begun else None)
    return Event(kind="end", run_id=record.run_id)


def main() -> int:
    """Serve until there are no more requests."""
    channel, workspace = _Channel.take_standard_output(), Path(json.loads(sys.argv[1]))
    try:
        with INTERRUPTIONS.watched():
            requests = _Requests(sys.stdin)
            for request in requests:
                channel.send(_carry_out(workspace, request, _SendingReporter(channel)))
    except KeyboardInterrupt:
        return 128 + signal.SIGTERM
    return 0


if __name__ == "__main__":
    sys.exit(main())
