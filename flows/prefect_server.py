"""The server that Prefect starts for a single command: deaf to signals, and no longer there than that command is.

Ctrl-C goes to every process of a terminal, and the SIGTERM of `timeout`, systemd or Slurm to every process of a group
or a job. A server that it ends takes no report any more, and Prefect tries to reach it for more than two minutes before
a command ends. A command that is killed (`kill -9`, out of memory) stops nothing itself, so the server watches it.
Knows no flow, and starts nothing where a server is named.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import nullcontext, suppress
from threading import Thread
from typing import IO, Any

from flows.prefect_settings import is_quiet  # isort: skip  # before Prefect is imported

import prefect
from prefect.client.base import ServerType, determine_server_type
from prefect.server.api.server import SubprocessASGIServer
from prefect.settings import PREFECT_HOME, get_current_settings

from blockpruner.errors import ConfigurationError
from blockpruner.fresh_process import Lifeline
from flows.server_contact import require_server
from flows.wording import one_line

_TRIES = 3
_STARTED_AGAIN = 3
"""The status with which uvicorn ends where the server's own start fails."""
_NOT_FOR_THE_SERVER = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


def start_shielded_server() -> None:
    """Start the temporary server that flows of this process will use, unless PREFECT_API_URL names one.

    A signal that is blocked stays blocked in a child, whatever handler it installs. Blocked in this thread alone, it
    still reaches the command itself, also while that waits for the server.

    Raises:
        ConfigurationError: if it cannot start, or the one that is named cannot be used.
    """
    if determine_server_type() is not ServerType.EPHEMERAL:
        require_server()
        return
    started: Future[None] = Future()

    def start() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, _NOT_FOR_THE_SERVER)
        server = _WatchingServer()
        server.ended = lambda reason: fail(_no_server(reason))
        try:
            server.start()
        except RuntimeError as error:  # Prefect's, when it has waited long enough
            fail(_no_server(one_line(str(error))))
        except Exception as error:  # noqa: BLE001  # raised where it is waited for
            fail(error)
        else:
            with suppress(InvalidStateError):
                started.set_result(None)

    def fail(error: Exception) -> None:
        with suppress(InvalidStateError):  # of what has started, or failed before
            started.set_exception(error)

    Thread(target=start, name="prefect-server-start", daemon=True).start()
    started.result()


def _no_server(reason: str) -> ConfigurationError:
    return ConfigurationError(
        f"Prefect's temporary server cannot be started ({reason}); see that {PREFECT_HOME.value()} can be written and "
        "has space, or search, export and evaluate with the commands of these names, which need no Prefect"
    )


class _WatchingServer(SubprocessASGIServer):
    """Prefect's server with a lifeline. Prefect keeps one server a process, and finds this one for its flows."""

    _lifeline: Lifeline | None = None
    _num_started = 0
    ended: Callable[[str], None]
    """Called with the reason when the server has ended and Prefect does not start another."""

    def _run_uvicorn_command(self) -> subprocess.Popen[Any]:
        """As Prefect 3.8 has it, with our program in uvicorn's place.

        Prefect calls it again whenever the server ends at its start, for it might be that the port was taken.
        """
        self._num_started += 1
        if self._num_started > _TRIES:
            raise _no_server(f"ended {_TRIES} times at its start")
        if self._lifeline is not None:  # of a try on a port that was taken meanwhile
            self._lifeline.close()
        self._lifeline = Lifeline()
        server = subprocess.Popen(
            self._lifeline.command(
                *("-m", "uvicorn", "--app-dir", str(prefect.__module_path__.parent)),
                *("--factory", "prefect.server.api.server:create_app"),
                *("--host", "127.0.0.1", "--port", str(self.port)),
                *("--log-level", "error", "--lifespan", "on"),
            ),
            env={
                **os.environ,
                "PREFECT_UI_ENABLED": "0",
                "PREFECT__SERVER_EPHEMERAL": "1",
                "PREFECT__SERVER_FINAL": "1",
                **get_current_settings().to_environment_variables(exclude_unset=True),
            },
            pass_fds=(self._lifeline.watched,),
            stderr=subprocess.PIPE if is_quiet() else None,
            text=True,
        )
        # Prefect would read what this one reads, and wait for ever.
        says, server.stderr = server.stderr, None
        Thread(target=self._watch, args=(server, says), name="prefect-server-watch", daemon=True).start()
        return server

    def _watch(self, server: subprocess.Popen[str], says: IO[str] | None) -> None:
        """To its end. For one that ends at its start with any other status than this Prefect waits all the same."""
        last = ""
        with says or nullcontext(()) as lines:
            for line in lines:
                last = one_line(line) or last
        status = server.wait()
        if status != _STARTED_AGAIN:
            self.ended(last or f"it ended with status {status}")

    def stop(self) -> None:
        """As Prefect has it, and by the lifeline: the signal that Prefect sends is not heard."""
        if self._lifeline is not None:
            self._lifeline.close()
        super().stop()
