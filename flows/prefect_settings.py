"""Prefect's settings, put in place before Prefect is first imported. Importing this module does it; import it first.

The server that Prefect starts for a single command needs longer than its own limit on a slow machine, and is not to
report to anybody, nor is the client (which says on the first terminal that it would). Whoever points to a server
(PREFECT_API_URL) is not touched by what is for servers, and every value that is already set stays.
"""

from __future__ import annotations

import io
import logging
import os
import sys
import tomllib
from contextlib import redirect_stderr

from blockpruner.errors import ConfigurationError, nearest

_DEFAULTS = {
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
}
_CONSOLE_LEVEL = "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL"
_INTERNAL_LEVEL = "PREFECT_LOGGING_INTERNAL_LEVEL"
_SILENT = "CRITICAL"

for _name, _value in _DEFAULTS.items():
    os.environ.setdefault(_name, _value)


def be_quiet() -> None:
    """Let the command line do the talking: Prefect's log goes to its server, and not to the terminal.

    Nor does its complaint about a log or an event that a server did not take; whoever sets a level hears it all.
    """
    if os.environ.setdefault(_CONSOLE_LEVEL, _SILENT) == _SILENT:
        os.environ.setdefault(_INTERNAL_LEVEL, _SILENT)
        logging.raiseExceptions = False  # Python's own switch for errors of logging itself, which Prefect heeds


def require_valid_settings() -> None:
    """Make sure that Prefect, which this imports, can read its settings.

    Raises:
        ConfigurationError: if one is not valid; the first is named. What Prefect itself says of it is not shown.
    """
    from pydantic import ValidationError

    said = io.StringIO()
    try:
        with redirect_stderr(said):
            from prefect.settings import get_current_settings, load_profiles

            get_current_settings()
            profiles = load_profiles().names
    except tomllib.TOMLDecodeError as error:
        raise ConfigurationError(f"Prefect's profiles.toml cannot be read: {error}; mend that file") from error
    except ValidationError as error:
        problem = error.errors()[0]
        came = str(problem["input"])
        names = [
            name for name, value in os.environ.items() if name.startswith("PREFECT_") and value.lower() == came.lower()
        ]
        where = " or ".join(names) or f"{error.title}, {'.'.join(map(str, problem['loc']))}"
        raise ConfigurationError(
            f"a setting of Prefect is not valid: {where} is {came!r} ({problem['msg']}); mend it, "
            "in the environment or Prefect's profile, or leave it out"
        ) from error
    if (profile := os.environ.get("PREFECT_PROFILE")) and profile not in profiles:
        raise ConfigurationError(
            f"a setting of Prefect is not valid: PREFECT_PROFILE is {profile!r}, and there is no such profile"
            f"{nearest(profile, profiles)}; there are {', '.join(sorted(profiles))}"
        )
    sys.stderr.write(said.getvalue())


def is_quiet() -> bool:
    """Whether somebody else does the talking on the terminal."""
    return os.environ.get(_CONSOLE_LEVEL) == _SILENT
