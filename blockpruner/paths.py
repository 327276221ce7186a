"""Paths as users type them: ~ is a home folder, and what can be no path at all is refused in one line.

Opens nothing. What lies at a path, and whether it may be read, is for whoever opens it.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from blockpruner.errors import ConfigurationError

_SHOWN = 80


def user_path(text: str | Path) -> Path:
    """The path that a user means.

    Raises:
        ConfigurationError: if it names the home of nobody, or is longer than the file system allows.
    """
    if "\0" in str(text):
        raise ConfigurationError(f"{shortened(repr(str(text)))} is no path: it holds a null character; leave that out")
    try:
        path = Path(text).expanduser()
    except RuntimeError as error:
        raise ConfigurationError(
            f"{shortened(str(text))} begins with the home folder of a user who is not known here; give the whole path"
        ) from error
    if _is_too_long(path):
        raise ConfigurationError(
            f"{shortened(str(text))} is longer than the file system allows ({len(str(text))} characters); "
            "give a shorter path"
        )
    return path


def shortened(text: str) -> str:
    """The text with its middle left out, if it is too long to be shown."""
    half = _SHOWN // 2
    return text if len(text) <= 2 * _SHOWN else f"{text[:half]}...{text[-half:]}"


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Put the path on the operating system's errors that name none: writing and flushing do not know their file."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def _is_too_long(path: Path) -> bool:
    try:
        os.lstat(path)
    except OSError as error:
        return error.errno == errno.ENAMETOOLONG
    except ValueError:  # not even in the file system's encoding
        return False
    return False
