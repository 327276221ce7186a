"""Programs in processes of their own that end with this one, by `kill -9` as well (see `lifeline`).

What goes on computing for nobody holds a model in memory, beside the run that does the same again.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_LIFELINE = Path(__file__).with_name("lifeline.py")


class Lifeline:
    """What programs are started with; they end when it is closed, or this process is gone."""

    def __init__(self) -> None:
        """Open it; no child inherits the end that is held."""
        self.watched, self._held = os.pipe()
        """The end for a child, to be passed on."""

    def command(self, *program: str) -> list[str]:
        """The command line that runs a Python program (a file, or `-m` and a module) with its arguments.

        The script's own folder is not searched for modules (-P).
        """
        return [sys.executable, "-P", str(_LIFELINE), str(self.watched), *program]

    def close(self) -> None:
        """End what was started; once is enough."""
        for descriptor in (self.watched, self._held):
            if descriptor >= 0:
                os.close(descriptor)
        self.watched = self._held = -1


def run_fresh(program: Path, *arguments: str, given: str = "") -> subprocess.CompletedProcess[str]:
    """Run a program to its end; `given` is its standard input, and what it says is in the answer."""
    with _lifeline() as lifeline:
        return subprocess.run(
            lifeline.command(str(program), *arguments),
            input=given,
            capture_output=True,
            text=True,
            check=False,
            pass_fds=(lifeline.watched,),
        )


@contextmanager
def _lifeline() -> Iterator[Lifeline]:
    lifeline = Lifeline()
    try:
        yield lifeline
    finally:
        lifeline.close()
