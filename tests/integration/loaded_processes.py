"""The command line in real processes that begin at once: each is forked from one that has loaded everything.

Loading takes seconds, which a test of many processes has not. What a process does, it does itself: it has a pid, locks
and signals of its own, and leads a group as in a terminal.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

from blockpruner import fresh_process
from tests.integration.command_line import Outcome

_LOADED = ("flows.plan", "flows.runner", "flows.summary", "flows.cli_output", "flows.prune_flow", "stages.store")
_STREAMS = ("stdout", "stderr")
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(list(_LOADED))

Before = Callable[..., None]
"""Called in the new process with `arguments` of its own; a function of a module."""


def command_line(arguments: Sequence[object]) -> None:
    """The program itself."""
    from flows.cli import app

    app([str(argument) for argument in arguments], prog_name="blockpruner")


def pipeline(arguments: Sequence[Any]) -> None:
    """The pipeline without Prefect, and exports loaded by a fork: a workspace, how far to go, a recipe's fields."""
    from flows.recipe import make_recipe
    from flows.reporter import Reporter
    from flows.runner import Runner

    load_exports_in_forks()
    workspace, goal, fields = arguments
    Runner(workspace, Reporter()).run(make_recipe(fields), goal)


class Command:
    """A command under way in a process of its own."""

    def __init__(
        self,
        arguments: Sequence[object],
        said: Path,
        before: Sequence[tuple[Before, Sequence[object]]] = (),
        program: Callable[[Sequence[Any]], None] = command_line,
    ) -> None:
        """Start it. `said`: a folder of its own for what it says."""
        said.mkdir(parents=True)
        for name in _STREAMS:
            (said / name).touch()
        self._said = said
        everything = (program, list(arguments), str(said), list(before))
        self._process = _CONTEXT.Process(target=_be_the_command, args=everything)
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def stderr(self) -> str:
        """What it has said so far on standard error."""
        return (self._said / "stderr").read_text()

    @property
    def is_over(self) -> bool:
        """Whether it has ended."""
        return not self._process.is_alive()

    def send(self, signal_number: signal.Signals) -> None:
        """Send it a signal."""
        os.kill(self.pid, signal_number)

    def outcome(self, timeout: float = 120.0) -> Outcome:
        """Wait for its end."""
        self._process.join(timeout)
        assert self._process.exitcode is not None, f"it does not end; it said {self.stderr}"
        return Outcome(self._process.exitcode, (self._said / "stdout").read_text(), self.stderr)

    def end(self) -> None:
        """Kill it, if it still runs."""
        self._process.kill()
        self._process.join()


@contextmanager
def commands() -> Iterator[Callable[[Command], Command]]:
    """Gives a function that takes note of commands; they are killed at the end of the block, if they still run."""
    with ExitStack() as stack:

        def noted(command: Command) -> Command:
            stack.callback(command.end)
            return command

        yield noted


def load_exports_in_forks() -> None:
    """In a process about to begin: what loads an export is forked from it."""
    fresh_process.subprocess = SimpleNamespace(run=_run_in_a_fork)  # type: ignore[assignment]


def _run_in_a_fork(command: Sequence[str], input: str = "", **_: object) -> subprocess.CompletedProcess[str]:
    """What loads an export is a process of its own here as well, without loading all libraries once more."""
    with tempfile.TemporaryFile("w+") as asked, tempfile.TemporaryFile("w+") as said:
        asked.write(input)
        asked.seek(0)
        status = _status_of_a_fork(command, asked, said)
        said.seek(0)
        return subprocess.CompletedProcess(command, status, said.read(), "")


def _status_of_a_fork(command: Sequence[str], stdin: IO[str], stdout: IO[str]) -> int:
    child = os.fork()
    if child == 0:
        sys.stdin, sys.stdout = stdin, stdout  # type: ignore[assignment]
        status = 1
        try:
            sys.argv = list(command[4:])  # without the interpreter and the lifeline
            runpy.run_path(sys.argv[0], run_name="__main__")
            stdout.flush()
            status = 0
        except BaseException:  # noqa: BLE001  # it must not go on as its parent
            traceback.print_exc()
        os._exit(status)
    return os.waitpid(child, 0)[1]


def _be_the_command(
    program: Callable[[Sequence[Any]], None],
    arguments: Sequence[Any],
    said: str,
    before: Sequence[tuple[Before, Sequence[object]]],
) -> None:
    os.setsid()
    for descriptor, name in enumerate(_STREAMS, start=1):
        os.dup2(os.open(Path(said, name), os.O_WRONLY | os.O_APPEND), descriptor)
    for prepare, its_arguments in before:
        prepare(*its_arguments)
    try:
        program(arguments)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
