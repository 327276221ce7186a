"""Counts how often a process changes a file of a folder, and kills it (SIGKILL) just before the n-th time.

So a test can choose a moment that is the same on every machine, however busy. What native code writes is not seen.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

_CHANGES = frozenset({"os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"})
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def die_before_change(number: int, folder: str, notes: str) -> None:
    """Count from now on; `number` 0: never die. `notes`: a file outside the folder that says how many there were."""

    def note(count: int) -> None:
        os.pwrite(descriptor, str(count).encode(), 0)
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)

    descriptor = os.open(notes, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    on_change(folder, note)


def on_change(folder: str, react: Callable[[int], None], event_wanted: str = "", name_wanted: str = "") -> None:
    """Call `react` with the number of the change, just before each one of this kind and with this in its path."""
    count = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if _changes(event, arguments, folder) and event_wanted in event and name_wanted in str(arguments[0]):
            count += 1
            react(count)

    sys.addaudithook(hook)


def _changes(event: str, arguments: tuple[Any, ...], folder: str) -> bool:
    if event == "open":
        path, _, flags = arguments
        return isinstance(flags, int) and bool(flags & _WRITES) and _is_in(path, folder)
    return event in _CHANGES and (_is_in(arguments[0], folder) or arguments[-1] not in (-1, None))


def _is_in(path: object, folder: str) -> bool:
    return isinstance(path, str | os.PathLike) and str(Path(path).absolute()).startswith(f"{folder}/")
