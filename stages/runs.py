"""Run records: one JSON file a run, which says what was asked for, how it went, and which artifacts it used.

A run holds a lock for as long as its process lives, so that a later command can tell a run that is under way from one
that died. Knows no stage's files and no database: `store` makes rows of a record.
"""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from filelock import BaseFileLock
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

import blockpruner
from blockpruner.durable import write_durably
from blockpruner.errors import ArtifactError, nearest
from blockpruner.foreign_files import read_plain_file
from stages.consent import as_options
from stages.workspace import Warn, Workspace, is_name, log_warning

RunStatus = Literal["running", "completed", "failed", "crashed", "cancelled"]
StageStatus = Literal["running", "completed", "failed"]

_RUN_ID = r"^[a-z0-9_-]+$"
_SHOWN = 5
"""How many runs an error message lists."""

_held: dict[Path, BaseFileLock] = {}
"""The locks of the runs that this process has under way; a lock that is let go of is released."""
_held_guard = threading.Lock()


class _Record(BaseModel):
    # Unknown fields are passed over: a record outlives the version that wrote it.
    model_config = ConfigDict(extra="ignore", validate_assignment=True, protected_namespaces=())


class StageRun(_Record):
    """One stage of a run."""

    stage: str
    label: str
    """For people: 'calibrate', or the name of a text."""
    role: str
    """What the run uses it for: 'calibration', 'text:<name>', 'baseline', 'search', 'export', 'evaluate:dense',
    'evaluate:dense:texts' (where the dense model is measured on tasks and texts without a baseline) or
    'evaluate:pruned'."""
    fingerprint: str | None = None
    cached: bool = False
    started_at: AwareDatetime = Field(default_factory=lambda: datetime.now(UTC))
    seconds: float = 0.0
    status: StageStatus = "running"
    artifact_path: str | None = None
    """Relative to the workspace when inside."""
    checkpoints: str | None = None
    """Fingerprint under which a stage that can go on keeps its checkpoints; None for any other stage, and in records of
    a version that did not say."""
    error: str | None = None


class RunDescription(_Record):
    """What a run is about, as far as it is known; a single stage knows less than a whole pipeline."""

    name: str | None = None
    comparison: str | None = None
    """The comparison that the run is a row of."""
    model: str | None = None
    """What the user typed: a hub id or a folder."""
    model_fingerprint: str | None = None
    num_layers: int | None = None
    num_blocks_total: int | None = None
    num_parameters: int | None = None
    calibration: str | None = None
    num_samples: int | None = None
    """Rows asked for; None: all of them."""
    num_sequences: int | None = None
    sequence_length: int | None = None
    seed: int | None = None
    block_kinds: str | None = None
    metric: str | None = None
    strategy: str | None = None
    """How the blocks were chosen; for a model that was pruned elsewhere, what it is labelled with."""
    external: str | None = None
    """The folder of a model that was pruned elsewhere, which is measured here as the pruned one."""
    num_parameters_left: int | None = None
    """Of that model."""
    device: str | None = None
    dtype: str | None = None
    num_blocks_removed: int | None = None
    """Of the exported model, or where nothing was exported, by the search."""
    config: dict[str, Any] = Field(default_factory=dict)
    """The whole recipe, as JSON."""


class RunRecord(RunDescription):
    """A run: its description, how it stands, its stages in the order in which they began."""

    run_id: str = Field(pattern=_RUN_ID)
    status: RunStatus = "running"
    number: int = 0
    """One more than the newest run of the workspace had when this one began: clocks of two machines may be apart, and
    the newer run is the one with the larger number. 0: of a version that did not count."""
    created_at: AwareDatetime
    finished_at: AwareDatetime | None = None
    """For a crashed run: when its record was written last."""
    pid: int
    process_started: str | None = None
    """Tells the process from a later one with the same pid; None where the system does not say."""
    host: str
    package_version: str = blockpruner.__version__
    goal: str | None = None
    """How far it was to go; None in records of a version that did not say."""
    flow_run_id: str | None = None
    """Prefect's id of the flow run that it is, if it is one."""
    error: str | None = None
    stages: list[StageRun] = Field(default_factory=list)

    @property
    def age_key(self) -> tuple[int, datetime, str]:
        """By this the older run comes first."""
        return self.number, self.created_at, self.run_id

    @property
    def ended_at(self) -> datetime:
        """When it ended; for one that did not, when it began."""
        return self.finished_at or self.created_at

    @property
    def resume_command(self) -> str:
        """The command that goes on with it, with the options that it does not take from the record."""
        return " ".join(filter(None, ("blockpruner resume", self.run_id, as_options(self.config))))

    @property
    def was_refused(self) -> bool:
        """Whether the run failed before any of its stages began: a model, text or setting that could not be used."""
        return self.status == "failed" and not self.stages

    @property
    def failed_for_nothing(self) -> bool:
        """Whether the run failed and found no pruning order of its own: its settings are those that do not work."""
        searched = self.stage("search")
        return self.status == "failed" and (searched is None or searched.cached)

    def stage(self, role: str) -> StageRun | None:
        """The last completed stage with this role."""
        done = [stage for stage in self.stages if stage.role == role and stage.status == "completed"]
        return done[-1] if done else None


Records = list[RunRecord]


class RunStore:
    """The run records of one workspace."""

    def __init__(self, workspace: Path, warn: Warn = log_warning) -> None:
        """The records below `workspace`, which need not exist yet."""
        self.workspace = Workspace(workspace)
        self._warn = warn

    def create(
        self, description: RunDescription, *, goal: str | None = None, flow_run_id: str | None = None
    ) -> RunRecord:
        """Begin a run of this process: a new record with status 'running'.

        Args:
            description: what it is about, as far as it is known.
            goal: how far it is to go.
            flow_run_id: Prefect's id of it.

        Raises:
            ArtifactError: if the workspace cannot be written.
        """
        self.workspace.prepare()
        self.workspace.runs.mkdir(exist_ok=True)
        now = datetime.now(UTC)
        run_id = f"{now:%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"
        self._hold(run_id)
        record = RunRecord(
            **description.model_dump(),
            run_id=run_id,
            number=1 + max((each.number for each in self._readable()), default=0),
            created_at=now,
            pid=os.getpid(),
            process_started=process_start(os.getpid()),
            host=socket.gethostname(),
            goal=goal,
            flow_run_id=flow_run_id,
        )
        self.save(record)
        return record

    def save(self, record: RunRecord) -> None:
        """Write the record as it is now; once its status is not 'running', the run is over for this process."""
        self.workspace.runs.mkdir(parents=True, exist_ok=True)
        temporary = self.workspace.runs / f".tmp-{record.run_id}-{os.getpid()}-{threading.get_ident()}"
        try:
            write_durably(self._path(record.run_id), record.model_dump_json(indent=2).encode() + b"\n", temporary)
        finally:
            if record.status != "running":
                self._let_go(record.run_id)

    def finish(
        self, record: RunRecord, status: RunStatus, error: str | None = None, at: datetime | None = None
    ) -> None:
        """End the run (now, if not told when) and save its record; stages still running failed with it."""
        finished_at = at or datetime.now(UTC)
        for stage in record.stages:
            if stage.status == "running":
                stage.status, stage.error = "failed", error
                stage.seconds = max(0.0, (finished_at - stage.started_at).total_seconds())
        record.status, record.error, record.finished_at = status, error, finished_at
        self.save(record)

    def load(self, run_id: str) -> RunRecord:
        """The record of exactly this id.

        Raises:
            ArtifactError: if there is none, or it cannot be read.
        """
        path = self._path(run_id)
        try:
            record = RunRecord.model_validate_json(read_plain_file(path))
        except FileNotFoundError as error:
            raise ArtifactError(f"no run {run_id!r}; `blockpruner runs` lists those that exist") from error
        except (ValidationError, OSError) as error:
            raise ArtifactError(f"the run record {path} is damaged; remove it, its artifacts stay") from error
        if record.run_id != run_id:
            raise ArtifactError(f"the run record {path} is that of run {record.run_id!r}; remove it")
        return record

    def list(self, *, strict: bool = False) -> Records:
        """All runs, newest first; a damaged record is said and left out.

        Raises:
            ArtifactError: if one is damaged, and `strict`.
        """
        records = []
        for path in self.workspace.runs.glob("[!.]*.json"):
            try:
                records.append(self.load(path.stem))
            except ArtifactError as error:
                if strict and path.exists():
                    raise
                self._warn(str(error))
        return sorted(records, key=lambda record: record.age_key, reverse=True)

    def _readable(self) -> Iterator[RunRecord]:
        """The records that can be read, in no order; of others nothing is said."""
        for path in self.workspace.runs.glob("[!.]*.json"):
            with suppress(ArtifactError):
                yield self.load(path.stem)

    def resolve(self, text: str, *, to_go_on: bool = False) -> RunRecord:
        """The run that a user means: 'latest', an id, a name (the newest run of that name), or a unique start of an id.

        A run that was refused is kept like any other that failed, and an id finds it; 'latest' and a name mean the
        newest run that was not refused, and one that was only where there is no other: a slip of the pen must not come
        between a user and the run before it. Who wants to go on from a run (`to_go_on`) and take its settings means no
        run that failed either, unless it found a pruning order before: an export or an evaluation that did not work
        must not come between a user and the run that it was of. One that was cancelled or crashed goes on.

        Raises:
            ArtifactError: if there is none, or several; the message lists them.
        """
        if not text.strip():
            raise ArtifactError("no run is named; give an id, the start of one, a name, or latest")
        records = self.list()
        if not records:
            raise ArtifactError(f"no runs in the workspace {self.workspace.path} yet; give `blockpruner demo` for one")
        if text == "latest":
            return _newest(records, to_go_on)
        exact = [record for record in records if record.run_id == text] or [r for r in records if r.name == text]
        if exact:
            return _newest(exact, to_go_on)
        begun = [record for record in records if record.run_id.startswith(text)]
        if len(begun) > 1:
            raise ArtifactError(f"run {text!r} is ambiguous, it begins {_listing(begun)}; give more of the id")
        if not begun:
            known = [record.run_id for record in records] + [record.name for record in records if record.name]
            raise ArtifactError(f"no run {text!r}{nearest(text, known)}; there is {_listing(records)}, or 'latest'")
        return begun[0]

    def close_dead(self) -> Records:
        """Close the runs whose process is gone as 'crashed', remove what it was writing, and return them.

        In a workspace that can only be read this is said and nothing is closed.
        """
        try:
            closed = [record for record in self.list() if record.status == "running" and self._close_if_dead(record)]
            self._remove_unfinished()
        except OSError as error:
            self._warn(f"runs that died cannot be closed in {self.workspace.path} ({error.strerror})")
            return []
        return [self.load(record.run_id) for record in closed]

    def close(self, record: RunRecord, status: RunStatus, error: str) -> bool:
        """End a run that another process began and did not end; False if that is still there, or the run is over."""
        return record.status == "running" and self._close_if_dead(record, status, error)

    def forget(self, run_id: str) -> bool:
        """Remove the record of a run that is over; False if it is under way."""
        with _held_guard:
            if self._lock_path(run_id) in _held:
                return False
        with self.workspace.trying(f"run-{run_id}") as nobody_holds_it:
            if not nobody_holds_it or self.load(run_id).status == "running":
                return False
            self._path(run_id).unlink()
            return True

    def _remove_unfinished(self) -> None:
        for temporary in self.workspace.runs.glob(".tmp-*"):
            run_id = temporary.name.removeprefix(".tmp-").rsplit("-", 2)[0]
            if is_name(run_id):
                with self.workspace.trying(f"run-{run_id}") as ours:
                    if ours:
                        temporary.unlink(missing_ok=True)

    def _close_if_dead(self, record: RunRecord, status: RunStatus = "crashed", error: str | None = None) -> bool:
        with _held_guard:
            if self._lock_path(record.run_id) in _held:
                return False
        with self.workspace.trying(f"run-{record.run_id}") as nobody_holds_it:
            if not nobody_holds_it or _is_alive_here(record):
                return False
            last_sign_of_life = datetime.fromtimestamp(self._path(record.run_id).stat().st_mtime, UTC)
            record = self.load(record.run_id)
            if record.status != "running":  # closed by someone else since it was listed
                return False
            how = f"`{record.resume_command}` goes on with it"
            gone = f"the process of this run (pid {record.pid} on {record.host}) is gone; {how}"
            ended_at = max(last_sign_of_life, record.created_at)  # clocks may be apart
            self.finish(record, status, error or gone, at=ended_at)
            return True

    def _path(self, run_id: str) -> Path:
        return self.workspace.runs / f"{run_id}.json"

    def _lock_path(self, run_id: str) -> Path:
        return self.workspace.locks / f"run-{run_id}.lock"

    def _hold(self, run_id: str) -> None:
        lock = self.workspace.lock(f"run-{run_id}")
        lock.acquire(timeout=0)
        with _held_guard:
            _held[self._lock_path(run_id)] = lock

    def _let_go(self, run_id: str) -> None:
        with _held_guard:
            lock = _held.pop(self._lock_path(run_id), None)
        if lock is not None:
            lock.release()


def _newest(records: Records, to_go_on: bool) -> RunRecord:
    """Of records in the order of `RunStore.list`, the first that a user means; else the first."""
    begun = [record for record in records if not record.was_refused]
    useful = [record for record in begun if not record.failed_for_nothing] if to_go_on else []
    return next(iter([*useful, *begun, *records]))


def process_start(pid: int) -> str | None:
    """What tells a live process from every other that has had its pid; None if there is none (or it is a zombie)."""
    try:
        state_and_times = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None if Path("/proc/self/stat").exists() else _process_start_without_proc(pid)
    if state_and_times[0] in "XZ":
        return None
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{state_and_times[19]}"  # field 22 of proc(5): clock ticks from boot to the process's start


def _process_start_without_proc(pid: int) -> str | None:
    answer = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return answer.stdout.strip() or None


def _is_alive_here(record: RunRecord) -> bool:
    started = process_start(record.pid) if record.host == socket.gethostname() else None
    return started is not None and started == record.process_started


def _listing(records: Records) -> str:
    shown = ", ".join(f"{r.run_id} ({r.name})" if r.name else r.run_id for r in records[:_SHOWN])
    return shown + (f" and {len(records) - _SHOWN} more" if len(records) > _SHOWN else "")
