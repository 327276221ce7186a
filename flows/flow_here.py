"""Runs a flow in this process, for a command: what the flow did counts, whatever becomes of Prefect's server.

Prefect tries each report again for a minute, then reports that it could not report, and as Python ends sends what logs
and events are left, each with the same patience: minutes after the work is done. A command asks a server that is gone
for a quarter of a minute, hardly again once that was in vain or it was told to end, and leaves the rest unsent. Knows
no flow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import flows.prefect_settings  # noqa: F401  # isort: skip  # before Prefect is imported

import httpx
from prefect.context import SyncClientContext
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, get_current_settings, temporary_settings

from flows.boundary import leave_threads_behind
from flows.interruptions import INTERRUPTIONS
from flows.server_contact import CONTACT, Contact, ServerLostError, losing_server_in_one_line

_RETRIES = 3
"""After about 2, 6 and 14 seconds, unless a setting of Prefect's says how many."""
_CONNECT_S = 10.0
"""For a machine that is gone; one that is there takes a connection at once, however busy it is."""

ResultT = TypeVar("ResultT")


def run_here(flow: Callable[..., ResultT], *parameters: object, warn: Callable[[str], None]) -> ResultT:
    """Run a flow whose body hands over its result. A server that is gone by its end is said in one line.

    Raises:
        Exception: what a stage has failed with, whatever the server heard of it.
        ServerLostError: if the server was gone before the body had ended.
    """
    contact = Contact()
    token = CONTACT.set(contact)
    try:
        with losing_server_in_one_line(), temporary_settings(_patience()), SyncClientContext() as connected:
            _Watched().watch(connected.client._client)
            return flow(*parameters)
    except ServerLostError as error:
        leave_threads_behind()
        if INTERRUPTIONS.received or not (contact.results or contact.failure):
            raise
        if not contact.is_loss_said:
            warn(f"{error.what}: the run has ended here, and there it stays `Running` until you set its state")
        if contact.failure is not None:
            raise contact.failure from None
        (result,) = contact.results
        return result  # type: ignore[no-any-return]
    finally:
        CONTACT.reset(token)


def handed_over(result: ResultT) -> ResultT:
    """The result of a flow's body, which is now there whatever Prefect makes of it."""
    if (contact := CONTACT.get()) is not None:
        contact.results.append(result)
    return result


@contextmanager
def failure_kept() -> Iterator[None]:
    """Let what the body fails with be the command's error, also where Prefect cannot report it."""
    contact = CONTACT.get() or Contact()
    try:
        yield
    except Exception as error:
        contact.failure = error
        raise
    contact.failure = None  # of a try before this one


def _patience() -> dict[Any, int]:
    is_set = "max_retries" in get_current_settings().client.model_fields_set
    return {} if is_set else {PREFECT_CLIENT_MAX_RETRIES: _RETRIES}


class _GaveUpError(httpx.TransportError):
    """The server is gone. Prefect does not try again after an error that it does not know."""


class _Watched:
    """One client's requests, of which none is made again once it is known to be in vain."""

    def __init__(self) -> None:
        self._unanswered: httpx.Request | None = None
        self._is_gone = False

    def watch(self, client: httpx.Client) -> None:
        """From now on. Prefect's own client has no public way to it."""
        client.timeout = httpx.Timeout(client.timeout.read, connect=_CONNECT_S)
        hooks = client.event_hooks
        client.event_hooks = {
            "request": [*hooks["request"], self._asks],
            "response": [*hooks["response"], self._is_answered],
        }

    def _asks(self, request: httpx.Request) -> None:
        if request is self._unanswered:
            if self._is_gone or INTERRUPTIONS.received:
                self._is_gone = True
                raise _GaveUpError("asked several times", request=request)
        elif self._unanswered is not None:  # which was given up
            self._is_gone = True
        self._unanswered = request

    def _is_answered(self, _: httpx.Response) -> None:
        self._unanswered, self._is_gone = None, False
