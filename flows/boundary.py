"""The one place where the command line's errors end: a user's mistake is one line and status 2.

So is what the machine refuses: a full disk, a file that may not be read. A defect of ours keeps its traceback. An order
to end (SIGTERM) is taken as Ctrl-C is, at any time: the run's record is closed, what was started is stopped (Prefect's
temporary server would go on for ever), and one line says how to go on.
"""

from __future__ import annotations

import _thread
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperGroup
from typer.exceptions import TyperException

from blockpruner.paths import naming, user_path
from flows.wording import in_plain_words, one_line

USER_ERROR = 2
INTERRUPTED = 130
TERMINATED = 128 + signal.SIGTERM
_AGAIN_AFTER_S = 0.05


class Terminated(KeyboardInterrupt):
    """SIGTERM came."""


class OneLineErrors(TyperGroup):
    """A group of commands whose errors are one line on standard error."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._interruptions = _INTERRUPTIONS

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
            with self._interruptions.watched():
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
        sys.exit(status if isinstance(status, int) else 0)

    def invoke(self, ctx: Any) -> Any:
        """Run a command; an interruption says how to go on."""
        try:
            return super().invoke(ctx)
        except (KeyboardInterrupt, Exception) as error:
            # What was received knows which signal it was; what has become of it on its way here need not.
            interruption = self._interruptions.received or (error if isinstance(error, KeyboardInterrupt) else None)
            if interruption is None:
                raise
            raise typer.Exit(_say_interrupted(interruption, self._interruptions.resume_command)) from None


class _Interruptions:
    """Turns SIGINT and SIGTERM into interruptions of the main thread, and remembers them.

    What follows from an interruption need not show it: an import that is interrupted may fail with any error, native
    code may put an error of its own in the interruption's place, and a terminal interrupts Prefect's temporary server
    as well, so that the last report to it fails. What the user did counts.

    Python drops one that is raised in a destructor or a callback of the garbage collector, and that is where a signal
    is seen that comes while the collector is at work. Such a one is sent again.
    """

    def __init__(self) -> None:
        self.received: KeyboardInterrupt | None = None
        self._are_watched = False
        self.resume_command: str | None = None
        """What goes on with the run that was stopped, where there is one."""

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Watch while the body runs."""
        if threading.current_thread() is not threading.main_thread():  # only there may a handler be set
            yield
            return
        self.received = self.resume_command = None
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:  # `nohup` and background jobs of a script ignore some
                signal.signal(number, self._interrupt)
        hook = sys.unraisablehook
        sys.unraisablehook = lambda dropped: None if self._sent_again(dropped.exc_value) else hook(dropped)
        self._are_watched = True
        try:
            yield
        finally:
            self._are_watched = False
            sys.unraisablehook = hook
            for number, handler in before.items():
                signal.signal(number, handler)

    def _interrupt(self, number: int, _: object) -> None:
        self.received = Terminated() if number == signal.SIGTERM else KeyboardInterrupt()
        raise self.received

    def _sent_again(self, dropped: BaseException | None) -> bool:
        """Whether this is an interruption; it then comes once more, when the main thread is out of here."""
        if dropped is None or dropped is not self.received:
            return False

        def send(number: int) -> None:
            time.sleep(_AGAIN_AFTER_S)
            if self._are_watched:
                signal.pthread_kill(threading.main_thread().ident or 0, number)

        number = signal.SIGTERM if isinstance(dropped, Terminated) else signal.SIGINT
        _thread.start_new_thread(send, (number,))  # takes no lock, which the thread that is in here may hold
        return True


_INTERRUPTIONS = _Interruptions()
"""Of this process: signals belong to it as a whole."""


def watched_interruptions() -> AbstractContextManager[None]:
    """Take SIGINT and SIGTERM as interruptions of the main thread while the body runs; this is for a program's main."""
    return _INTERRUPTIONS.watched()


def was_interrupted() -> bool:
    """Whether the command under way was told to end, whatever error that has become meanwhile."""
    return _INTERRUPTIONS.received is not None


def can_be_resumed(resume_command: str, workspace: Path) -> None:
    """Take note of what goes on with the run that an interruption stops: the command's last line names it.

    `workspace` is absolute; it is said where another one would be taken without it.
    """
    usual = user_path(os.environ.get("BLOCKPRUNER_WORKSPACE") or "data").resolve()
    place = "" if workspace == usual else f" --workspace {shlex.quote(str(workspace))}"
    _INTERRUPTIONS.resume_command = f"{resume_command}{place}"


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
    typer.echo(f"{before}{what}. What was finished is kept: give the same command again{resumed} to go on.", err=True)
    return TERMINATED if terminated else INTERRUPTED


def _say(message: str) -> int:
    typer.echo(f"Error: {one_line(message)}", err=True)
    return USER_ERROR


def _say_usage(error: TyperException) -> int:
    """What was wrong with the command line itself."""
    context = getattr(error, "ctx", None)
    hint = f" (see `{context.command_path} --help`)" if context is not None else ""
    return _say(error.format_message() + hint)
