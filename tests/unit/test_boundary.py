"""Where commands end: an order to end is an interruption, and an interruption is one whatever error it comes as."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable

import pytest
import typer
from typer.testing import CliRunner, Result

from flows.boundary import OneLineErrors

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


@pytest.mark.parametrize(
    ("command", "status", "said"),
    [
        (sent(signal.SIGTERM), 143, f"Terminated. {GO_ON}\n"),
        (sent(signal.SIGINT), 130, f"\nInterrupted. {GO_ON}\n"),
        (broken_import, 143, f"Terminated. {GO_ON}\n"),
        (lost_server, 130, f"\nInterrupted. {GO_ON}\n"),
        (native_code, 143, f"Terminated. {GO_ON}\n"),
    ],
)
def test_an_interruption_says_how_to_go_on(command: Callable[[], None], status: int, said: str) -> None:
    before = signal.getsignal(signal.SIGTERM)
    outcome = outcome_of(command)
    assert (outcome.exit_code, outcome.stdout, outcome.stderr) == (status, "", said)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_defect_is_no_interruption() -> None:
    def defect() -> None:
        raise ZeroDivisionError("ours")

    outcome = outcome_of(defect)
    assert isinstance(outcome.exception, ZeroDivisionError)
    assert "Interrupted" not in outcome.stderr
