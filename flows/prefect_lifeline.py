"""Run as a program of its own: a uvicorn server that ends when the command that started it is gone, however it went.

    python -P prefect_lifeline.py DESCRIPTOR ARGUMENTS-OF-UVICORN...

The descriptor is the reading end of a pipe whose other end only that command holds: what the kernel closes when a
process ends, by `kill -9` as well, is the news of its end. Signals may be blocked here. Imports nothing of this
project.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import time
from threading import Thread

_GRACE_S = 5.0
"""For the server to end in its own way."""


def _end_with(descriptor: int) -> None:
    os.read(descriptor, 1)  # nothing is ever written: this returns at the end of the other side
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})  # in this thread, which is enough to be heard
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_GRACE_S)
    os._exit(1)


def main() -> None:
    """Watch, and be the server."""
    descriptor = int(sys.argv.pop(1))
    Thread(target=_end_with, args=(descriptor,), name="lifeline", daemon=True).start()
    runpy.run_module("uvicorn", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
