"""The server that Prefect starts for a single command, out of the terminal's reach.

Ctrl-C goes to every process of the terminal. A server that it ends takes no report any more, and Prefect tries to
reach it for more than a minute before a command ends. Knows no flow, and starts nothing where a server is named.
"""

from __future__ import annotations

import signal
from concurrent.futures import Future
from threading import Thread

import flows.prefect_settings  # noqa: F401  # isort: skip  # before Prefect is imported

from prefect.client.base import ServerType, determine_server_type
from prefect.server.api.server import SubprocessASGIServer


def start_shielded_server() -> None:
    """Start the temporary server that flows of this process will use, unless PREFECT_API_URL names one.

    A signal that is blocked stays blocked in a child, whatever handler it installs. Blocked in this thread alone, it
    still reaches the command itself, also while that waits for the server.
    """
    if determine_server_type() is not ServerType.EPHEMERAL:
        return
    started: Future[None] = Future()

    def start() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            SubprocessASGIServer().start()
        except Exception as error:  # noqa: BLE001  # raised where it is waited for
            started.set_exception(error)
        else:
            started.set_result(None)

    Thread(target=start, name="prefect-server-start", daemon=True).start()
    started.result()
