"""The artifact store: what a stage computed is kept under its fingerprint, and computed once.

An artifact is a folder `artifacts/<stage>/<fingerprint>/`: the stage's files, and `manifest.json` with the digest of
each. It is filled beside its place and renamed into it, so that it is there whole or not at all; every use checks the
digests again. This module knows no particular stage, no run, and how to load no file format but its own JSON.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Generic, TypeVar

from filelock import Timeout
from pydantic import BaseModel, ConfigDict, ValidationError

import blockpruner
from blockpruner.durable import sync_folder
from blockpruner.errors import ArtifactError, is_disk_full
from blockpruner.foreign_files import parsed_json, read_plain_file
from blockpruner.paths import naming
from stages.contract import (
    ArtifactRef,
    ConfigT,
    InputsT,
    ManifestT,
    Runtime,
    Stage,
    StageManifest,
    canonical_digest,
)
from stages.workspace import Warn, Workspace, checked_name, is_name, log_warning

MANIFEST_FILE = "manifest.json"
_PICKLE_SUFFIXES = frozenset({".bin", ".ckpt", ".dill", ".joblib", ".pickle", ".pkl", ".pt", ".pth"})
"""Names under which libraries look for files whose loading may run code; no artifact holds one."""
_PATIENCE_S = 1.0
"""Waiting for another process is said after this many seconds."""

FoundT = TypeVar("FoundT", bound=StageManifest)


class DamagedArtifactError(ArtifactError):
    """A folder in an artifact's place is not the artifact that was written; the message says what is wrong with it."""


class FileDigest(BaseModel):
    """What identifies one file's content."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sha256: str
    bytes: int


class Envelope(BaseModel):
    """The content of an artifact's manifest.json, less the digest that it carries of itself."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    stage: str
    version: int
    fingerprint: str
    config: dict[str, Any]
    inputs: dict[str, str]
    files: dict[str, FileDigest]
    """By path relative to the artifact, with '/'."""
    created_at: str
    """ISO 8601, UTC."""
    seconds: float
    """What computing it took."""
    package_version: str
    manifest: dict[str, Any]
    """What the stage says; NaN and infinity are strings."""


@dataclass(frozen=True)
class Artifact(Generic[ManifestT]):
    """A whole artifact, its files just checked."""

    stage: str
    fingerprint: str
    path: Path
    manifest: ManifestT
    cached: bool
    """False if it was computed by this call."""
    seconds: float
    """What computing it took, now or then."""

    @property
    def ref(self) -> ArtifactRef:
        """What a later stage needs to read it."""
        return ArtifactRef(fingerprint=self.fingerprint, path=self.path)


class ArtifactStore:
    """All artifacts of one workspace. Safe for any number of threads, processes and machines at once."""

    def __init__(self, workspace: Path, warn: Warn = log_warning) -> None:
        """Open the workspace, making it if it is not there.

        Raises:
            ArtifactError: if it cannot be written.
        """
        self.workspace = Workspace(workspace)
        self.workspace.prepare()
        self._warn = warn
        self._swept = False

    def has(self, stage_name: str, fingerprint: str) -> bool:
        """Whether there is such an artifact; its files are not checked."""
        return (self._folder(stage_name, fingerprint) / MANIFEST_FILE).is_file()

    def lookup(self, stage: Stage[Any, Any, FoundT], fingerprint: str) -> Artifact[FoundT] | None:
        """The artifact, if it is there and every byte is as it was written; a damaged one is said and set aside."""
        try:
            return self._load(stage, fingerprint)
        except DamagedArtifactError:
            with self.workspace.trying(lock_name(stage.name, fingerprint)) as ours:
                # Whoever else holds the lock is computing the artifact again.
                return self._load_or_set_aside(stage, fingerprint) if ours else None

    def get_or_run(
        self, stage: Stage[ConfigT, InputsT, ManifestT], config: ConfigT, inputs: InputsT, runtime: Runtime
    ) -> Artifact[ManifestT]:
        """The artifact of this stage, config and inputs: the one that is there, or else computed now.

        Of several processes that ask at once, one computes and the others wait for it.

        Raises:
            ArtifactError: if the disk is full, or the stage wrote what an artifact must not hold.
        """
        fingerprint = stage.fingerprint(config, inputs)
        self._sweep_once()
        if (found := self.lookup(stage, fingerprint)) is not None:
            return found
        with self._locked(lock_name(stage.name, fingerprint), f"stage {stage.name} ({fingerprint[:12]})"):
            found = self._load_or_set_aside(stage, fingerprint)  # it may have come while we waited
            return found or self._compute(stage, config, inputs, runtime)

    def remove_stale(self) -> None:
        """Remove the unfinished folders of processes that are gone. A folder whose lock can be had has no owner."""
        for unfinished in self.workspace.artifacts.glob("*/.tmp-*"):
            lock = lock_name(unfinished.parent.name, unfinished.name.split("-")[1])
            if is_name(lock) and not unfinished.parent.is_symlink():  # which leads out of the workspace
                with self.workspace.trying(lock) as ours:
                    if ours:
                        shutil.rmtree(unfinished, ignore_errors=True)

    def _sweep_once(self) -> None:
        if not self._swept:
            self._swept = True
            self.remove_stale()

    def _folder(self, stage_name: str, fingerprint: str) -> Path:
        parent = self.workspace.artifacts / checked_name(stage_name)
        if parent.resolve() != parent:
            raise ArtifactError(f"{parent} goes through a symbolic link; link the whole workspace instead")
        return parent / checked_name(fingerprint)

    def _load(self, stage: Stage[Any, Any, FoundT], fingerprint: str) -> Artifact[FoundT] | None:
        folder = self._folder(stage.name, fingerprint)
        if not os.path.lexists(folder):
            return None
        try:
            envelope = read_envelope(folder)
            check_files(folder, envelope)
        except FileNotFoundError as error:
            raise DamagedArtifactError("vanished while it was read") from error
        if (envelope.stage, envelope.version, envelope.fingerprint) != (stage.name, stage.version, fingerprint):
            raise DamagedArtifactError(f"holds the manifest of {envelope.stage}/{envelope.fingerprint[:12]}")
        try:
            manifest = stage.manifest_type.model_validate_json(json.dumps(envelope.manifest))
        except ValidationError as error:
            raise DamagedArtifactError(f"has a {MANIFEST_FILE} that does not fit its stage") from error
        return Artifact(stage.name, fingerprint, folder, manifest, cached=True, seconds=envelope.seconds)

    def _load_or_set_aside(self, stage: Stage[Any, Any, FoundT], fingerprint: str) -> Artifact[FoundT] | None:
        """Only with the artifact's lock."""
        try:
            return self._load(stage, fingerprint)
        except DamagedArtifactError as error:
            aside = self.workspace.damaged / f"{stage.name}-{fingerprint}"
            self.workspace.damaged.mkdir(exist_ok=True)
            _remove(aside)
            self._folder(stage.name, fingerprint).rename(aside)
            self._warn(
                f"artifact {stage.name}/{fingerprint[:12]} {error}: computed again (the damaged one is kept in {aside})"
            )
            return None

    def _compute(
        self, stage: Stage[ConfigT, InputsT, ManifestT], config: ConfigT, inputs: InputsT, runtime: Runtime
    ) -> Artifact[ManifestT]:
        """Only with the artifact's lock."""
        fingerprint = stage.fingerprint(config, inputs)
        folder = self._folder(stage.name, fingerprint)
        unfinished = folder.with_name(unfinished_name(fingerprint))
        started = time.monotonic()
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            for stale in folder.parent.glob(f".tmp-{fingerprint}-*"):
                shutil.rmtree(stale)
            unfinished.mkdir()
            with self._with_state(stage, config, inputs, runtime) as at_hand:
                manifest = stage.run(config, inputs, unfinished, at_hand)
            seconds = time.monotonic() - started
            _seal(unfinished, stage, config, inputs, manifest, seconds)
            unfinished.rename(folder)
            sync_folder(folder.parent)
        except Exception as error:
            if is_disk_full(error):
                raise _full_disk(stage.name, unfinished, self.workspace.path, error) from error
            raise
        finally:  # where it has become the artifact, there is nothing left of this name
            shutil.rmtree(unfinished, ignore_errors=True)
        return Artifact(stage.name, fingerprint, folder, manifest, cached=False, seconds=seconds)

    @contextmanager
    def _with_state(
        self, stage: Stage[ConfigT, InputsT, ManifestT], config: ConfigT, inputs: InputsT, runtime: Runtime
    ) -> Iterator[Runtime]:
        """The runtime with the stage's checkpoint folder in it, which is ours alone meanwhile."""
        if not stage.resumable:
            yield runtime
            return
        resume_fingerprint = stage.resume_fingerprint(config, inputs)
        with self._locked(state_lock_name(stage.name, resume_fingerprint), f"a {stage.name} with the same checkpoints"):
            state_dir = self.workspace.inside(Path("state", checked_name(stage.name), checked_name(resume_fingerprint)))
            state_dir.mkdir(parents=True, exist_ok=True)
            yield replace(runtime, state_dir=state_dir)

    @contextmanager
    def _locked(self, name: str, what: str) -> Iterator[None]:
        lock = self.workspace.lock(name)
        try:
            lock.acquire(timeout=_PATIENCE_S)
        except Timeout:
            self._warn(f"{what} is being computed by another process: waiting for it")
            lock.acquire(poll_interval=0.2)
        try:
            yield
        finally:
            lock.release()


def read_envelope(folder: Path) -> Envelope:
    """What the manifest.json of an artifact's folder says.

    Raises:
        DamagedArtifactError: if there is none, or it is not as it was written.
    """
    if folder.is_symlink() or not folder.is_dir():
        raise DamagedArtifactError("is not a folder")
    path = folder / MANIFEST_FILE
    if path.is_symlink() or not path.is_file():
        raise DamagedArtifactError(f"has no {MANIFEST_FILE}")
    try:
        text = read_plain_file(path)
        content = parsed_json(text)
        intact = text == _encoded(content) and content.pop("sha256") == canonical_digest(content)
        envelope = Envelope.model_validate(content)
    except (ValueError, RecursionError, TypeError, AttributeError, KeyError) as error:  # not JSON, or not ours
        raise DamagedArtifactError(f"has a changed file {MANIFEST_FILE}") from error
    if not intact:
        raise DamagedArtifactError(f"has a changed file {MANIFEST_FILE}")
    return envelope


def check_files(folder: Path, envelope: Envelope) -> None:
    """Compare every file of an artifact's folder with its digest.

    Raises:
        DamagedArtifactError: naming the first file that is changed, missing or not listed.
    """
    present = _files_in(folder)
    present.pop(MANIFEST_FILE, None)  # gone with the folder, where someone frees it at this moment
    for name in sorted(envelope.files.keys() - present.keys()):
        raise DamagedArtifactError(f"lacks the file {name}")
    for name in sorted(present.keys() - envelope.files.keys()):
        raise DamagedArtifactError(f"has a file {name} that does not belong to it")
    for name, expected in envelope.files.items():
        if present[name].stat().st_size != expected.bytes or _digest_file(present[name]) != expected:
            raise DamagedArtifactError(f"has a changed file {name}")


def read_file(folder: Path, envelope: Envelope, name: str) -> bytes:
    """The content of one small file of an artifact, checked against its digest.

    Raises:
        DamagedArtifactError: if it is missing, changed or not listed.
    """
    path, expected = folder / name, envelope.files.get(name)
    if expected is None or path.is_symlink() or not path.is_file():
        raise DamagedArtifactError(f"lacks the file {name}")
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != expected.sha256:
        raise DamagedArtifactError(f"has a changed file {name}")
    return content


def _seal(
    folder: Path,
    stage: Stage[ConfigT, InputsT, ManifestT],
    config: ConfigT,
    inputs: InputsT,
    manifest: ManifestT,
    seconds: float,
) -> None:
    """Make a stage's files durable, and then write manifest.json beside them."""
    try:
        files = _files_in(folder)
    except DamagedArtifactError as error:
        raise ArtifactError(f"what stage {stage.name} wrote cannot be kept: it {error}") from error
    assert MANIFEST_FILE not in files, f"stage {stage.name} wrote {MANIFEST_FILE}, which is the store's"
    envelope = Envelope(
        stage=stage.name,
        version=stage.version,
        fingerprint=stage.fingerprint(config, inputs),
        config=config.model_dump(mode="json"),
        inputs=dict(inputs.fingerprints()),
        files={name: _digest_file(path, durable=True) for name, path in sorted(files.items())},
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=seconds,
        package_version=blockpruner.__version__,
        manifest=json.loads(manifest.model_dump_json()),
    )
    content = envelope.model_dump(mode="json")
    content["sha256"] = canonical_digest(content)
    with naming(folder / MANIFEST_FILE), (folder / MANIFEST_FILE).open("wb") as file:
        file.write(_encoded(content))
        file.flush()
        os.fsync(file.fileno())
    for parent, _, _ in os.walk(folder):
        sync_folder(Path(parent))


def _encoded(content: dict[str, Any]) -> bytes:
    """The one way in which manifest.json is written, so that any other byte in it is a changed one."""
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def _files_in(folder: Path) -> dict[str, Path]:
    """Every file below a folder, by its relative path.

    Raises:
        DamagedArtifactError: if there is anything but folders and plain files that cannot hold code.
    """
    files: dict[str, Path] = {}
    for parent, folders, names in os.walk(folder):
        for path in (Path(parent, name) for name in [*folders, *names]):
            name = path.relative_to(folder).as_posix()
            if path.is_symlink() or not (path.is_file() or path.is_dir()):
                raise DamagedArtifactError(f"holds {name}, which is neither a file nor a folder")
            if path.is_file():
                if path.suffix.lower() in _PICKLE_SUFFIXES:
                    raise DamagedArtifactError(f"holds {name}, a kind of file that can run code when it is loaded")
                files[name] = path
    return files


def _digest_file(path: Path, durable: bool = False) -> FileDigest:
    with naming(path), path.open("rb") as file:
        if durable:
            os.fsync(file.fileno())
        return FileDigest(sha256=hashlib.file_digest(file, "sha256").hexdigest(), bytes=os.fstat(file.fileno()).st_size)


def lock_name(stage_name: str, fingerprint: str) -> str:
    """The lock that whoever writes, sets aside or removes this artifact holds."""
    return f"artifact-{stage_name}-{fingerprint}"


def state_lock_name(stage_name: str, resume_fingerprint: str) -> str:
    """The lock that whoever writes or removes these checkpoints holds."""
    return f"state-{stage_name}-{resume_fingerprint}"


def unfinished_name(fingerprint: str) -> str:
    """What a folder is called while this process fills or removes it, beside its place."""
    return f".tmp-{fingerprint}-{os.getpid()}"


def _full_disk(stage_name: str, unfinished: Path, workspace: Path, error: BaseException) -> ArtifactError:
    """The user's error, while what the stage has written is still there to be counted."""
    need = ""
    if getattr(error, "errno", None) not in (errno.EFBIG, errno.EDQUOT):  # where the disk itself is not what is full
        written = sum(path.stat().st_size for path in unfinished.rglob("*") if path.is_file())
        need = f" (the stage needs more than the {written + shutil.disk_usage(workspace).free:,} bytes that it had)"
    return ArtifactError(
        f"stage {stage_name}: {_what_was_written(error) or workspace} cannot be written "
        f"({getattr(error, 'strerror', None) or error}); free some space{need} and give the same command again: "
        "all that was finished is kept"
    )


def _what_was_written(error: BaseException) -> str | None:
    """The file that the operating system names; of a copy or a rename the second one."""
    return getattr(error, "filename2", None) or getattr(error, "filename", None)


def _remove(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)
