"""How a command says on standard error what a person should know, and goes on."""

from __future__ import annotations

import typer

from flows.wording import one_line


def warn(line: str) -> None:
    """One line; what would steer a terminal is shown as an escape."""
    typer.echo(f"Warning: {one_line(line)}", err=True)
