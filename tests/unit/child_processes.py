"""Runs a function of a test module in a process of its own, so that it can be waited for, watched and killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]
_PATIENCE_S = 30.0


@contextmanager
def child(function: Callable[..., object], *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """`function(*map(str, arguments))` in a fresh Python; killed at the end if it still runs."""
    code = f"import sys; from {function.__module__} import {function.__name__} as f; f(*sys.argv[1:])"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=_ROOT,
        env={**os.environ, "PYTHONPATH": str(_ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        kill(process)


def kill(process: subprocess.Popen[str]) -> None:
    """SIGKILL, and wait for the end."""
    if process.poll() is None:
        process.send_signal(signal.SIGKILL)
    process.communicate()


def succeed(process: subprocess.Popen[str]) -> str:
    """Wait for the process to end well, and give its standard output."""
    out, err = process.communicate(timeout=_PATIENCE_S)
    assert process.returncode == 0, err
    return out


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait until it holds."""
    deadline = time.monotonic() + _PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
