"""Amounts of memory as people write them: '8GiB', '80 GB', '512MB'."""

from __future__ import annotations

import re

from blockpruner.errors import ConfigurationError

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
_WRITTEN = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?i?B)\s*", re.IGNORECASE)


def parse_memory_size(text: str) -> int:
    """Bytes.

    Raises:
        ConfigurationError: if the text is no positive amount with a unit.
    """
    match = _WRITTEN.fullmatch(text)
    num_bytes = int(float(match[1]) * _UNITS[match[2].upper()]) if match else 0
    if num_bytes <= 0:
        raise ConfigurationError(f"{text!r} is no amount of memory; write it with a unit, as 8GiB, 80GB or 512MiB")
    return num_bytes
