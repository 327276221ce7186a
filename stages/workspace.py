"""The workspace: one folder with everything that this program keeps. Its layout and its locks.

    artifacts/<stage>/<fingerprint>/    what the stages computed; the only part that must be backed up, with runs/
    runs/<run_id>.json                  one record a run
    state/<stage>/<fingerprint>/        checkpoints of stages that can go on
    damaged/                            artifacts that were changed after they were written, the last of each
    locks/                              empty files that processes hold locks on
    results.duckdb                      the numbers of all runs; can be made anew from artifacts/ and runs/

Knows no stage, no run and no SQL. Locks are the operating system's (flock): a process that dies frees its locks at
once, whatever any clock, host name or process id says.

Several machines on one shared folder: that holds wherever flock reaches all of them. By their own documentation it does
on NFS 3 and 4 as Linux mounts them (a lost machine's locks are freed when the server gives its lease up), on CephFS and
on Lustre with `-o flock`. It does not on an NFS mounted with `nolock` or `local_lock=flock` or `all`, on Lustre with
`localflock`, or on most FUSE mounts (sshfs, buckets): there each machine locks for itself, which cannot be seen from
here, and one may compute what another does. Tested on local file systems only. One that says that it has no locks is
refused. No lock is a file that stays when its maker dies. Clocks decide on no lock, no identity and not on what
`latest` is; ages that a person asks for (`cache prune --older-than`) and times shown are as good as the clocks are.
"""

from __future__ import annotations

import fcntl
import logging
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from blockpruner.errors import ArtifactError, is_disk_full
from blockpruner.paths import user_path

Warn = Callable[[str], None]
"""How something that a person should know is said: one line, no trailing newline."""

_NAME = re.compile(r"[a-z0-9_-]+")


def log_warning(message: str) -> None:
    """The `Warn` for callers that have no better place: Python's log."""
    logging.getLogger("blockpruner").warning("%s", message)


class Workspace:
    """Paths and locks inside one workspace folder. Making this object touches nothing."""

    def __init__(self, path: Path) -> None:
        """A workspace at `path`, which may itself be a symbolic link and need not exist yet.

        Raises:
            ArtifactError: if its name is no text, which the database's path must be.
        """
        self.path = user_path(path).resolve()
        _require_text(self.path)
        self.artifacts = self.path / "artifacts"
        self.state = self.path / "state"
        self.runs = self.path / "runs"
        self.locks = self.path / "locks"
        self.damaged = self.path / "damaged"
        self.database = self.path / "results.duckdb"

    def prepare(self) -> None:
        """Make the folder and prove that it can be written, and that its file system has locks.

        Raises:
            ArtifactError: if it cannot.
        """
        self._refuse_links()
        try:
            self.locks.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.locks) as file:
                file.write(b"?")
                _prove_locks(file.fileno(), self.path)
        except OSError as error:
            another = "give another with --workspace DIR or the environment variable BLOCKPRUNER_WORKSPACE"
            remedy = "free some space: what is there is kept" if is_disk_full(error) else another
            raise ArtifactError(f"the workspace {self.path} cannot be written ({error.strerror}); {remedy}") from error

    def _refuse_links(self) -> None:
        """Whoever makes a workspace does not decide what is written, and removed, elsewhere."""
        database = (self.database, self.database.with_name(f"{self.database.name}.wal"))
        for path in (self.artifacts, self.state, self.runs, self.locks, self.damaged, *database):
            if path.is_symlink():
                raise ArtifactError(f"{path} is a symbolic link; link the whole workspace instead")

    def owns(self, path: Path) -> bool:
        """Whether a path lies in one of the folders that are this workspace's own business."""
        ours = (self.artifacts, self.state, self.runs, self.locks, self.damaged, self.database)
        return any(user_path(path).resolve().is_relative_to(folder) for folder in ours)

    def require(self) -> None:
        """Make sure that there is something to look at; makes nothing.

        Raises:
            ArtifactError: if the folder is not there, or is a file, or what is in it lies elsewhere.
        """
        self._refuse_links()
        if not self.path.is_dir():
            problem = "is a file" if self.path.exists() else "is not there"
            raise ArtifactError(
                f"no runs and no results: the workspace {self.path} {problem}; give the folder of an earlier run with "
                "--workspace DIR or the environment variable BLOCKPRUNER_WORKSPACE, or make one with `blockpruner demo`"
            )

    def lock(self, name: str) -> BaseFileLock:
        """The lock of this name, not yet taken; any thread may release it."""
        self._refuse_links()
        self.locks.mkdir(parents=True, exist_ok=True)
        # A soft lock, filelock's own remedy where there is no flock, outlives its holder.
        return FileLock(self.locks / f"{checked_name(name)}.lock", thread_local=False, fallback_to_soft=False)

    @contextmanager
    def trying(self, name: str) -> Iterator[bool]:
        """Hold the lock of this name while the body runs, if it can be had at once: True; else False."""
        lock = self.lock(name)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()

    def inside(self, path: str | Path) -> Path:
        """A path (relative to the workspace, or absolute) with its links resolved.

        Raises:
            ArtifactError: if it leads out of the workspace.
        """
        resolved = (self.path / path).resolve()
        if not resolved.is_relative_to(self.path):
            raise ArtifactError(f"{path} leads out of the workspace {self.path}; only what lies inside is used")
        return resolved


def _require_text(path: Path) -> None:
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise ArtifactError(
            f"the path of the workspace {path} is not UTF-8, and the results database cannot lie there; "
            "give another with --workspace DIR or the environment variable BLOCKPRUNER_WORKSPACE"
        ) from error


def _prove_locks(descriptor: int, workspace: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise ArtifactError(
            f"the workspace {workspace} lies on a file system without locks ({error.strerror}), and without them two "
            "runs would spoil each other's results; mount it with locks (NFS: without nolock), or give another folder "
            "with --workspace DIR"
        ) from error


def is_name(text: str) -> bool:
    """Whether this can be a file name everywhere and leads nowhere else."""
    return _NAME.fullmatch(text) is not None


def checked_name(name: str) -> str:
    """The name itself, if it is one.

    Raises:
        ArtifactError: if it is none.
    """
    if not is_name(name):
        raise ArtifactError(f"{name!r} cannot name a folder of the workspace; use a-z, 0-9, '-' and '_' only")
    return name
