"""A command's own flow and a Prefect server that goes away: how often it is asked, and what becomes of the result."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from types import SimpleNamespace

import httpx
import prefect.client.base
import pytest
from prefect import __version__, get_client
from prefect.settings import (
    PREFECT_API_URL,
    PREFECT_CLIENT_CSRF_SUPPORT_ENABLED,
    PREFECT_CLIENT_MAX_RETRIES,
    PREFECT_CLIENT_RETRY_JITTER_FACTOR,
    temporary_settings,
)

from blockpruner.errors import ConfigurationError
from flows import flow_here
from flows.flow_here import failure_kept, handed_over, run_here
from flows.interruptions import INTERRUPTIONS
from flows.reporter import Reporter
from flows.server_contact import ServerLostError, shown


class Server:
    """One that says its version, and hangs up on whatever else it is asked while it is gone."""

    def __init__(self) -> None:
        self.is_gone = False
        self.asked: list[str] = []
        server = self

        class Answers(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.asked.append(self.path)
                if server.is_gone:
                    self.close_connection = True
                    return
                content = json.dumps(__version__).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                """Say nothing."""

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
        self.address = f"http://127.0.0.1:{self._http.server_address[1]}/api"
        Thread(target=self._http.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long Prefect would have waited between its tries; nobody does here."""
    slept: list[float] = []
    monkeypatch.setattr(prefect.client.base, "time", SimpleNamespace(sleep=slept.append))
    return slept


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    server = Server()
    settings = {
        PREFECT_API_URL: server.address,
        PREFECT_CLIENT_CSRF_SUPPORT_ENABLED: False,
        PREFECT_CLIENT_RETRY_JITTER_FACTOR: 0,
    }
    monkeypatch.setattr(flow_here, "leave_threads_behind", lambda: None)  # which ends this process with a command
    with temporary_settings(settings):
        yield server
    server.close()


def report() -> object:
    """Ask Prefect's server, as its engine does."""
    return get_client(sync_client=True)._client.get("/flow_runs/state")


def run(flow: Callable[[], object], said: list[str] | None = None) -> object:
    return run_here(flow, warn=(said if said is not None else []).append)


def test_a_server_that_goes_after_the_work_is_done_costs_a_line(server: Server, slept: list[float]) -> None:
    """Prefect reports the end, and where that fails a failure: neither takes the minute that each takes otherwise."""

    def flow() -> object:
        result = handed_over({"done": True})
        server.is_gone = True
        try:
            report()
        except httpx.TransportError:
            report()
        return result

    said: list[str] = []
    assert run(flow, said) == {"done": True}
    assert slept == [2, 4, 8, 2]
    (line,) = said
    assert line.startswith("Prefect's server does not answer any more (")
    assert "the run has ended here, and there it stays `Running`" in line


def test_what_was_said_while_the_work_went_on_is_not_said_again(
    server: Server, slept: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    def flow() -> object:
        server.is_gone = True
        assert not shown(Reporter(), "the progress any more", report)
        assert not shown(Reporter(), "this run's tables", report)
        handed_over(1)
        return report()

    assert run(flow, []) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("Warning: Prefect's server does not answer any more (")
    assert "the run goes on here" in line
    said: list[str] = []
    server.is_gone = False
    run(flow, said)
    assert said == []


def test_a_server_that_comes_back_is_told(server: Server, slept: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    def flow() -> object:
        server.is_gone = True
        monkeypatch.setattr(prefect.client.base.time, "sleep", comes_back)
        report()
        return "reported"

    def comes_back(seconds: float) -> None:
        slept.append(seconds)
        server.is_gone = sum(slept) < 10

    said: list[str] = []
    assert run(flow, said) == "reported"
    assert (slept, said) == ([2, 4, 8], [])


def test_a_server_that_goes_before_the_work_is_done_is_an_error(server: Server, slept: list[float]) -> None:
    def flow() -> object:
        server.is_gone = True
        return report()

    with pytest.raises(ServerLostError, match="give the same command again to go on"):
        run(flow)


def test_what_a_stage_failed_with_is_not_hidden_by_a_server_that_is_gone(server: Server, slept: list[float]) -> None:
    """Prefect reports the failure, and that it cannot is what comes out of the task."""

    def flow() -> object:
        with suppress(ConfigurationError), failure_kept():
            raise ConfigurationError("the first try")
        with failure_kept():
            pass
        server.is_gone = True
        try:
            with failure_kept():
                raise ConfigurationError("no such text")
        except ConfigurationError:
            return report()

    said: list[str] = []
    with pytest.raises(ConfigurationError, match="no such text"):
        run(flow, said)
    assert len(said) == 1


def test_whoever_sets_a_patience_has_it(server: Server, slept: list[float]) -> None:
    def flow() -> object:
        server.is_gone = True
        return report()

    with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 6}), pytest.raises(ServerLostError):
        run(flow)
    assert slept == [2, 4, 8, 16, 32, 64]


def test_whoever_was_told_to_end_asks_once_more_at_most(server: Server, slept: list[float]) -> None:
    """Prefect then reports a crash. Also where the work was done: the command says that it was stopped."""

    def flow() -> object:
        handed_over("done")
        server.is_gone = True
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        except KeyboardInterrupt:
            report()
        raise AssertionError("not reached")

    with INTERRUPTIONS.watched(), pytest.raises(ServerLostError):
        run(flow)
    assert slept == [2]
