"""The command line, called as a user calls it: in this process where speed matters, or in one of its own."""

from __future__ import annotations

import ctypes
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from typer.testing import CliRunner

from flows.cli import app

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Outcome:
    """What a command left."""

    status: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        """The last line of standard output, which must be the only one."""
        assert self.status == 0, self.stderr
        (line,) = self.stdout.splitlines()
        return json.loads(line)


def blockpruner(*arguments: object) -> Outcome:
    """Call the command line in this process."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="blockpruner")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Outcome(result.exit_code, result.stdout, result.stderr)


def as_anybody() -> None:
    """In a process about to be started: even as root, heed who may read and write a file (CAP_DAC_* are dropped)."""
    libc = ctypes.CDLL(None)
    for capability in (1, 2):
        libc.prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP; fails, and need not, for whoever is not root


def with_files_of(num_bytes: int) -> Callable[[], None]:
    """In a process about to be started: files cannot grow beyond this, as on a disk that is full."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))


def start(
    *arguments: object, before: Callable[[], None] | None = None, stdout: IO[bytes] | None = None, **environment: str
) -> subprocess.Popen[str]:
    """Start the command line in a process of its own, at the head of a group as in a terminal.

    `before` is called in that process; it may restrict it.
    """
    return subprocess.Popen(
        [sys.executable, "-c", "from flows.cli import app; app(prog_name='blockpruner')", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stdout=stdout or subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=before,
    )


def in_a_process(
    *arguments: object,
    timeout: float = 120.0,
    before: Callable[[], None] | None = None,
    stdout: IO[bytes] | None = None,
    **environment: str,
) -> Outcome:
    """Call the command line in a process of its own."""
    process = start(*arguments, before=before, stdout=stdout, **environment)
    said, stderr = process.communicate(timeout=timeout)
    return Outcome(process.returncode, said or "", stderr)
