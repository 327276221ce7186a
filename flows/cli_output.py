"""How a command ends: with a summary for people, or one line of JSON, on standard output."""

from __future__ import annotations

from collections.abc import Callable

import typer
from rich.console import RenderableType

from flows.render import on_stdout, run_view
from flows.summary import RunSummary, dump_json

View = Callable[[RunSummary], RenderableType]


def print_result(summary: RunSummary, *, as_json: bool, view: View = run_view) -> None:
    """Print what a run gave."""
    if as_json:
        typer.echo(dump_json(summary.as_json()))
        return
    console = on_stdout()
    console.print(view(summary))
