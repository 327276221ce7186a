"""What becomes of a run when Prefect's server is gone: only what is shown there is lost, and one line says so.

Prefect tries every request again for a minute. That is right for a run's state and wrong for a table, so what is only
shown is tried once. Knows no flow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import flows.prefect_settings  # noqa: F401  # isort: skip  # before Prefect is imported

import httpx
from prefect import get_client
from prefect._internal.concurrency.cancellation import shield
from prefect.exceptions import PrefectException
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from blockpruner.errors import BlockPrunerError, ConfigurationError
from flows.reporter import Reporter
from flows.wording import one_line

_SERVER_ERRORS = (httpx.HTTPError, PrefectException, OSError)
_PATIENCE_S = 10.0
"""For a server's first answer."""
_HERE = ("127.0.0.1", "localhost", "::1")


class ServerLostError(BlockPrunerError):
    """Prefect's server does not answer any more."""

    def __init__(self, what: str) -> None:
        """Say it, and how to go on. `what`: without that."""
        super().__init__(
            f"{what}; what was finished is kept: see that it runs, and give the same command again to go on"
        )
        self.what = what


def require_server() -> None:
    """Make sure that the server which Prefect's settings name answers, and is of a version that fits.

    Prefect's cloud is not asked: it fits any version.

    Raises:
        ConfigurationError: if it does not, or none is named.
    """
    try:
        with (
            temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}),
            get_client({"timeout": _PATIENCE_S}, sync_client=True) as client,
        ):
            client.raise_for_api_version_mismatch()
    except (*_SERVER_ERRORS, RuntimeError, ValueError) as error:  # the last two are Prefect's own
        cause = f" ({one_line(str(error.__cause__))})" if error.__cause__ else ""
        raise ConfigurationError(
            f"Prefect's server cannot be used: {one_line(str(error))}{cause}; start it, or correct PREFECT_API_URL in "
            "the environment or Prefect's profile; where it is not set, the command starts a server for itself"
        ) from error


@dataclass
class Contact:
    """That of a command with the server, while a flow of its own runs."""

    results: list[Any] = field(default_factory=list)
    """What the flow's body has handed over: nothing yet, or one."""
    failure: Exception | None = None
    """What a stage has failed with, of which the server may not have heard."""
    is_loss_said: bool = False


CONTACT: ContextVar[Contact | None] = ContextVar("contact", default=None)
"""None: no command runs the flow, but a worker of Prefect's."""


def shown(reporter: Reporter, what: str, *actions: Callable[[], object]) -> bool:
    """Show things on the server, each tried once; at the first that it does not take this is said, and False."""
    with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}):
        for action in actions:
            try:
                action()
            except _SERVER_ERRORS as error:
                _say_not_shown(reporter, what, error)
                return False
    return True


def _say_not_shown(reporter: Reporter, what: str, error: Exception) -> None:
    """A command says of a server that is gone no more than that, and once."""
    contact, lost = CONTACT.get(), _lost(error)
    if contact is None or lost is None:
        reporter.warn(f"Prefect's server does not take {what}: {one_line(str(error))}")
    elif not contact.is_loss_said:
        contact.is_loss_said = True
        reporter.warn(
            f"{lost}: the run goes on here, to its end, and there it stays `Running` unless the server is back by then"
        )


@contextmanager
def whatever_becomes_of_its_slot() -> Iterator[None]:
    """Let a flow's body end, also where the server could not be reached and took the deployment's slot back.

    Prefect then stops a flow in the middle of whatever it does; hours of searching are worth more than a slot. Raises
    Prefect's cancellation when the body has ended. An order to end (SIGTERM, and so a cancelled run) is not held up.
    """
    with shield():
        yield


@contextmanager
def losing_server_in_one_line() -> Iterator[None]:
    """Make one line of a server that is gone while a flow runs.

    Raises:
        ServerLostError: in place of what a client of the server raised.
    """
    try:
        yield
    except httpx.TransportError as error:
        if (what := _lost(error)) is None:
            raise
        raise ServerLostError(what) from error


def lost_server(error: BaseException) -> str | None:
    """What to say where an error is a request to Prefect's server that was not answered; None for any other."""
    return str(ServerLostError(what)) if (what := _lost(error)) else None


def _lost(error: BaseException) -> str | None:
    if not isinstance(error, httpx.TransportError) or not _was_for_server(error):
        return None
    return f"Prefect's server does not answer any more ({one_line(str(error)) or type(error).__name__})"


def _was_for_server(error: httpx.TransportError) -> bool:
    try:
        url = error.request.url
    except RuntimeError:  # which httpx raises where it does not know
        return False
    api = PREFECT_API_URL.value()
    return str(url).startswith(api) if api else url.host in _HERE
