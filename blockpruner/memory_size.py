"""Amounts of memory as people write them: '8GiB', '80 GB', '512MB'."""

from __future__ import annotations

import re

from blockpruner.errors import ConfigurationError
from blockpruner.paths import shortened

_UNITS = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}
_MOST = 2**60
_WRITTEN = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*((?:[KMGT]i?)?B)\s*", re.IGNORECASE)


def parse_memory_size(text: str) -> int:
    """Bytes.

    Raises:
        ConfigurationError: if the text is no positive amount with a unit, or more than an exbibyte.
    """
    match = _WRITTEN.fullmatch(text)
    num_bytes = float(match[1]) * _UNITS[match[2].upper()] if match else 0.0
    if num_bytes < 1:
        raise ConfigurationError(
            f"{shortened(repr(text))} is no amount of memory; write it with a unit, as 8GiB, 80GB or 512MiB"
        )
    if num_bytes > _MOST:
        raise ConfigurationError(f"{shortened(repr(text))} is more memory than any device has; give the device's own")
    return int(num_bytes)
