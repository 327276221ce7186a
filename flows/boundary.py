"""The one place where the command line's errors end: a user's mistake is one line and status 2.

So is what the machine refuses: a full disk, a file that may not be read. A defect of ours keeps its traceback. An order
to end (see `interruptions`) is taken as Ctrl-C is, at any time: the run's record is closed, what was started is
stopped, and one line says how to go on.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup
from typer.exceptions import TyperException

from blockpruner.paths import naming, shortened, user_path
from flows.interruptions import INTERRUPTIONS, Terminated
from flows.wording import in_plain_words, one_line

USER_ERROR = 2
_BY_A_SIGNAL = 128
INTERRUPTED = _BY_A_SIGNAL + signal.SIGINT


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
        _THREADS_ARE_LEFT.clear()
        try:
            with INTERRUPTIONS.watched():
                status = super().main(args, prog_name, complete_var, False, windows_expand_args, **extra)
        except TyperException as error:
            status = _say_usage(error)
        except typer.Abort:
            status = INTERRUPTED
        except Exception as error:
            broken = _close_broken_output()
            words = in_plain_words(broken or error)
            if words is None:
                raise
            status = _say(words)
        else:
            if broken := _close_broken_output():
                status = _say(in_plain_words(broken) or str(broken))
        if not standalone_mode:
            return status
        _leave(status if isinstance(status, int) else 0)

    def invoke(self, ctx: Any) -> Any:
        """Run a command; an interruption says how to go on."""
        try:
            return super().invoke(ctx)
        except (KeyboardInterrupt, Exception) as error:
            # What was received knows which signal it was; what has become of it on its way here need not.
            interruption = INTERRUPTIONS.received or (error if isinstance(error, KeyboardInterrupt) else None)
            if interruption is None:
                raise
            raise typer.Exit(_say_interrupted(interruption, INTERRUPTIONS.resume_command)) from None


_THREADS_ARE_LEFT = threading.Event()


def leave_threads_behind() -> None:
    """Have this process end with its command, and not with what threads of libraries still try, for minutes."""
    _THREADS_ARE_LEFT.set()


def _leave(status: int) -> NoReturn:
    if _THREADS_ARE_LEFT.is_set():
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):
                stream.flush()
        os._exit(status)
    sys.exit(status)


def can_be_resumed(resume_command: str, workspace: Path) -> None:
    """Take note of what goes on with the run that an interruption stops: the command's last line names it."""
    INTERRUPTIONS.resume_command = given_here(resume_command, workspace)


def given_here(command: str, workspace: Path) -> str:
    """A command on a workspace, an absolute path, which is said where another one would be taken without it."""
    usual = user_path(os.environ.get("BLOCKPRUNER_WORKSPACE") or "data").resolve()
    return command if workspace == usual else f"{command} --workspace {shlex.quote(str(workspace))}"


def _close_broken_output() -> OSError | None:
    """The error of a standard output that takes no more; it is turned away, for Python would try once more at its end.

    A pipe whose reader has gone is no error.
    """
    try:
        with naming(Path("standard output")):
            sys.stdout.flush()
    except OSError as error:
        with open(os.devnull, "wb") as nowhere:  # noqa: PTH123
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        return None if isinstance(error, BrokenPipeError) else error
    return None


def _say_interrupted(interruption: KeyboardInterrupt, resume: str | None) -> int:
    terminated = isinstance(interruption, Terminated)
    what, before = ("Terminated", "") if terminated else ("Interrupted", "\n")  # the terminal has just shown ^C
    resumed = f", or `{one_line(resume)}`," if resume else ""
    with suppress(OSError):  # of a terminal that was closed
        typer.echo(
            f"{before}{what}. What was finished is kept: give the same command again{resumed} to go on.", err=True
        )
    _let_nothing_follow()
    return _BY_A_SIGNAL + interruption.number if isinstance(interruption, Terminated) else INTERRUPTED


def _let_nothing_follow() -> None:
    """Have what complains while Python ends complain to nobody.

    After an interruption native code does whose objects a thread still holds, and whatever one more Ctrl-C interrupts.
    """
    if sys.stderr is sys.__stderr__ and sys.stderr is not None:
        with open(os.devnull, "wb") as nowhere:  # noqa: PTH123
            os.dup2(nowhere.fileno(), sys.stderr.fileno())


def _say(message: str) -> int:
    typer.echo(f"Error: {one_line(message)}", err=True)
    return USER_ERROR


def _say_usage(error: TyperException) -> int:
    """What was wrong with the command line itself."""
    context = getattr(error, "ctx", None)
    hint = f" (see `{context.command_path} --help`)" if context is not None else ""
    return _say(error.format_message() + _came(error) + hint)


def _came(error: TyperException) -> str:
    """What was given for a value that is none, which typer keeps to itself."""
    from pydantic import ValidationError  # --help takes no time for it

    cause = error.__cause__ or error.__context__
    if not isinstance(cause, ValidationError):
        return ""
    return f"; it is {shortened(repr(cause.errors(include_url=False)[0]['input']))}"
