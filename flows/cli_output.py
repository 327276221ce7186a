"""How a command ends: with a summary for people, or one line of JSON, on standard output."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import typer
from rich.console import RenderableType

from blockpruner.paths import naming
from flows.render import on_stdout, run_view
from flows.summary import RunSummary, dump_json
from flows.wording import printable

View = Callable[[RunSummary], RenderableType]
_STDOUT = Path("standard output")


def put(text: str, *, newline: bool = True) -> None:
    """Write text to standard output; what would steer a terminal is shown as an escape."""
    with naming(_STDOUT):
        typer.echo(printable(text), nl=newline)


def put_view(view: RenderableType) -> None:
    """Write something for people to standard output."""
    with naming(_STDOUT):
        on_stdout().print(view)


def print_result(summary: RunSummary, *, as_json: bool, view: View = run_view) -> None:
    """Print what a run gave."""
    if as_json:
        put(dump_json(summary.as_json()))
    else:
        put_view(view(summary))
