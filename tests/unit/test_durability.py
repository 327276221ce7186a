"""What a power cut leaves: a file or folder gets its name once all of it is durable, and then the name is made durable.

Nobody pulls a plug here. A model of the worst disk watches instead: it keeps of a file what the last fsync of it saw,
and of a folder the names that the last fsync of that saw, and nothing else.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from blockpruner.blocks import mha, mlp
from blockpruner.journal import SearchJournal
from blockpruner.scoring.table import ScoreTable
from blockpruner.trace import CandidateScore, SearchStep
from stages.runs import RunDescription, RunStore
from tests.unit.echo_stage import Bench


class WorstDisk:
    """Takes note of every fsync, of the names that are given, and of what is removed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._kept: dict[tuple[int, int], object] = {}
        self.synced: list[str] = []
        """The names of what was made durable, in order."""
        self.named: list[str] = []
        """The new names that were given, in order."""
        self.on_remove: Callable[[Path], None] = lambda _: None
        sync, unlink = os.fsync, os.unlink

        def fsync(descriptor: int) -> None:
            path = Path(f"/proc/self/fd/{descriptor}").readlink()
            sync(descriptor)
            self._kept[_identity(path)] = _content(path)
            self.synced.append(path.name)

        def noted_unlink(path: Any, **options: Any) -> None:
            self.on_remove(Path(path))
            unlink(path, **options)

        monkeypatch.setattr(os, "fsync", fsync)
        monkeypatch.setattr(os, "unlink", noted_unlink)
        for name in ("rename", "replace"):
            monkeypatch.setattr(os, name, self._naming(getattr(os, name)))

    def keeps(self, path: Path) -> bool:
        """Whether all that is in a file or folder would be there after a power cut, once its own name is."""
        inside = path.iterdir() if path.is_dir() else ()
        return self._kept.get(_identity(path)) == _content(path) and all(map(self.keeps, inside))

    def keeps_name(self, path: Path) -> bool:
        """Whether a file or folder would have its name after a power cut."""
        kept = self._kept.get(_identity(path.parent))
        return isinstance(kept, dict) and kept.get(path.name) == _identity(path)

    def _naming(self, rename: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
        def checked(source: Any, target: Any) -> None:
            assert self.keeps(Path(source)), f"{target} is named before it is durable; durable are {self.synced}"
            rename(source, target)
            self.named.append(Path(target).name)

        return checked


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def _content(path: Path) -> object:
    """A file's bytes; of a folder what its names stand for."""
    return {each.name: _identity(each) for each in path.iterdir()} if path.is_dir() else path.read_bytes()


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> WorstDisk:
    if not Path("/proc/self/fd").exists():
        pytest.skip("there is no /proc, which says what file is synced")
    return WorstDisk(monkeypatch)


def test_a_run_record(tmp_path: Path, disk: WorstDisk) -> None:
    store = RunStore(tmp_path)
    record = store.create(RunDescription())
    store.finish(record, "completed")
    path = tmp_path / "runs" / f"{record.run_id}.json"
    assert disk.named == [path.name, path.name]
    assert disk.keeps(path)
    assert disk.keeps_name(path)


def test_an_artifact(tmp_path: Path, disk: WorstDisk) -> None:
    artifact = Bench(tmp_path).get()
    assert disk.named == [artifact.fingerprint]
    assert disk.keeps(artifact.path)
    assert disk.keeps_name(artifact.path)
    files = [path.name for path in artifact.path.rglob("*") if path.is_file()]
    assert len(files) == 3
    assert [name for name in disk.synced if name in files][-1] == "manifest.json"


def test_checkpoints_of_a_search(tmp_path: Path, disk: WorstDisk) -> None:
    """The scores of a step go only after the step that was made of them would survive."""
    journal = SearchJournal(tmp_path, "a" * 64, partial_interval_s=0)
    step_file, partials = tmp_path / "step-0001.json", []

    def notice(path: Path) -> None:
        partials.append(path.name)
        assert disk.keeps_name(step_file)

    journal.keep_plan("plan")
    journal.keep_dense_nll(torch.zeros(2, dtype=torch.float64))
    for _ in range(2):
        journal.save_partial((), ScoreTable.empty((mha(0), mlp(0)), 2))
    assert all(disk.keeps(path) and disk.keeps_name(path) for path in tmp_path.iterdir())
    disk.on_remove = notice
    journal.append(a_step())
    assert partials == ["partial.safetensors", "partial-previous.safetensors"]
    assert disk.keeps(step_file)


def a_step() -> SearchStep:
    chosen = CandidateScore(block=mha(0), score=1.0, perplexity=1.0, rank=1, chosen=True)
    return SearchStep(
        step=1,
        block=mha(0),
        score=1.0,
        perplexity=1.0,
        num_parameters_removed=1,
        ratio=0.1,
        seconds=0.0,
        candidates=(chosen,),
    )
