"""Prefect's settings, put in place before Prefect is first imported. Importing this module does it; import it first.

The server that Prefect starts for a single command needs longer than its own limit on a slow machine, and is not to
report to anybody. Whoever points to a server (PREFECT_API_URL) is not touched by either, and every value that is
already set stays.
"""

from __future__ import annotations

import os

_DEFAULTS = {
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
}
_QUIET = {
    "PREFECT_LOGGING_LEVEL": "ERROR",
    "PREFECT_LOGGING_SERVER_LEVEL": "ERROR",
}

for _name, _value in _DEFAULTS.items():
    os.environ.setdefault(_name, _value)


def be_quiet() -> None:
    """Let the command line do the talking: of Prefect's log only errors reach the terminal."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
