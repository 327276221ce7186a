"""A Prefect server that is gone: what is only shown is tried once, and errors are told from those of others."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import suppress
from threading import Thread

import httpx
import pytest
from prefect.artifacts import create_markdown_artifact
from prefect.settings import PREFECT_API_URL, PREFECT_SERVER_ALLOW_EPHEMERAL_MODE, temporary_settings

from blockpruner.errors import ConfigurationError
from flows.prefect_server import start_shielded_server
from flows.reporter import Reporter
from flows.server_contact import ServerLostError, losing_server_in_one_line, lost_server, shown


@pytest.fixture
def tries() -> list[object]:
    """The connections that the dying server has taken."""
    return []


@pytest.fixture
def dying(tries: list[object]) -> Iterator[str]:
    """The address of a server that takes a connection and says no more, which Prefect's clients try again."""

    def hang_up() -> None:
        with suppress(OSError):  # the end of the test
            while True:
                connection, peer = server.accept()
                tries.append(peer)
                connection.close()

    with socket.create_server(("127.0.0.1", 0)) as server:
        Thread(target=hang_up, daemon=True).start()
        address = f"http://127.0.0.1:{server.getsockname()[1]}/api"
        with temporary_settings({PREFECT_API_URL: address}):
            yield address


def refused(url: str) -> httpx.ConnectError:
    return httpx.ConnectError("Connection\nrefused", request=httpx.Request("POST", url))


def test_a_named_server_that_does_not_answer_is_refused_before_anything(dying: str, tries: list[object]) -> None:
    with pytest.raises(ConfigurationError, match=f"cannot be used: Failed to reach API at {dying}/? ") as caught:
        start_shielded_server()
    assert "\n" not in str(caught.value)
    assert len(tries) == 1


def test_where_no_server_is_named_and_none_may_be_started_it_is_said() -> None:
    neither = {PREFECT_API_URL: None, PREFECT_SERVER_ALLOW_EPHEMERAL_MODE: False}
    with temporary_settings(neither), pytest.raises(ConfigurationError, match="cannot be used: No Prefect API URL"):
        start_shielded_server()


@pytest.mark.filterwarnings("ignore:Artifact creation outside of a flow:FutureWarning")
@pytest.mark.usefixtures("dying")
def test_what_is_only_shown_is_tried_once_and_said_once(
    capsys: pytest.CaptureFixture[str], tries: list[object]
) -> None:
    tried = list[int]()

    def show() -> None:
        tried.append(1)
        create_markdown_artifact("x", key="x")

    assert not shown(Reporter(), "the tables", show, show, show)
    assert len(tried) == len(tries) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("Warning: Prefect's server does not take the tables: ")


def test_a_lost_server_is_one_line_that_says_how_to_go_on(dying: str) -> None:
    with pytest.raises(ServerLostError) as caught, losing_server_in_one_line():
        raise refused(f"{dying}/flow_runs/1/set_state")
    said = str(caught.value)
    assert "\n" not in said
    assert "Connection refused" in said
    assert "give the same command again to go on" in said


@pytest.mark.parametrize(
    "error", [refused("https://hub.example/api/models"), httpx.ConnectError("no request"), OSError("no"), ValueError()]
)
def test_what_others_did_not_answer_is_not_laid_to_the_server(error: Exception, dying: str) -> None:
    assert lost_server(error) is None
    with pytest.raises(type(error)) as caught, losing_server_in_one_line():
        raise error
    assert caught.value is error


def test_a_temporary_server_is_known_without_an_address() -> None:
    assert lost_server(refused("http://127.0.0.1:8123/api/flow_runs/")) is not None
    assert lost_server(refused("https://hub.example/api/models")) is None
