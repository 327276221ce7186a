"""Where commands end: an order to end is an interruption, and an interruption is one whatever error it comes as."""

from __future__ import annotations

import atexit
import contextlib
import errno
import os
import shlex
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from flows.boundary import OneLineErrors, can_be_resumed, leave_threads_behind
from flows.interruptions import INTERRUPTIONS
from tests.unit.child_processes import child

GO_ON = "What was finished is kept: give the same command again to go on."


def outcome_of(command: Callable[[], None]) -> Result:
    app = typer.Typer(cls=OneLineErrors, pretty_exceptions_enable=False)
    app.callback()(lambda: None)
    app.command("do")(command)
    return CliRunner().invoke(app, ["do"])


def sent(signal_number: signal.Signals) -> Callable[[], None]:
    def command() -> None:
        os.kill(os.getpid(), signal_number)

    return command


def broken_import() -> None:
    """As a module under way reports an interruption: transformers' lazy modules, dataclasses."""
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    except KeyboardInterrupt as error:
        try:
            raise RuntimeError("Error calling __set_name__") from error
        except RuntimeError:
            raise ModuleNotFoundError("Could not import module") from None


def lost_server() -> None:
    try:
        os.kill(os.getpid(), signal.SIGINT)
    finally:
        raise OSError("no server")


def native_code() -> None:
    """As pydantic's core reports an interruption: an error of its own, with no trace of where it comes from."""
    with contextlib.suppress(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGTERM)
    raise ValueError("the schema could not be built")


def swallowed() -> None:
    """A library goes on as if nothing had come; our own work notices it when it next reports or ends."""
    with INTERRUPTIONS.kept(), contextlib.suppress(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGTERM)


def in_a_callback(signal_number: signal.Signals) -> Callable[[], None]:
    """Where Python drops it, as it does with any error in a destructor; the command has long to go."""

    class Thing:
        pass

    def command() -> None:
        thing = Thing()
        watching = weakref.ref(thing, lambda _: os.kill(os.getpid(), signal_number))
        del thing
        assert watching() is None
        time.sleep(5)

    return command


@pytest.mark.parametrize(
    ("command", "status", "said"),
    [
        (sent(signal.SIGTERM), 143, f"Terminated. {GO_ON}\n"),
        (sent(signal.SIGINT), 130, f"\nInterrupted. {GO_ON}\n"),
        (broken_import, 143, f"Terminated. {GO_ON}\n"),
        (lost_server, 130, f"\nInterrupted. {GO_ON}\n"),
        (native_code, 143, f"Terminated. {GO_ON}\n"),
        (sent(signal.SIGHUP), 129, f"Terminated. {GO_ON}\n"),
        (swallowed, 143, f"Terminated. {GO_ON}\n"),
        (in_a_callback(signal.SIGTERM), 143, f"Terminated. {GO_ON}\n"),
        (in_a_callback(signal.SIGINT), 130, f"\nInterrupted. {GO_ON}\n"),
    ],
)
def test_an_interruption_says_how_to_go_on(command: Callable[[], None], status: int, said: str) -> None:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = (*map(signal.getsignal, numbers), sys.unraisablehook)
    outcome = outcome_of(command)
    assert (outcome.exit_code, outcome.stdout, outcome.stderr) == (status, "", said)
    assert (*map(signal.getsignal, numbers), sys.unraisablehook) == before
    INTERRUPTIONS.heed()  # it is forgotten with the command


def test_what_is_ignored_stays_ignored() -> None:
    """As `nohup` has it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        outcome = outcome_of(sent(signal.SIGHUP))
    finally:
        signal.signal(signal.SIGHUP, before)
    assert (outcome.exit_code, outcome.stderr) == (0, "")


def interrupted_and_complaining() -> None:
    """In a process of its own: what native code does whose objects are still held, as Python ends."""
    atexit.register(os.write, 2, b"nanobind: leaked 12 instances!\n")
    app = typer.Typer(cls=OneLineErrors, pretty_exceptions_enable=False)
    app.callback()(lambda: None)
    app.command("do")(sent(signal.SIGTERM))
    app(["do"])


def test_nothing_follows_the_line_of_an_interruption() -> None:
    with child(interrupted_and_complaining) as process:
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (143, "", f"Terminated. {GO_ON}\n")


def with_a_thread_that_goes_on() -> None:
    """In a process of its own: a command whose thread Python waits for at its end, as it does for Prefect's."""

    def command() -> None:
        threading.Thread(target=time.sleep, args=[600]).start()
        leave_threads_behind()
        typer.echo("the result")
        raise typer.Exit(3)

    app = typer.Typer(cls=OneLineErrors, pretty_exceptions_enable=False)
    app.callback()(lambda: None)
    app.command("do")(command)
    app(["do"])


def test_threads_that_are_left_behind_are_not_waited_for() -> None:
    with child(with_a_thread_that_goes_on) as process:
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (3, "the result\n", "")


@pytest.mark.parametrize("workspace", ["data", "named by the environment", "it's another"])
def test_the_run_that_was_stopped_is_named_with_its_workspace_where_that_is_not_the_usual_one(
    workspace: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BLOCKPRUNER_WORKSPACE", workspace if "environment" in workspace else "")

    def command() -> None:
        can_be_resumed("blockpruner resume 20261128-072815-a43d7c", tmp_path / workspace)
        os.kill(os.getpid(), signal.SIGTERM)

    said = outcome_of(command).stderr
    before, resume, after = said.split("`")
    assert before == "Terminated. What was finished is kept: give the same command again, or "
    assert after == ", to go on.\n"
    place = ["--workspace", str(tmp_path / workspace)] if "another" in workspace else []
    assert shlex.split(resume) == ["blockpruner", "resume", "20261128-072815-a43d7c", *place]
    assert outcome_of(sent(signal.SIGTERM)).stderr == f"Terminated. {GO_ON}\n"


def refused(number: int, file: str | None = "/data/model.safetensors") -> Callable[[], None]:
    def command() -> None:
        raise OSError(number, os.strerror(number), file)

    return command


def unserialized() -> None:
    """As a library that is written in Rust says it."""
    raise RuntimeError("Error while serializing: I/O error: File too large (os error 27)")


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (refused(errno.EACCES), "/data/model.safetensors: Permission denied; see who may read and write it"),
        (refused(errno.ENAMETOOLONG), "/data/model.safetensors: File name too long; give a shorter path"),
        (refused(errno.ENAMETOOLONG, "x" * 5000), "File name too long; give a shorter path"),
        (refused(errno.EIO), "/data/model.safetensors: Input/output error; check the path"),
        (refused(errno.ENOSPC), "/data/model.safetensors: No space left on device; free some space and give the same"),
        (refused(errno.EFBIG, None), "or a file, cannot be written: File too large; free some space"),
        (unserialized, "File too large (os error 27); free some space and give the same command again"),
    ],
)
def test_what_the_machine_refuses_is_one_line(command: Callable[[], None], said: str) -> None:
    outcome = outcome_of(command)
    assert outcome.exit_code == 2
    (line,) = outcome.stderr.splitlines()
    assert line.startswith("Error: ")
    assert said in line
    assert len(line) < 300


def test_an_operating_systems_error_without_a_file_is_a_defect() -> None:
    outcome = outcome_of(refused(errno.EBADF, None))
    assert isinstance(outcome.exception, OSError)


def test_other_errors_that_python_drops_are_reported_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    class Thing:
        def __del__(self) -> None:
            raise ZeroDivisionError("ours")

    dropped: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: dropped.append(repr(unraisable.exc_value)))

    def command() -> None:
        Thing()

    assert outcome_of(command).exit_code == 0
    assert dropped == ["ZeroDivisionError('ours')"]


def test_a_defect_is_no_interruption() -> None:
    def defect() -> None:
        raise ZeroDivisionError("ours")

    outcome = outcome_of(defect)
    assert isinstance(outcome.exception, ZeroDivisionError)
    assert "Interrupted" not in outcome.stderr
