"""The one place where the command line's errors end: a user's mistake is one line and status 2.

A defect of ours keeps its traceback.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperGroup
from typer.exceptions import TyperException

from blockpruner.errors import BlockPrunerError
from flows.wording import one_line

USER_ERROR = 2
INTERRUPTED = 130


class OneLineErrors(TyperGroup):
    """A group of commands whose errors are one line on standard error."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run a command and exit with its status."""
        try:
            status = super().main(args, prog_name, complete_var, False, windows_expand_args, **extra)
        except BlockPrunerError as error:
            status = _say(str(error))
        except TyperException as error:
            status = _say_usage(error)
        except typer.Abort:
            status = INTERRUPTED
        if not standalone_mode:
            return status
        sys.exit(status if isinstance(status, int) else 0)

    def invoke(self, ctx: Any) -> Any:
        """Run a command; an interruption says how to go on."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            typer.echo("\nInterrupted. What was finished is kept: give the same command again to go on.", err=True)
            raise typer.Exit(INTERRUPTED) from None


def _say(message: str) -> int:
    typer.echo(f"Error: {one_line(message)}", err=True)
    return USER_ERROR


def _say_usage(error: TyperException) -> int:
    """What was wrong with the command line itself."""
    context = getattr(error, "ctx", None)
    hint = f" (see `{context.command_path} --help`)" if context is not None else ""
    return _say(error.format_message() + hint)
