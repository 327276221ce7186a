"""The command line, called as a user calls it: in this process where speed matters, or in one of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


def start(*arguments: object, **environment: str) -> subprocess.Popen[str]:
    """Start the command line in a process of its own, at the head of a group as in a terminal."""
    return subprocess.Popen(
        [sys.executable, "-c", "from flows.cli import app; app(prog_name='blockpruner')", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def in_a_process(*arguments: object, timeout: float = 120.0, **environment: str) -> Outcome:
    """Call the command line in a process of its own."""
    process = start(*arguments, **environment)
    stdout, stderr = process.communicate(timeout=timeout)
    return Outcome(process.returncode, stdout, stderr)
