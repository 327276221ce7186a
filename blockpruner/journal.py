"""The search's memory on disk: every finished step, and the scores of the step under way.

A folder that the caller names holds `step-0001.json`, `step-0002.json`, ... and, for the step under way,
`partial.safetensors` with its predecessor. Each file is written whole beside its place and renamed into it, and carries
the search's identity and a digest, so that a torn, changed or foreign file is noticed and what is good before it is
used.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from blockpruner.blocks import Block
from blockpruner.durable import write_durably
from blockpruner.errors import ArtifactError
from blockpruner.foreign_files import parsed_json, read_plain_file
from blockpruner.scoring.table import ScoreTable
from blockpruner.trace import SearchStep

logger = logging.getLogger(__name__)

_DENSE_FILE = "dense.safetensors"
_PLAN_FILE = "plan.json"


class SearchJournal:
    """The checkpoints of one search, whatever its number of blocks."""

    def __init__(
        self,
        folder: Path,
        identity: str,
        partial_interval_s: float = 2.0,
        parts: Mapping[str, str] | None = None,
    ) -> None:
        """Keep the journal of the search with this identity (a sha256) in `folder`, which is made if missing.

        `partial_interval_s` seconds at least lie between two checkpoints within a step. `parts` are what the identity
        is made of, by name ("model", "metric"): with them a refusal can say what is different.

        Raises:
            ArtifactError: if a folder lies where a file is kept.
        """
        self._folder = folder
        self._identity = identity
        self._parts = dict(parts or {})
        self._partial_interval_s = partial_interval_s
        self._partial_saved_at = time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.iterdir():
            if path.suffix in (".json", ".safetensors") and path.is_dir():
                raise ArtifactError(f"{path} is a folder, and the search keeps a file there; remove it or move it away")
        for torn in folder.glob(".*.tmp"):  # of a process that was killed while writing
            torn.unlink()

    def steps(self) -> list[SearchStep]:
        """The finished steps, up to the first that is missing or damaged; a damaged one is said and set aside.

        Raises:
            ArtifactError: if the folder holds the journal of another search.
        """
        steps: list[SearchStep] = []
        while (path := self._step_path(len(steps) + 1)).exists():
            step = self._read_step(path)
            if step is None or step.step != len(steps) + 1:
                self._discard_from(len(steps) + 1)
                break
            steps.append(step)
        if any(self._number_of(path) > len(steps) for path in self._folder.glob("step-*.json")):
            # What follows a gap rests on a step that is no longer known, and must not come back.
            self._discard_from(len(steps) + 1)
        return steps

    def dense_nll(self) -> torch.Tensor | None:
        """Each sequence's NLL of the unpruned model (float64 [B]), if it was kept and is intact."""
        if not _is_there(self._folder / _DENSE_FILE):
            return None
        try:
            with safe_open(self._folder / _DENSE_FILE, "pt") as file:
                metadata = file.metadata() or {}
                nll_B: torch.Tensor = file.get_tensor("nll_B")
        except (SafetensorError, OSError) as error:
            logger.warning("the dense model's scores are damaged (%s): computed again", error)
            return None
        expected = (torch.float64, self._identity)
        if (nll_B.dtype, metadata.get("identity")) != expected or metadata.get("sha256") != _digest(
            nll_B.numpy().tobytes()
        ):
            logger.warning("the dense model's scores have changed bytes, or are another search's: computed again")
            return None
        return nll_B

    def keep_dense_nll(self, nll_B: torch.Tensor) -> None:
        """Keep each sequence's NLL of the unpruned model (float64 [B])."""
        metadata = {"identity": self._identity, "sha256": _digest(nll_B.numpy().tobytes())}
        _write(self._folder / _DENSE_FILE, save({"nll_B": nll_B}, metadata))

    def plan(self) -> str | None:
        """How the search's work was cut, as it was kept; None if it was not, or is damaged."""
        path = self._folder / _PLAN_FILE
        if not _is_there(path):
            return None
        payload, identity = _opened(path)
        if identity != self._identity:
            logger.warning(
                "how the search's work was cut is damaged: it is cut anew, and the last bits of scores may change"
            )
            return None
        return payload

    def keep_plan(self, plan: str) -> None:
        """Keep how the search's work is cut: whoever goes on with the same cut gets the same bits."""
        _write(self._folder / _PLAN_FILE, self._sealed(plan))

    def append(self, step: SearchStep) -> None:
        """Keep a finished step; the scores of the step under way are no longer needed."""
        _write(self._step_path(step.step), self._sealed(step.model_dump_json()))
        for path in self._partial_paths:
            path.unlink(missing_ok=True)

    def load_partial(self, removed: Sequence[Block], candidates: Sequence[Block], num_sequences: int) -> ScoreTable:
        """The scores of the step under way as they were kept last, or an empty table."""
        empty = ScoreTable.empty(candidates, num_sequences)
        identity = self._partial_identity(removed, candidates)
        found = (self._read_partial(path, identity, empty) for path in self._partial_paths)
        return next((table for table in found if table is not None), empty)

    def save_partial(self, removed: Sequence[Block], table: ScoreTable) -> None:
        """Keep the scores of the step under way, unless that was done a moment ago."""
        if time.monotonic() - self._partial_saved_at < self._partial_interval_s:
            return
        tensors = {
            "nll_CB": table.nll_CB,
            "done_CB": table.done_CB.to(torch.uint8),
            "divergence_CB": table.divergence_CB,
        }
        metadata = {"identity": self._partial_identity(removed, table.candidates), "sha256": _table_digest(table)}
        newest, previous = self._partial_paths
        if newest.exists():
            newest.replace(previous)
        _write(newest, save(tensors, metadata))
        self._partial_saved_at = time.monotonic()

    @property
    def _partial_paths(self) -> tuple[Path, Path]:
        """The scores of the step under way as they were kept last, and the time before."""
        return self._folder / "partial.safetensors", self._folder / "partial-previous.safetensors"

    def _read_partial(self, path: Path, identity: str, empty: ScoreTable) -> ScoreTable | None:
        """A kept table of the same shape as an empty one; None if it is another step's, or damaged, which is said."""
        if not _is_there(path):
            return None
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("identity") != identity:
                    return None
                nll_CB, done_CB, divergence_CB = map(file.get_tensor, ("nll_CB", "done_CB", "divergence_CB"))
        except (SafetensorError, OSError) as error:
            logger.warning("the checkpoint within the step is damaged (%s): taking the one before it, if any", error)
            return None
        table = ScoreTable(empty.candidates, nll_CB, done_CB.bool(), divergence_CB)
        fits = all(
            (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype)
            for mine, theirs in zip(table.tensors, empty.tensors, strict=True)
        )
        if not fits or metadata.get("sha256") != _table_digest(table):
            logger.warning("the checkpoint within the step has changed bytes: taking the one before it, if any")
            return None
        return table

    def _step_path(self, step: int) -> Path:
        return self._folder / f"step-{step:04d}.json"

    def _partial_identity(self, removed: Sequence[Block], candidates: Sequence[Block]) -> str:
        parts = [self._identity, "without", *map(str, removed), "candidates", *map(str, candidates)]
        return _digest(" ".join(parts).encode())

    def _sealed(self, payload: str) -> bytes:
        digest = _digest((self._identity + payload).encode())
        envelope = {"identity": self._identity, "sha256": digest, "payload": payload, "parts": self._parts}
        return json.dumps(envelope).encode()

    def _read_step(self, path: Path) -> SearchStep | None:
        payload, identity = _opened(path)
        if payload is not None and identity != self._identity:
            raise ArtifactError(
                f"{path} belongs to another search ({self._what_differs(path)}); "
                "remove it: the steps before it are used, and what follows is computed again"
            )
        try:
            return SearchStep.model_validate_json(payload) if payload is not None else None
        except ValidationError:  # sealed as it should be, and no step
            return None

    def _what_differs(self, path: Path) -> str:
        """What a foreign file's search has that this one has not, in words."""
        theirs = parsed_json(read_plain_file(path)).get("parts")
        if not isinstance(theirs, dict):
            theirs = {}
        different = [name for name in self._parts if theirs.get(name, self._parts[name]) != self._parts[name]]
        return f"another {' and '.join(different)}" if different else "another model, calibration set or metric"

    @staticmethod
    def _number_of(path: Path) -> int:
        digits = path.stem.removeprefix("step-")
        return int(digits) if digits.isdecimal() else 0

    def _discard_from(self, step: int) -> None:
        logger.warning(
            "step %d of the search's checkpoints is missing or damaged: going on from step %d", step, step - 1
        )
        for path in self._folder.glob("step-*.json"):
            if self._number_of(path) >= step:
                path.unlink()


def _write(path: Path, content: bytes) -> None:
    # The folder is synced as well, though all that a power cut could take here is work: a step takes the place of its
    # scores, which are removed, and both must not be lost together. It costs milliseconds, every two seconds at most.
    write_durably(path, content, path.with_name(f".{path.name}.{os.getpid()}.tmp"))


def _is_there(path: Path) -> bool:
    """Whether there is such a file. What else has its name is said and passed over: a pipe would be waited for."""
    if not path.is_file() and os.path.lexists(path):
        logger.warning("%s is no file: it is passed over", path)
    return path.is_file()


def _opened(path: Path) -> tuple[str | None, str | None]:
    """A sealed file's payload and the identity of its search; (None, None) if it is torn or changed."""
    try:
        envelope = parsed_json(read_plain_file(path))
        payload, identity = str(envelope["payload"]), str(envelope["identity"])
        intact = envelope["sha256"] == _digest((identity + payload).encode())
    except (OSError, ValueError, KeyError, TypeError):
        return None, None
    return (payload, identity) if intact else (None, None)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _table_digest(table: ScoreTable) -> str:
    return _digest(b"".join(tensor.numpy().tobytes() for tensor in table.tensors))
