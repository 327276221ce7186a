"""What artifacts and checkpoints take up, which runs need them, and the removal of what none does.

A run is kept as long as its record is there, and a kept run needs whatever its record names: every artifact it made or
used, the checkpoints it may go on from, and an artifact whose files were its input. So freeing begins with the records
that shall go; what nothing needs any more follows. Knows no stage and no database.

A run names what it is about to use in its record before it looks for it, and an artifact is removed in three steps:
out of its place, a last look at the records, then for good or back again. So a run that begins meanwhile either finds
the artifact or computes it; only one that was reading it in the very moment between can fail, and be run again.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from blockpruner.errors import ConfigurationError
from stages.artifacts import MANIFEST_FILE, lock_name, state_lock_name, unfinished_name
from stages.runs import Records, RunRecord, RunStore
from stages.workspace import Workspace, is_name

EntryKind = Literal["artifact", "checkpoints", "damaged", "unfinished"]
Key = tuple[str, str, str]
"""What a run needs: 'artifact' or 'checkpoints', stage, fingerprint; '' is any fingerprint."""


@dataclass(frozen=True)
class CacheEntry:
    """One folder that can be freed."""

    kind: EntryKind
    stage: str
    fingerprint: str
    """Of checkpoints: the one that they are kept under."""
    path: Path
    bytes: int
    last_used: datetime
    """UTC: when it was made, or when the last run that needs it ended."""
    runs: tuple[str, ...] = ()
    """The ids of the runs that need it, newest first."""

    @property
    def lock(self) -> str:
        """The name of the lock that whoever writes it holds."""
        made_as_checkpoints = self.kind == "checkpoints" or self.path.parent.parent.name == "state"
        return (state_lock_name if made_as_checkpoints else lock_name)(self.stage, self.fingerprint)


@dataclass(frozen=True)
class Freeing:
    """What is to go, or has gone."""

    runs: Sequence[RunRecord] = ()
    entries: Sequence[CacheEntry] = ()
    left: Sequence[CacheEntry] = ()
    """What was to go and did not: another process is writing it, or a run that began meanwhile needs it."""
    kept_bytes: int = 0
    """What stays."""

    @property
    def bytes(self) -> int:
        """What goes."""
        return sum(entry.bytes for entry in self.entries)


class ArtifactCache:
    """The artifacts and checkpoints of one workspace, seen as a cache."""

    def __init__(self, runs: RunStore) -> None:
        """The cache of the workspace of these runs."""
        self._runs, self._workspace = runs, runs.workspace

    def entries(self) -> list[CacheEntry]:
        """Everything that takes up space, the largest first.

        Raises:
            ArtifactError: if a run record is damaged, for nobody knows what that run needs.
        """
        records = self._runs.list(strict=True)
        needs = {record.run_id: needs_of(record, self._workspace) for record in records}
        found = [_with_runs(entry, records, needs) for entry in _scan(self._workspace)]
        return sorted(found, key=lambda entry: (-entry.bytes, entry.path))

    def plan(
        self, runs: Iterable[RunRecord] = (), ended_before: datetime | None = None, most_bytes: int | None = None
    ) -> Freeing:
        """What goes if these runs are kept no longer, nor those that ended before an instant.

        `most_bytes`: and then the oldest, one after another, until no more than that is taken up.

        Raises:
            ConfigurationError: if a run that is named is under way.
            ArtifactError: if a run record is damaged.
        """
        named = {record.run_id for record in runs}
        records = self._runs.list(strict=True)
        over = [record for record in records if record.status != "running"]
        if under_way := named - {record.run_id for record in over}:
            raise ConfigurationError(f"run {min(under_way)} is under way, and needs what it has; stop it first")
        going = named | {r.run_id for r in over if ended_before is not None and r.ended_at < ended_before}
        entries = self.entries()
        if most_bytes is not None:
            going |= _oldest_beyond(most_bytes, over, going, entries)
        freed = [entry for entry in entries if going.issuperset(entry.runs)]
        kept_bytes = sum(entry.bytes for entry in entries) - sum(entry.bytes for entry in freed)
        return Freeing([r for r in over if r.run_id in going], freed, kept_bytes=kept_bytes)

    def free(self, plan: Freeing, forget_rows: Callable[[Sequence[str]], None]) -> Freeing:
        """Carry out a plan, and say what has gone.

        `forget_rows` takes the runs' rows out of the database; where it raises, nothing has gone yet.
        """
        if plan.runs:
            forget_rows([record.run_id for record in plan.runs])
        forgotten = [record for record in plan.runs if self._runs.forget(record.run_id)]
        watch, freed, left = _Watch(self._runs), list[CacheEntry](), list[CacheEntry]()
        for entry in plan.entries:
            with self._workspace.trying(entry.lock) as ours:
                (freed if ours and _remove(entry, watch) else left).append(entry)
        kept_bytes = plan.kept_bytes + sum(entry.bytes for entry in left)
        return Freeing(forgotten, freed, left, kept_bytes)


@dataclass
class _Watch:
    """What the runs need, as their records have it at this moment; only a record that has changed is read again."""

    runs: RunStore
    _known: dict[str, tuple[tuple[int, int], frozenset[Key]]] = field(default_factory=dict)

    def needs(self, entry: CacheEntry) -> bool:
        """Whether a run needs it now."""
        seen = {}
        for path in self.runs.workspace.runs.glob("[!.]*.json"):
            try:
                found = path.stat()
                stamp, known = (found.st_mtime_ns, found.st_ino), self._known.get(path.stem)
                if known is None or known[0] != stamp:
                    known = stamp, needs_of(self.runs.load(path.stem), self.runs.workspace)
                seen[path.stem] = known
            except FileNotFoundError:  # forgotten since it was listed
                continue
        self._known = seen
        return any(_is_among(entry, needs) for _, needs in seen.values())


def needs_of(record: RunRecord, workspace: Workspace) -> frozenset[Key]:
    """What a run that is kept needs."""
    needs = set[Key]()
    for stage in record.stages:
        if stage.fingerprint:
            needs.add(("artifact", stage.stage, stage.fingerprint))
        # A record of an earlier version does not say which checkpoints are its own.
        needs.add(("checkpoints", stage.stage, stage.checkpoints or ""))
    for text in _texts_in(record.model_dump(mode="json", exclude={"stages"})):
        path = Path(text)
        if path.is_absolute() and path.is_relative_to(workspace.artifacts):
            stage_name, fingerprint = (*path.relative_to(workspace.artifacts).parts, "", "")[:2]
            needs.add(("artifact", stage_name, fingerprint))
    return frozenset(needs)


def _texts_in(value: object) -> Iterator[str]:
    """Every text in a setting, however deep."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from _texts_in(list(value.values()))
    elif isinstance(value, list):
        for item in value:
            yield from _texts_in(item)


def _is_among(entry: CacheEntry, needs: frozenset[Key]) -> bool:
    return (entry.kind, entry.stage, entry.fingerprint) in needs or (entry.kind, entry.stage, "") in needs


def _with_runs(entry: CacheEntry, records: Records, needs: dict[str, frozenset[Key]]) -> CacheEntry:
    users = [record for record in records if _is_among(entry, needs[record.run_id])]
    last_used = max([entry.last_used, *(record.ended_at for record in users)])
    ids = tuple(record.run_id for record in users)
    return CacheEntry(entry.kind, entry.stage, entry.fingerprint, entry.path, entry.bytes, last_used, ids)


def _oldest_beyond(most_bytes: int, over: Records, going: set[str], entries: Sequence[CacheEntry]) -> set[str]:
    """The runs that must go besides, so that what the others need is at most `most_bytes`; or all that are over."""
    chosen = set[str]()
    for record in sorted(over, key=lambda record: (record.ended_at, record.run_id)):
        if sum(entry.bytes for entry in entries if not (going | chosen).issuperset(entry.runs)) <= most_bytes:
            break
        chosen.add(record.run_id)
    # One that gives nothing back has no reason to go.
    return {run_id for entry in entries if (going | chosen).issuperset(entry.runs) for run_id in entry.runs} & chosen


def _scan(workspace: Workspace) -> Iterator[CacheEntry]:
    """Every folder of the cache; what is not of its making (links, files, other names) is passed over."""
    for folder in _folders(workspace.damaged):
        stage_name, _, fingerprint = folder.name.rpartition("-")
        yield from _entry("damaged", stage_name, fingerprint, folder)
    for stage_folder in _folders(workspace.artifacts):
        yield from _entries_of("artifact", stage_folder)
    for stage_folder in _folders(workspace.state):
        yield from _entries_of("checkpoints", stage_folder)


def _entries_of(kind: EntryKind, stage_folder: Path) -> Iterator[CacheEntry]:
    for folder in _folders(stage_folder):
        if folder.name.startswith(".tmp-"):
            yield from _entry("unfinished", stage_folder.name, folder.name.split("-")[1], folder)
        else:
            yield from _entry(kind, stage_folder.name, folder.name, folder)


def _folders(parent: Path) -> list[Path]:
    if parent.is_symlink() or not parent.is_dir():
        return []
    return sorted(path for path in parent.iterdir() if path.is_dir() and not path.is_symlink())


def _entry(kind: EntryKind, stage: str, fingerprint: str, folder: Path) -> Iterator[CacheEntry]:
    """The entry, if its name is one that is ours and the folder is still there."""
    if not (is_name(stage) and is_name(fingerprint)):
        return
    manifest = folder / MANIFEST_FILE
    try:
        made = (manifest if manifest.is_file() else folder).stat().st_mtime
    except FileNotFoundError:  # finished, or removed, by someone else meanwhile
        return
    yield CacheEntry(kind, stage, fingerprint, folder, _bytes_in(folder), datetime.fromtimestamp(made, UTC))


def _bytes_in(folder: Path) -> int:
    """The sizes of all files below; one that vanishes meanwhile counts nothing."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(parent, name)).st_size  # noqa: PTH118
            except FileNotFoundError:
                continue
    return total


def _remove(entry: CacheEntry, watch: _Watch) -> bool:
    """Remove a folder, unless a run needs it; only with its lock."""
    if entry.kind in ("damaged", "unfinished"):
        shutil.rmtree(entry.path, ignore_errors=not entry.path.exists())
        return True
    if watch.needs(entry) or not entry.path.is_dir():
        return False
    aside = entry.path.with_name(unfinished_name(entry.fingerprint))
    entry.path.rename(aside)
    if watch.needs(entry):
        aside.rename(entry.path)
        return False
    shutil.rmtree(aside)
    return True
