"""The processes that carry out a comparison's cells: started, given work, listened to, and ended with the comparison.

A cell that takes its process with it (out of memory, a crash in native code) costs that cell alone: the next one gets a
new process. Imports nothing heavy; knows no Prefect.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO

from pydantic import ValidationError

from flows.cell_worker import Event, Request

_STOP_S = 30.0
"""How long a process has to close its records."""
_PACKAGE_PARENT = str(Path(__file__).resolve().parents[1])

Listener = Callable[[Event], None]


class CellPool:
    """So many processes, each of which carries out one cell at a time."""

    def __init__(self, workspace: Path, width: int, *, spread: bool = True) -> None:
        """Processes are started when they are needed.

        Args:
            workspace: where they work.
            width: how many there are.
            spread: whether each may have a GPU of its own, where there are several.
        """
        self._workspace, self._width, self._spread = workspace, width, spread
        self._slots: queue.Queue[int] = queue.Queue()
        for slot in range(width):
            self._slots.put(slot)
        self._processes: dict[int, subprocess.Popen[str]] = {}
        self._guard = threading.Lock()
        self._stopped = False

    @property
    def is_stopped(self) -> bool:
        """Whether no more cells are taken."""
        return self._stopped

    def carry_out(self, request: Request, listener: Listener) -> Event:
        """Have a cell carried out, and return the event that says how it ended. From any thread.

        A process that dies is an end like any other, with an error.
        """
        slot = self._slots.get()
        try:
            process = self._process(slot)
            if process is None:
                return Event(kind="end", text="stopped before it began", stopped=True)
            return self._converse(slot, process, request, listener) or self._died(slot, process)
        finally:
            self._slots.put(slot)

    def stop(self) -> None:
        """End every process, and wait until they have closed their records."""
        with self._guard:
            self._stopped = True
            processes = list(self._processes.values())
        for process in processes:
            _close_input(process)
        for process in processes:
            try:
                process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            _close_output(process)

    def _process(self, slot: int) -> subprocess.Popen[str] | None:
        """The slot's process, started if there is none; None once the pool is stopped."""
        with self._guard:
            if self._stopped:
                return None
            process = self._processes.get(slot)
            if process is None or process.poll() is not None:
                process = self._processes[slot] = self._start(slot)
            return process

    def _start(self, slot: int) -> subprocess.Popen[str]:
        """In a session of its own, out of the terminal's reach: the comparison takes Ctrl-C, and ends its processes."""
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "flows.cell_worker", json.dumps(str(self._workspace))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="replace",
            env={**os.environ, **environment_of(slot, self._width, spread=self._spread)},
            start_new_session=True,
        )

    def _converse(
        self, slot: int, process: subprocess.Popen[str], request: Request, listener: Listener
    ) -> Event | None:
        """Ask, and listen to the end; None if the process ends first."""
        try:
            for event in _events(process, request):
                if event.kind == "end":
                    return event
                listener(event)
        except BaseException:
            self._discard(slot, process)
            raise
        return None

    def _discard(self, slot: int, process: subprocess.Popen[str]) -> None:
        """End a process that may still be answering: what it says next would be taken for another cell's."""
        with self._guard:
            self._processes.pop(slot, None)
        _close_input(process)
        process.kill()
        process.wait()
        _close_output(process)

    def _died(self, slot: int, process: subprocess.Popen[str]) -> Event:
        status = process.wait()
        with self._guard:
            if self._processes.pop(slot, None) is not None:
                _close_input(process)
                _close_output(process)
        if self._stopped:
            return Event(kind="end", text="stopped", stopped=True)
        how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        hint = " (out of memory?)" if status == -signal.SIGKILL else ""
        return Event(kind="end", text=f"the process of this cell {how}{hint}")


def _events(process: subprocess.Popen[str], request: Request) -> Iterator[Event]:
    """What it says to a request, until it has died or been stopped."""
    for line in _lines(process, request):
        try:
            event = Event.model_validate_json(line)
        except ValidationError:  # torn by its end
            continue
        yield event


def _lines(process: subprocess.Popen[str], request: Request) -> Iterator[str]:
    assert process.stdin is not None
    assert process.stdout is not None
    line = request.model_dump_json() + "\n"
    with suppress(BrokenPipeError, ValueError):  # it has died, or has just been stopped and its pipes closed
        process.stdin.write(line)
        process.stdin.flush()
    while said := _next_line(process.stdout):
        yield said


def _next_line(output: IO[str]) -> str:
    try:
        return output.readline()
    except ValueError:  # as above
        return ""


def environment_of(slot: int, width: int, *, spread: bool) -> dict[str, str]:
    """What one of several processes has for itself: its share of the cores, and a GPU where there are several."""
    own = {"PYTHONPATH": os.pathsep.join(filter(None, [_PACKAGE_PARENT, os.environ.get("PYTHONPATH")]))}
    if width == 1:
        return own
    if "OMP_NUM_THREADS" not in os.environ:
        own["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // width))
    if spread and len(devices := _devices()) > 1:
        own["CUDA_VISIBLE_DEVICES"] = devices[slot % len(devices)]
    return own


def _devices() -> list[str]:
    """The GPUs that may be used, as CUDA_VISIBLE_DEVICES names them."""
    if (listed := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in listed.split(",") if name]
    return [str(index) for index, _ in enumerate(Path("/dev").glob("nvidia[0-9]*"))]


def _close_output(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    process.stdout.close()


def _close_input(process: subprocess.Popen[str]) -> None:
    """Which tells it to end."""
    assert process.stdin is not None
    with suppress(OSError):
        process.stdin.close()
