"""The one place where the command line's errors end: a user's mistake is one line and status 2.

A defect of ours keeps its traceback. An order to end (SIGTERM) is taken as Ctrl-C is, at any time: the run's record is
closed, what was started is stopped (Prefect's temporary server would go on for ever), and one line says how to go on.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperGroup
from typer.exceptions import TyperException

from blockpruner.errors import BlockPrunerError
from flows.wording import one_line

USER_ERROR = 2
INTERRUPTED = 130
TERMINATED = 128 + signal.SIGTERM


class Terminated(KeyboardInterrupt):
    """SIGTERM came."""


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
            with _termination_as_interruption():
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
        except (KeyboardInterrupt, Exception) as error:
            interruption = _interruption_behind(error)
            if interruption is None:
                raise
            raise typer.Exit(_say_interrupted(interruption)) from None


@contextmanager
def _termination_as_interruption() -> Iterator[None]:
    """While the body runs, SIGTERM raises `Terminated` in the main thread."""
    if threading.current_thread() is not threading.main_thread():  # only there may a handler be set
        yield
        return

    def terminate(*_: object) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _interruption_behind(error: BaseException) -> KeyboardInterrupt | None:
    """The interruption that an error comes from, if it does: what the user did counts.

    An import that is interrupted may fail with any error; and a terminal interrupts Prefect's temporary server as well,
    so that the last report to it fails.
    """
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, KeyboardInterrupt):
        cause = cause.__cause__ or cause.__context__
    return cause


def _say_interrupted(interruption: KeyboardInterrupt) -> int:
    terminated = isinstance(interruption, Terminated)
    what, before = ("Terminated", "") if terminated else ("Interrupted", "\n")  # the terminal has just shown ^C
    typer.echo(f"{before}{what}. What was finished is kept: give the same command again to go on.", err=True)
    return TERMINATED if terminated else INTERRUPTED


def _say(message: str) -> int:
    typer.echo(f"Error: {one_line(message)}", err=True)
    return USER_ERROR


def _say_usage(error: TyperException) -> int:
    """What was wrong with the command line itself."""
    context = getattr(error, "ctx", None)
    hint = f" (see `{context.command_path} --help`)" if context is not None else ""
    return _say(error.format_message() + hint)
