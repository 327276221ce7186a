"""Files that somebody else may have made: read where they are files at all, and their JSON however deep it is.

What is in them is for whoever asks. Knows no format but JSON.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any


def read_plain_file(path: Path) -> bytes:
    """The content of a file. A pipe, which would be waited for, and a device, which may never end, are none.

    Raises:
        OSError: if it is not there, cannot be read, or is no file.
    """
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY), "rb") as file:  # noqa: PTH123
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "Not a file", str(path))
        return file.read()


def parsed_json(text: str | bytes) -> Any:
    """What a JSON text holds.

    Raises:
        ValueError: if it is not JSON, not UTF-8, or nested deeper than can be followed.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
