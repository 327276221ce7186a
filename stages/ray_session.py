"""Ray, started for one search or joined where it runs already, and left as it was found.

Started here it listens on 127.0.0.1 alone and to this process alone, without dashboard or usage statistics, with its
files in a folder that goes when the search ends. A cluster that is joined listens where whoever started it said.
"""

from __future__ import annotations

import fcntl
import logging
import os
import secrets
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from blockpruner.errors import ExecutorError
from stages.executor import ExecutorSettings

_LOOPBACK = "127.0.0.1"
_OBJECT_STORE_BYTES = 100 * 2**20
"""For token ids and scores; Ray would take a third of the machine's memory."""
_LONGEST_FOLDER = 40
"""Characters. Ray's sockets lie about sixty deeper, and the system takes 107 in all."""
_PREFIX, _OWNED = "bp-", "owned"
"""How such folders are called, and the file in them that their owner has locked."""

_VITAL = ("raylet", "gcs_server")
"""Of Ray's processes."""

_SAYS_LITTLE: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
_QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
# Ray would have its workers give way to everything else on the machine; a search without it does not.
_AS_IMPORTANT = {"RAY_worker_niceness": "0"}
# What makes Ray stay on loopback, as it does by itself on macOS: it replaces a 127.0.0.1 that it is given as this
# machine's address by the one that others reach it by.
_ON_LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
# Other users of this machine reach its loopback as well: a token of this process's own, not the one in the home folder.
_TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


_FOR_TORCH = ("OMP_WAIT_POLICY", "PYTORCH_CUDA_ALLOC_CONF", "THP_MEM_ALLOC_ENABLE")


def workers_environment(settings: ExecutorSettings) -> dict[str, str]:
    """What this process has told torch and a Ray that was started before does not know."""
    return {name: os.environ[name] for name in _FOR_TORCH if settings.ray_address and name in os.environ}


@contextmanager
def ray_session(settings: ExecutorSettings) -> Iterator[Any]:
    """Ray's module, connected while the body runs.

    Raises:
        ExecutorError: if Ray does not start, or the cluster cannot be joined.
    """
    with ExitStack() as stack:
        stack.enter_context(
            _environment(_QUIET if settings.ray_address else {**_QUIET, **_AS_IMPORTANT, **_ON_LOOPBACK, **_TOKEN})
        )
        folder = stack.enter_context(_folder()) if settings.ray_address is None else None
        with _handlers_kept():
            import ray  # reads its environment when it is imported

            stack.callback(ray.shutdown)
            if settings.ray_address is not None:
                _join(ray, settings.ray_address)
            elif folder is not None:
                _start(ray, folder)
        yield ray


def has_died(ray: Any) -> bool:
    """Whether the Ray that was started here has ended, or what it cannot be without.

    Ray itself waits some ten seconds for what ended, and then ends this process at once, without a word of its own.
    What says so is private: look again when Ray is upgraded, and `test_ray` does.
    """
    node = getattr(getattr(getattr(ray, "_private", None), "worker", None), "_global_node", None)
    processes = getattr(node, "all_processes", {})
    return any(each.process.poll() is not None for name in _VITAL for each in processes.get(name, ()))


def _join(ray: Any, address: str) -> None:
    try:
        ray.init(address=address, **_SAYS_LITTLE)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ExecutorError(
            f"the Ray cluster at {address} cannot be joined ({' '.join(str(error).split())[:200]}); this machine must "
            f"be part of it: `ray start --address={address}`, with the same versions of Python and Ray"
        ) from error


def _start(ray: Any, folder: Path) -> None:
    try:
        ray.init(
            address="local",
            num_cpus=len(os.sched_getaffinity(0)),
            num_gpus=torch.cuda.device_count() if torch.cuda.is_available() else 0,
            include_dashboard=False,
            object_store_memory=_OBJECT_STORE_BYTES,
            _node_ip_address=_LOOPBACK,
            _temp_dir=str(folder / "ray"),  # Ray opens it to all; the folder around it is closed
            **_SAYS_LITTLE,
        )
    except (ConnectionError, RuntimeError, TimeoutError) as error:
        raise ExecutorError(
            f"Ray does not start on this machine ({' '.join(str(error).split())[:200]}); leave --executor out"
        ) from error
    addresses = {node["NodeManagerAddress"] for node in ray.nodes()}
    if addresses != {_LOOPBACK}:  # imported by another before its environment was set
        raise ExecutorError(f"Ray listens on {', '.join(sorted(addresses))} and not on {_LOOPBACK}; it is ended again")


@contextmanager
def _folder() -> Iterator[Path]:
    """A folder of its own for Ray's files, with a short path; those that killed processes have left go first.

    Ray's own processes watch one another, and end some time after who started them.
    """
    usual = tempfile.gettempdir()
    parent = Path(usual if len(usual) < _LONGEST_FOLDER else "/tmp")
    for owned in parent.glob(f"{_PREFIX}*/{_OWNED}"):
        _remove_if_left(owned)
    with tempfile.TemporaryDirectory(prefix=_PREFIX, dir=parent, ignore_cleanup_errors=True) as made:
        folder = Path(made)
        with (folder / f"{_OWNED}.new").open("wb") as file:  # which Ray's processes do not inherit
            fcntl.flock(file, fcntl.LOCK_EX)
            (folder / f"{_OWNED}.new").rename(folder / _OWNED)  # so that it is never seen without its lock
            yield folder


def _remove_if_left(owned: Path) -> None:
    """Remove a folder of ours whose owner is gone, and with it the lock: no process id or clock says it as surely."""
    with suppress(OSError):  # somebody else's, held, or just gone
        if owned.parent.lstat().st_uid != os.getuid():
            return
        with owned.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(owned.parent, ignore_errors=True)


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Some environment variables, for Ray's processes, while the body runs."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _handlers_kept() -> Iterator[None]:
    """Undo what Ray makes of SIGTERM: an end of the process, where the command line first closes the run's record."""
    if threading.current_thread() is not threading.main_thread():  # where Ray leaves them alone
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    came = False
    try:
        yield
    except SystemExit:
        came = True
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(signal.SIGTERM)  # while Ray's handler was in force
