"""The folder of Ray's files: gone with the search, and after a kill with the next one. Needs no Ray."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from stages import ray_session
from tests.unit.child_processes import child, kill


@pytest.fixture
def parent(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # short
        monkeypatch.setenv("TMPDIR", folder)
        monkeypatch.setattr(tempfile, "tempdir", None)
        yield Path(folder)


def keep_a_folder() -> None:
    """In a child process."""
    with ray_session._folder() as folder:
        (folder / "ray").mkdir()
        sys.stdout.write(f"{folder}\n")
        sys.stdout.flush()
        time.sleep(600)


def test_folders_of_killed_processes_go_and_no_others(parent: Path) -> None:
    (parent / "bp-notes").mkdir()
    with ExitStack() as stack:
        processes = [stack.enter_context(child(keep_a_folder)) for _ in range(2)]
        killed, living = [Path(process.stdout.readline().strip()) for process in processes if process.stdout]
        kill(processes[0])
        assert (killed / "ray").is_dir()
        with ray_session._folder() as folder:
            assert set(parent.iterdir()) == {parent / "bp-notes", living, folder}
            assert folder.stat().st_mode & 0o077 == 0
        assert set(parent.iterdir()) == {parent / "bp-notes", living}
