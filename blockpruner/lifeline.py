"""Run as a program of its own: another program that ends when the process that started it is gone, however it went.

    python -P lifeline.py DESCRIPTOR (FILE | -m MODULE) ARGUMENTS...

The descriptor is the reading end of a pipe whose other end only that process holds: what the kernel closes when a
process ends, by `kill -9` as well, is the news of its end. Signals may be blocked here. Imports nothing of this
project, so that a program which is to need nothing of it can be run by this.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import time
from threading import Thread

_GRACE_S = 5.0
"""For the program to end in its own way."""


def _end_with(descriptor: int) -> None:
    os.read(descriptor, 1)  # nothing is ever written: this returns at the end of the other side
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})  # in this thread, which is enough to be heard
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_GRACE_S)
    os._exit(1)


def main() -> None:
    """Watch, and be the program."""
    descriptor = int(sys.argv.pop(1))
    Thread(target=_end_with, args=(descriptor,), name="lifeline", daemon=True).start()
    if sys.argv[1] == "-m":
        sys.argv[:3] = [sys.argv[2]]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv[:2] = [sys.argv[1]]
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
